"""Recording routing decisions: a session's recorder that streams to Parquet in constant memory."""

import contextlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from moestro.core.context import RoutingContext
from moestro.core.errors import TraceError
from moestro.core.routing import Routing
from moestro.core.trace_format import COLUMNS, DATA_FILE, NO_EXPERT, Header, LayerInfo
from moestro.core.trace_sequences import PADDING, SequenceBook
from moestro.core.version import VERSION


ROW_GROUP: Final = 1 << 18
_INT32: Final = 1 << 31

Array = NDArray[Any]

_ACTIVE: set[Path] = (
    set()
)  # folders of this process's recordings; one left by a dead process of the same id is not here


class TraceWriter:
    """A recorder: ``with TraceWriter(path) as writer, moestro.session(recorder=writer): model(...)``.

    Rows go to ``path.unfinished-<process id>`` in row groups of about ``row_group`` rows; ``close`` renames the folder
    to ``path`` in one step, so a trace that exists is complete. Leaving the ``with`` by an exception removes it.

    Args:
        path: the folder to make, by custom ``X.trace``; None records into memory (see ``buffer``).
        layers: the routed layers, when they are known; others are added as they are met.
        tag: name of the session tag that fills the column ``tag``.
        header: model, model_hash, tokenizer, tokenizer_hash, facts for the header.

    Raises:
        TraceError: the target exists, or cannot be written.
    """

    def __init__(
        self,
        path: str | Path | None,
        layers: Sequence[LayerInfo] = (),
        *,
        tag: str = "tag",
        row_group: int = ROW_GROUP,
        **header: Any,
    ) -> None:
        self.path = None if path is None else Path(path)
        self._header = Header(layers=(), created_by=f"moestro {VERSION}", **header)
        self._infos: dict[str, LayerInfo] = {info.site: info for info in layers}
        self._tag_name, self._row_group = tag, row_group
        self._book = SequenceBook()
        self._tags: dict[str, int] = {}
        self._tag_T: WeakKeyDictionary[RoutingContext, tuple[Any, Array]] = WeakKeyDictionary()
        self._chunks: list[dict[str, Array]] = []
        self._buffered = 0
        self._rows = 0
        self._folder: Path | None = None
        self._closed = False
        self._memory = pa.BufferOutputStream() if self.path is None else None
        target: Any = self._memory if self.path is None else self._start(self.path) / DATA_FILE
        try:
            self._parquet = pq.ParquetWriter(target, COLUMNS, compression="zstd", write_page_checksum=True)
        except OSError as error:
            self._drop()
            raise TraceError(f"{self.path}: {error.strerror or error}; nothing was written") from None

    def _start(self, path: Path) -> Path:
        if path.exists():
            raise TraceError(f"{path} exists; remove it or give another name")
        folder = path.absolute().with_name(f"{path.name}.unfinished-{os.getpid()}")
        if folder in _ACTIVE:
            raise TraceError(f"{path} is being recorded to in this process; close that recording first")
        _sweep(path)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise TraceError(f"{folder}: {error.strerror or error}") from None
        _ACTIVE.add(folder)
        self._folder = folder
        return folder

    # -- the recorder protocol ----------------------------------------------------------------------------------

    @torch.no_grad()
    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """Take one layer's routing. Tokens of padding are left out.

        Raises:
            TraceError: the routing does not fit the forward's tokens or what the site had before; disk errors.
        """
        if self._closed:
            raise TraceError("this recording is closed; open a new TraceWriter")
        tokens = ctx.tokens
        sequence_T = self._book.sequences(ctx)
        if tokens is None or routing.num_tokens != tokens.count:
            raise TraceError(
                f"{site}: routing of {routing.num_tokens} tokens in a forward of {sequence_T.size}; a module that "
                "routes fewer tokens must open ctx.subset"
            )
        info = self._layer(site, self._book.call(ctx, site), routing)
        order_N, rank_N, missing_T = _token_order(routing, sequence_T)
        token_N = _numpy(routing.token_N)[order_N]
        forward = self._book.forward(ctx)
        count, extra = token_N.size, missing_T.size
        expert_N = _numpy(routing.expert_N)[order_N]
        _check_experts(site, expert_N, info)
        rows = {
            "token": np.concatenate([token_N, missing_T]),
            "rank": np.concatenate([rank_N, np.full(extra, NO_EXPERT)]),
            "expert": np.concatenate([expert_N, np.full(extra, NO_EXPERT)]),
            "weight": np.concatenate([_numpy(routing.weight_N.float())[order_N], np.zeros(extra, np.float32)]),
            "gate": np.concatenate([_gate(routing, order_N), np.full(extra, np.nan, np.float32)]),
            "kept": np.concatenate([_kept(routing, order_N), np.zeros(extra, dtype=bool)]),
        }
        if extra:
            place = np.argsort(rows["token"], kind="stable")
            rows = {name: column[place] for name, column in rows.items()}
        token_R = rows.pop("token")
        rows["sequence"] = sequence_T[token_R]
        rows["position"] = _numpy(tokens.position_T)[token_R]
        ids_T = None if tokens.ids_T is None else _numpy(tokens.ids_T)
        rows["token_id"] = np.full(token_R.size, -1) if ids_T is None else ids_T[token_R]
        rows["tag"] = self._tags_of(ctx)[token_R]
        rows["layer"] = np.full(token_R.size, info.layer)
        rows["forward"] = np.full(token_R.size, forward.number)
        rows["decode"] = np.full(token_R.size, forward.decode)
        self._add(rows, count + extra)

    def _layer(self, site: str, call: int, routing: Routing) -> LayerInfo:
        key = site if call == 0 else f"{site}#{call + 1}"
        info = self._infos.get(key)
        if info is None:
            info = LayerInfo(
                layer=layer_number(site, {known.layer for known in self._infos.values()}),
                site=key,
                num_experts=routing.num_experts,
                num_null=routing.num_null,
                top_k=routing.top_k,
                causal=routing.causal,
            )
            self._infos[key] = info
        if (routing.num_experts, routing.num_null) != (info.num_experts, info.num_null):
            raise TraceError(
                f"{site}: {routing.num_experts} experts and {routing.num_null} nulls now, {info.num_experts} and "
                f"{info.num_null} before; a trace holds one shape a layer, record the models apart"
            )
        if routing.top_k != info.top_k or routing.causal != info.causal:
            same_k = info.top_k if routing.top_k == info.top_k else None
            info = info.model_copy(update={"top_k": same_k, "causal": info.causal and routing.causal})
            self._infos[key] = info
        return info

    def _tags_of(self, ctx: RoutingContext) -> Array:
        """Tag number of each token, int64 [T]."""
        tokens = ctx.tokens
        assert tokens is not None
        known = self._tag_T.get(ctx)
        if known is not None and known[0] is tokens:
            return known[1]
        value = ctx.session.tags.get(self._tag_name, "")
        if isinstance(value, Tensor):
            flat, inverse = torch.unique(value, return_inverse=True)
            names = ["" if item == NO_EXPERT else str(item) for item in flat.tolist()]
            place = inverse.reshape(value.shape)
        else:
            values = [value] if isinstance(value, (str, int)) else list(value)
            names = [str(item) for item in values]
            place = torch.tensor(0) if isinstance(value, (str, int)) else torch.arange(len(values))
        numbers = torch.tensor([self._tags.setdefault(name, len(self._tags)) for name in names], dtype=torch.int64)
        tag_T = tokens.spread(numbers[place]).cpu().numpy()
        self._tag_T[ctx] = (tokens, tag_T)
        return tag_T

    # -- streaming ----------------------------------------------------------------------------------------------

    def _add(self, rows: dict[str, Array], count: int) -> None:
        self._chunks.append(rows)
        self._buffered += count
        if self._buffered >= self._row_group:
            self._flush()

    def _flush(self) -> None:
        if not self._buffered:
            self._chunks.clear()
            return
        if max(self._book.num_sequences, self._book.num_forwards) >= _INT32:
            raise TraceError(f"more than {_INT32} sequences or forwards; split the recording")
        columns = {name: np.concatenate([chunk[name] for chunk in self._chunks]) for name in self._chunks[0]}
        arrays: list[Any] = []
        for field in COLUMNS:
            if field.name == "tag":
                codes = pa.array(columns["tag"].astype(np.int32))
                arrays.append(pa.DictionaryArray.from_arrays(codes, pa.array(list(self._tags), pa.string())))
            else:
                arrays.append(pa.array(columns[field.name].astype(field.type.to_pandas_dtype()), field.type))
        table = pa.Table.from_arrays(arrays, schema=COLUMNS)
        try:
            self._parquet.write_table(table, row_group_size=table.num_rows)
        except OSError as error:
            raise TraceError(f"{self.path}: {error.strerror or error}; {self._rows} rows were recorded") from None
        self._rows += table.num_rows
        self._chunks.clear()
        self._buffered = 0

    @property
    def num_tokens(self) -> int:
        """Valid tokens seen so far."""
        return self._book.num_tokens

    @property
    def buffer(self) -> Any:
        """The finished Parquet file of a recording into memory, a ``pyarrow.Buffer``."""
        if self._memory is None or not self._closed:
            raise TraceError("the buffer exists for a finished recording into memory only")
        return self._memory.getvalue()

    def close(self, facts: Mapping[str, Any] | None = None) -> Header:
        """Finish: write what is buffered and the header, and give the folder its name.

        Args:
            facts: added to the header's ``facts``.

        Raises:
            TraceError: disk errors, or another recording took the name; nothing is left behind then.
        """
        if self._closed:
            return self._header
        try:
            self._flush()
            self._closed = True
            self._parquet.close()
            self._header = self._final(facts or {})
            if self._folder is not None:
                self._publish()
        except OSError as error:
            self.abort()
            raise TraceError(f"{self.path}: {error.strerror or error}; nothing was written") from None
        except BaseException:
            self.abort()
            raise
        return self._header

    def _final(self, facts: Mapping[str, Any]) -> Header:
        return self._header.model_copy(
            update={
                "layers": tuple(sorted(self._infos.values(), key=lambda info: info.layer)),
                "tags": tuple(self._tags),
                "num_tokens": self._book.num_tokens,
                "num_sequences": self._book.num_sequences,
                "num_forwards": self._book.num_forwards,
                "num_rows": self._rows,
                "facts": {**self._header.facts, **facts},
            }
        )

    def _publish(self) -> None:
        assert self._folder is not None
        assert self.path is not None
        self._header.write(self._folder)
        for file in sorted(self._folder.iterdir()):
            _sync(file)
        _sync(self._folder)
        self._folder.rename(self.path)
        _ACTIVE.discard(self._folder)
        self._folder = None
        _sync(self.path.parent)

    def abort(self) -> None:
        """Stop and leave nothing behind. Does nothing after ``close``."""
        if not self._closed:
            self._closed = True
            self._chunks.clear()
            with contextlib.suppress(OSError, pa.ArrowException):
                self._parquet.close()
        self._drop()

    def _drop(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            _ACTIVE.discard(self._folder)
            self._folder = None

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def layer_number(site: str, taken: set[int]) -> int:
    """The number of a site's layer: the first number in its path (its block), or the next free one."""
    first = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site)
    number = int(first.group(1)) if first else 0
    return number if number not in taken else max(taken) + 1


def unfinished(path: Path) -> list[Path]:
    """Folders that recordings to ``path`` have begun and not finished."""
    if not path.parent.is_dir():
        return []
    stem = f"{path.name}.unfinished-"
    return sorted(p for p in path.parent.iterdir() if p.name.startswith(stem) and p.name[len(stem) :].isdigit())


def _sweep(path: Path) -> None:
    """Remove what killed recordings to ``path`` left; those of living processes stay."""
    for folder in unfinished(path):
        process = int(folder.name.rsplit("-", 1)[1])
        if process == os.getpid() or not _alive(process):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy()


def _token_order(routing: Routing, sequence_T: NDArray[np.int64]) -> tuple[Array, Array, Array]:
    """Which assignments to record and how: (order_N, rank_N, missing_T).

    ``order_N`` sorts the assignments of valid tokens by token and keeps the router's order inside a token, ``rank_N``
    counts that order, ``missing_T`` are the valid tokens without any assignment.
    """
    valid_T = sequence_T != PADDING
    token_N = _numpy(routing.token_N)
    order_N = np.argsort(token_N, kind="stable")
    order_N = order_N[valid_T[token_N[order_N]]]
    sorted_N = token_N[order_N]
    count_T = np.bincount(sorted_N, minlength=valid_T.size)
    first_T = np.cumsum(count_T) - count_T
    rank_N = np.arange(sorted_N.size) - first_T[sorted_N]
    return order_N, rank_N, np.flatnonzero(valid_T & (count_T == 0))


def _gate(routing: Routing, order_N: Array) -> Array:
    if routing.scores is None or order_N.size == 0:
        return np.full(order_N.size, np.nan, np.float32)
    index_N = torch.from_numpy(order_N).to(routing.token_N.device)
    gate_N = routing.scores.gate_TC[routing.token_N[index_N], routing.expert_N[index_N]]
    return _numpy(gate_N.float())


def _kept(routing: Routing, order_N: Array) -> Array:
    return np.ones(order_N.size, dtype=bool) if routing.kept_N is None else _numpy(routing.kept_N)[order_N]


def _check_experts(site: str, expert_N: Array, info: LayerInfo) -> None:
    if expert_N.size and not 0 <= expert_N.min() <= expert_N.max() < info.num_choices:
        raise TraceError(
            f"{site}: expert ids {expert_N.min()} to {expert_N.max()} in a routing of {info.num_choices} choices"
        )
