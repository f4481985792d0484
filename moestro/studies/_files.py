"""Texts that recipes of studies read: JSON lines, written by ``python -m moestro.studies._<name> FOLDER``."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.core.errors import MoestroError


def write_lines(folder: Path, files: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[Path]:
    """``<name>.jsonl`` of the records of each name; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return [folder / f"{name}.jsonl" for name in files]


def command(module: str, write: Callable[[Path], Iterable[Path]], arguments: Sequence[str]) -> None:
    """``write`` into the one folder given and print the files; what fails leaves one line."""
    if len(arguments) != 1:
        sys.exit(f"usage: python -m moestro.studies.{module} FOLDER")
    try:
        print(*write(Path(arguments[0])), sep="\n")
    except (MoestroError, OSError) as error:
        sys.exit(f"error: {error}")
