"""Where records come from: text files, JSON lines, Parquet, built-in corpora.

A *record* is one document or one example: a dict with at least ``text`` (``str``), or the fields the recipe names.
Reading is strict: a file that is missing, empty, binary or lacks a field is refused in one line that says where.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from moestro.core.errors import DataError


Record = dict[str, Any]
Split = Literal["train", "heldout", "all"]

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
BUILTIN_PREFIX = "builtin:"
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can spell it, no text holds it, tokenizers refuse it


def read_records(source: str, *, split: Split = "all", fields: Mapping[str, str] | None = None) -> list[Record]:
    """All records of one source, in a fixed order.

    Args:
        source: a file (.txt .md .rst .py: one document; .jsonl .ndjson .parquet: one record a row), a folder of
            such files (read in sorted order), or ``builtin:NAME`` (see ``moestro.data.corpora``).
        split: part of a built-in corpus; files have no split of their own and only answer ``all``.
        fields: name in the record -> name in the file, for example ``{"text": "content"}``. Every named field must
            be there. Default: ``{"text": "text"}``.

    Returns:
        One dict a record, holding the named fields.

    Raises:
        DataError: the source is missing, empty, binary, damaged, or a field is not there.
    """
    if source.startswith(BUILTIN_PREFIX):
        from moestro.data.corpora import corpus

        return [{"text": text} for text in corpus(source.removeprefix(BUILTIN_PREFIX), split)]
    if split != "all":
        raise DataError(
            f"{source}: split {split!r} exists for {BUILTIN_PREFIX}NAME sources only; "
            "give the held-out text as a file of its own"
        )
    records = [record for path in _files(source) for record in _read_file(path, dict(fields or {"text": "text"}))]
    if not records:
        raise DataError(f"{source}: no record in it; expected at least one")
    return records


def read_texts(source: str, split: Split = "all", field: str = "text") -> list[str]:
    """The documents of a source as strings. Arguments and errors as in ``read_records``."""
    texts = [record["text"] for record in read_records(source, split=split, fields={"text": field})]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise DataError(f"{source}: field {field!r} of record {number} is {type(text).__name__}, expected a text")
    return texts


def _files(source: str) -> list[Path]:
    path = Path(source)
    known = TEXT_SUFFIXES + JSONL_SUFFIXES + PARQUET_SUFFIXES
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in known)
        if not files:
            raise DataError(f"{source}: no data file in this folder; expected {', '.join(known)}")
        return files
    if not path.exists():
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
        raise DataError(f"{source}: no such data file or folder{hint}")
    return [path]


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _read_file(path: Path, fields: dict[str, str]) -> Iterator[Record]:
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    suffix = path.suffix.lower()
    if suffix in PARQUET_SUFFIXES:
        yield from _read_parquet(path, fields)
    elif suffix in JSONL_SUFFIXES:
        yield from _read_jsonl(path, fields)
    else:
        text = _decode(path)
        if not text.strip():
            raise DataError(f"{path}: the file holds only white space ({len(text)} characters)")
        if fields != {"text": fields.get("text", "text")}:
            missing = ", ".join(sorted(set(fields) - {"text"}))
            raise DataError(f"{path}: a text file has no field {missing}; use .jsonl or .parquet")
        yield {"text": text}


def _decode(path: Path) -> str:
    data = path.read_bytes()
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(f"{path}: binary file (zero byte at offset {zero}); expected UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start}); convert it first"
        ) from None


def _read_jsonl(path: Path, fields: dict[str, str]) -> Iterator[Record]:
    for number, line in enumerate(_decode(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}); expected one object a line") from None
        except RecursionError:
            raise DataError(f"{where}: the JSON is nested too deeply; expected one flat object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
        picked = _pick(row, fields, where)
        for name, value in picked.items():
            if isinstance(value, str) and (half := HALF_CHARACTER.search(value)):
                raise DataError(f"{where}: field {fields[name]!r} holds \\u{ord(half[0]):04x}, half of a character")
        yield picked


def _read_parquet(path: Path, fields: dict[str, str]) -> Iterator[Record]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        line = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable Parquet file ({line})") from None
    with file:
        _pick(dict.fromkeys(file.schema_arrow.names), fields, str(path))
        try:
            for batch in file.iter_batches(columns=sorted(set(fields.values()))):
                for row in batch.to_pylist():
                    yield {name: row[column] for name, column in fields.items()}
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            line = " ".join(str(error).split())[:200]
            raise DataError(f"{path}: the Parquet file is damaged ({line})") from None


def _pick(row: Record, fields: dict[str, str], where: str) -> Record:
    for column in fields.values():
        if column not in row:
            near = difflib.get_close_matches(column, list(row), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(row)) or 'none'}"
            raise DataError(f"{where}: no field {column!r}; {hint}")
    return {name: row[column] for name, column in fields.items()}
