"""From the ``data`` part of a recipe to examples: sources read, tokenised and cut into what an objective eats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from moestro.core.config import Config
from moestro.core.errors import ConfigError, DataError
from moestro.core.trace import RoutingTrace
from moestro.data.packing import chunk, pack
from moestro.data.sources import BUILTIN_PREFIX, Record, Split, read_records, read_texts
from moestro.data.spans import Window, read_question, windows
from moestro.data.tokens import byte_tokenizer, encode, open_tokenizer, separator_id, train_bpe


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = Mapping[str, Any]
TRACE_SUFFIX = ".trace"
TRACE_ROWS = 64  # sequences read from a trace at a time
Shape = Literal["packed", "chunks", "labels", "pairs", "spans", "tensors"]


class SourceConfig(Config):
    """One source of training data.

    Attributes:
        source: file, folder, ``builtin:NAME``, or ``X.trace``, a recorded trace's token ids (packed and chunked
            examples; the tokenizer must be the traced model's).
        split: part of a built-in corpus (default: its train part).
        text: field that holds the text (the input text for classification and sequence to sequence, the context of a
            question). label: field of the class. target: field of the output text.
        question, answers: fields of a question about the text and of its answers (``moestro.data.spans``).
        limit: at most this many records, from the front.
    """

    source: str
    split: Split | None = None
    text: str = "text"
    label: str = "label"
    target: str = "target"
    question: str = "question"
    answers: str = "answers"
    limit: int | None = Field(default=None, ge=1)

    @property
    def part(self) -> Split:
        """The split to read: a built-in corpus trains on its train part unless told otherwise."""
        return self.split or ("train" if self.source.startswith(BUILTIN_PREFIX) else "all")


class DataConfig(Config):
    """The ``data`` part of a recipe.

    Attributes:
        sources: name -> source; the name is the tag ``source`` of its rows. ``source: X`` alone means one source.
        tokenizer: ``model`` (the loaded model's own), ``bytes``, ``bpe:SIZE`` (learned from the sources), or a folder
            or hub id that Transformers can load.
        sequence_length: tokens of a packed sequence, and the longest piece of a padded one.
        stride: tokens that neighbouring windows of a context share, for questions.
    """

    sources: dict[str, SourceConfig]
    tokenizer: str = "model"
    sequence_length: int = Field(default=512, ge=2)
    stride: int = Field(default=128, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "source" in values and "sources" not in values:
            fields = set(SourceConfig.model_fields)
            one = {key: value for key, value in values.items() if key in fields}
            rest = {key: value for key, value in values.items() if key not in fields}
            return {**rest, "sources": {"data": one}}
        return values

    @model_validator(mode="after")
    def _some(self) -> "DataConfig":
        if not self.sources:
            raise ValueError("no source; give `source: FILE` or `sources: {name: {source: FILE}}`")
        return self


class Examples(Protocol):
    """Anything with a length and examples (dicts of arrays or numbers) by place."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Dataset:
    """Examples of every source.

    Attributes:
        sources: name -> examples, for instance a list of dicts.
        labels: class names in order, for classification; empty otherwise.
    """

    sources: Mapping[str, Examples]
    labels: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples of each source."""
        return {name: len(examples) for name, examples in self.sources.items()}


def load_tokenizer(
    config: DataConfig, model_tokenizer: "PreTrainedTokenizerBase | None" = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer a recipe names.

    Raises:
        ConfigError: ``model`` for a model without one, or an unreadable ``bpe:SIZE``.
        LoadError: the folder or id holds no tokenizer, or a damaged one.
    """
    name = config.tokenizer
    if name == "model":
        if model_tokenizer is None:
            raise ConfigError("data.tokenizer='model' but the model brings none; use 'bytes', 'bpe:4096' or a folder")
        return model_tokenizer
    if name == "bytes":
        return byte_tokenizer()
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        if not size.isdigit():
            raise ConfigError(f"data.tokenizer={name!r}: expected a number after 'bpe:', for example 'bpe:4096'")
        texts = [text for source in config.sources.values() for text in _texts(source)]
        return train_bpe(texts, int(size))
    return open_tokenizer(name)


def build_dataset(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", shape: Shape, labels: Sequence[str] = ()
) -> Dataset:
    """Read and tokenise every source into examples of one shape.

    Args:
        shape: ``packed`` {input_ids [S], starts [S]}; ``chunks`` {input_ids}; ``labels`` {input_ids, label};
            ``pairs`` {input_ids, target_ids}; ``spans`` {input_ids, token_type_ids, start, end}.
        labels: class names in order; default: the sorted values found.

    Raises:
        DataError: see ``moestro.data.sources``; or data shorter than one sequence.
    """
    length = config.sequence_length
    if shape == "packed":
        end = separator_id(tokenizer)
        return Dataset(
            {name: _named(name, pack, _ids(source, tokenizer), length, end) for name, source in config.sources.items()}
        )
    if shape == "chunks":
        return Dataset(
            {name: _named(name, chunk, _ids(source, tokenizer), length) for name, source in config.sources.items()}
        )
    if shape == "labels":
        return _labelled(config, tokenizer, labels)
    if shape == "pairs":
        return Dataset({name: _pairs(source, tokenizer, length) for name, source in config.sources.items()})
    if shape == "spans":
        return Dataset(
            {name: _named(name, _spans, source, tokenizer, config) for name, source in config.sources.items()}
        )
    raise ConfigError(f"examples of shape {shape!r} are not read from text; pass a Dataset to the trainer")


def _named(name: str, make: Any, *arguments: Any) -> Any:
    try:
        return make(*arguments)
    except DataError as error:
        raise DataError(f"source {name!r}: {error}") from None


def _texts(source: SourceConfig) -> list[str]:
    if source.source.endswith(TRACE_SUFFIX):
        raise DataError(f"{source.source}: a trace holds token ids, not text; a tokenizer cannot be learned from it")
    return read_texts(source.source, source.part, source.text)[: source.limit]


def _ids(source: SourceConfig, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    if source.source.endswith(TRACE_SUFFIX):
        return _traced_ids(source, len(tokenizer))
    return encode(tokenizer, _texts(source))


def _traced_ids(source: SourceConfig, vocab_size: int) -> list[list[int]]:
    """The token ids that a routing trace recorded, one document a sequence."""
    if source.split is not None:
        raise DataError(f"{source.source}: a trace has no split {source.split!r}; record the held-out text by itself")
    documents = []
    for batch in RoutingTrace.open(source.source).batches(TRACE_ROWS):
        for ids_S, valid_S in zip(batch.token_BS, batch.valid_BS, strict=True):
            documents.append(ids_S[valid_S].tolist())
    documents = documents[: source.limit]
    if not any(documents):
        raise DataError(f"{source.source}: the trace holds no token")
    lowest, highest = (choose(choose(ids) for ids in documents if ids) for choose in (min, max))
    if lowest < 0 or highest >= vocab_size:
        raise DataError(
            f"{source.source}: token ids from {lowest} to {highest} do not fit the tokenizer's {vocab_size} tokens; "
            "use the tokenizer of the model that was traced"
        )
    return documents


def _rows(source: SourceConfig, fields: dict[str, str]) -> list[Record]:
    records = read_records(source.source, split=source.part, fields=fields)[: source.limit]
    for number, record in enumerate(records, 1):
        if not isinstance(record["text"], str):
            kind = type(record["text"]).__name__
            raise DataError(f"{source.source}: field {source.text!r} of record {number} is {kind}, expected a text")
    return records


def _with_specials(tokenizer: "PreTrainedTokenizerBase", texts: list[str], length: int) -> list[Any]:
    rows = tokenizer(texts, truncation=True, max_length=length, verbose=False)["input_ids"]
    return [np.asarray(row, dtype=np.int32) for row in rows]


def _labelled(config: DataConfig, tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str]) -> Dataset:
    read = {
        name: _rows(source, {"text": source.text, "label": source.label}) for name, source in config.sources.items()
    }
    known = tuple(labels) or tuple(sorted({str(row["label"]) for rows in read.values() for row in rows}))
    place = {label: number for number, label in enumerate(known)}
    sources: dict[str, list[Example]] = {}
    for name, rows in read.items():
        wrong = next((str(row["label"]) for row in rows if str(row["label"]) not in place), None)
        if wrong is not None:
            raise DataError(f"source {name!r}: label {wrong!r} is none of {', '.join(known)}")
        ids = _with_specials(tokenizer, [row["text"] for row in rows], config.sequence_length)
        sources[name] = [
            {"input_ids": row_ids, "label": place[str(row["label"])]} for row_ids, row in zip(ids, rows, strict=True)
        ]
    return Dataset(sources, known)


def _pairs(source: SourceConfig, tokenizer: "PreTrainedTokenizerBase", length: int) -> list[Example]:
    rows = _rows(source, {"text": source.text, "target": source.target})
    inputs = _with_specials(tokenizer, [row["text"] for row in rows], length)
    targets = _with_specials(tokenizer, [str(row["target"]) for row in rows], length)
    return [{"input_ids": ids, "target_ids": target} for ids, target in zip(inputs, targets, strict=True)]


def _spans(source: SourceConfig, tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> list[Example]:
    rows = _rows(source, {"text": source.text, "question": source.question, "answers": source.answers})
    questions = [read_question(row, f"{source.source}, record {number}") for number, row in enumerate(rows, 1)]
    found, skipped = windows(tokenizer, questions, config.sequence_length, config.stride)
    if not found:
        raise DataError(f"none of {skipped} questions fits sequence_length={config.sequence_length}; give more tokens")
    return [span_example(window) for window in found]


def span_example(window: Window) -> Example:
    """A window as the objective ``span`` takes it."""
    return {
        "input_ids": window.input_ids,
        "token_type_ids": window.token_type_ids,
        "start": window.start,
        "end": window.end,
    }
