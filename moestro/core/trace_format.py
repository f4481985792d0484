"""A routing trace on disk: a folder ``X.trace/`` with ``trace.parquet`` and ``header.json``.

One row is one assignment of one valid token at one layer:

======== ================== =================================================================================
column   type               meaning
======== ================== =================================================================================
sequence int32              number of the sequence, see ``trace_sequences``
position int32              place in the sequence
token_id int32              id in the tokenizer; -1 when the stack was given embeddings
tag      dictionary<string> label from the session; "" when there is none
layer    int16              see ``LayerInfo``
rank     int16              order in which the router listed the token's experts, from 0 (top-k: best first)
expert   int32              0 .. num_experts - 1 real, num_experts .. num_experts + num_null - 1 null experts
weight   float32            what the expert's output was multiplied by
gate     float32            the router's gate before renormalisation; NaN when the router gave no scores
kept     bool               False where capacity dropped the assignment
forward  int32              number of the forward, in order of execution
decode   bool               True when the forward went on with a sequence that was in the cache
======== ================== =================================================================================

A valid token that no expert took has one row with expert -1, rank -1, weight 0 and kept False. All rows of one layer in
one forward are contiguous, token by token, and never cross a row group.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from moestro.core.config import Config
from moestro.core.errors import ConfigError, TraceError


SCHEMA: Final = 1
DATA_FILE: Final = "trace.parquet"
HEADER_FILE: Final = "header.json"
NO_EXPERT: Final = -1
MAX_CHOICES: Final = 1 << 20

COLUMNS: Final = pa.schema(
    [
        ("sequence", pa.int32()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("tag", pa.dictionary(pa.int32(), pa.string())),
        ("layer", pa.int16()),
        ("rank", pa.int16()),
        ("expert", pa.int32()),
        ("weight", pa.float32()),
        ("gate", pa.float32()),
        ("kept", pa.bool_()),
        ("forward", pa.int32()),
        ("decode", pa.bool_()),
    ]
)


class LayerInfo(Config):
    """One routed layer of a trace.

    Attributes:
        layer: its number in the column ``layer``: the index of its block, where that is unique (in a decoder it is).
        site: module path; a layer that runs several times in a forward is ``path#2``, ``path#3`` from its second run.
        num_experts: E. num_null: null experts. top_k: K, None where the number varies. causal: see Routing.
    """

    layer: int = Field(ge=0, le=32767)
    site: str
    num_experts: int = Field(ge=1, le=MAX_CHOICES)
    num_null: int = Field(default=0, ge=0, le=MAX_CHOICES)
    top_k: int | None = None
    causal: bool = True

    @property
    def num_choices(self) -> int:
        """C: real and null experts."""
        return self.num_experts + self.num_null


def digest(values: Mapping[str, Any]) -> str:
    """SHA-256 over a header's values; ``header.json`` carries it so that a damaged digit is noticed."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Header(Config):
    """What ``header.json`` says. ``facts`` is free for whoever records (data files, dtype, settings)."""

    version: Literal[1] = Field(default=SCHEMA, alias="schema")
    model: str = ""
    model_hash: str | None = None
    tokenizer: str | None = None
    tokenizer_hash: str | None = None
    layers: tuple[LayerInfo, ...] = ()
    tags: tuple[str, ...] = ()
    num_tokens: int = Field(default=0, ge=0)
    num_sequences: int = Field(default=0, ge=0)
    num_forwards: int = Field(default=0, ge=0)
    num_rows: int = Field(default=0, ge=0)
    created_by: str = ""
    facts: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _layers_are_distinct(self) -> "Header":
        if len({info.layer for info in self.layers}) != len(self.layers):
            raise ValueError("two layers have the same number")
        if len(set(self.tags)) != len(self.tags):
            raise ValueError("a tag is listed twice")
        return self

    def write(self, folder: Path) -> None:
        """Write ``header.json`` into ``folder``."""
        values = self.model_dump(mode="json", by_alias=True)
        text = json.dumps({**values, "digest": digest(values)}, indent=1, allow_nan=False)
        (folder / HEADER_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Header":
        """Read and check ``header.json``.

        Raises:
            TraceError: unreadable, not JSON, or a field is wrong.
        """
        path = folder / HEADER_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TraceError(f"{path}: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise TraceError(f"{path}: not a JSON file; record the trace again") from None
        told = values.pop("digest", None) if isinstance(values, dict) else None
        try:
            if told is not None and told != digest(values):
                raise TraceError(f"{path}: its digest does not fit its values: it was changed or damaged; record again")
            return cls.parse(values, where=str(path))
        except ConfigError as error:
            raise TraceError(str(error)) from None
