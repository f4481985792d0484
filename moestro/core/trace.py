"""RoutingTrace: routing decisions recorded over data, and the questions everybody asks of them.

    with moestro.trace(model, "run.trace") as trace:
        model(**batch)
    trace.load(3)            # assignments of each expert of layer 3

The format is described in ``trace_format``; sequences are numbered as ``trace_sequences`` says. Counts are exact: every
rank of every valid token, padding and checkpoint replays left out. Unless ``ran=True`` asks otherwise, an assignment
that capacity dropped counts as chosen.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from moestro.core import trace_queries as queries
from moestro.core.context import RoutingContext
from moestro.core.errors import TraceError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.routing import Routing
from moestro.core.session import session
from moestro.core.trace_format import COLUMNS, DATA_FILE, HEADER_FILE, NO_EXPERT, Header, LayerInfo
from moestro.core.trace_replay import Replay
from moestro.core.trace_view import SequenceBatch, assemble
from moestro.core.trace_writer import Array, TraceWriter, layer_number, unfinished


Phase = Literal["prefill", "decode"]

_MAX_GROUP: Final = 1 << 26
_KEPT_GROUPS: Final = 4
_DAMAGE: Final = (OSError, pa.ArrowException, UnicodeDecodeError, IndexError)  # what Arrow says of a damaged file
_TOKEN_KEY: Final = ("forward", "sequence", "position", "layer", "expert")


class RoutingTrace:
    """A finished recording. Open one with ``RoutingTrace.open``; ``moestro.trace`` makes one.

    Attributes:
        header: what ``header.json`` says. path: the folder, None for a recording in memory.
    """

    def __init__(self) -> None:
        self.header = Header()
        self.path: Path | None = None
        self._file: Any = None
        self._counts: dict[int, queries.Ints] | None = None
        self._groups: OrderedDict[int, dict[str, Array]] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path) -> "RoutingTrace":
        """Open a finished trace.

        Raises:
            TraceError: missing, unfinished, damaged, or of another version.
        """
        folder = Path(path)
        if not (folder / HEADER_FILE).is_file() or not (folder / DATA_FILE).is_file():
            raise TraceError(_why_not(folder))
        trace = cls()
        trace._attach(folder / DATA_FILE, Header.read(folder), folder)
        return trace

    def _attach(self, source: Any, header: Header, path: Path | None) -> None:
        name = str(path or "trace")
        try:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            schema = file.schema_arrow
        except _DAMAGE as error:
            raise TraceError(f"{name}: {DATA_FILE} is damaged: {_line(error)}; record again") from None
        for column in COLUMNS:
            if column.name not in schema.names or schema.field(column.name).type != column.type:
                raise TraceError(f"{name}: {DATA_FILE} has no column {column.name!r} of type {column.type}")
        rows = file.metadata.num_rows
        if rows != header.num_rows:
            raise TraceError(f"{name}: {DATA_FILE} holds {rows} rows, {HEADER_FILE} says {header.num_rows}")
        self._file, self.header, self.path = file, header, path

    # -- the layers ---------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[int]:
        """Numbers of the routed layers, ascending."""
        return [info.layer for info in self.header.layers]

    @property
    def tags(self) -> tuple[str, ...]:
        """Labels met while recording; "" for tokens without one."""
        return self.header.tags

    def layer(self, layer: int) -> LayerInfo:
        """Facts of one layer. Raises TraceError for a number the trace does not hold."""
        self._opened()
        for info in self.header.layers:
            if info.layer == layer:
                return info
        known = ", ".join(map(str, self.layers)) or "none"
        raise TraceError(f"the trace has no layer {layer}; it has {known}")

    # -- reading ------------------------------------------------------------------------------------------------

    def scan(
        self,
        columns: Sequence[str] | None = None,
        *,
        layers: Sequence[int] | None = None,
        tag: str | None = None,
        phase: Phase | None = None,
    ) -> Iterator[dict[str, Array]]:
        """Row groups in execution order as arrays, ``tag`` as its place in ``self.tags``; every id is checked.

        Args:
            columns: names to read, all when None. layers, tag, phase: keep these rows only.
        """
        wanted = list(COLUMNS.names if columns is None else columns)
        for number in range(self._opened().num_row_groups):
            block = self._read(number, wanted, layers, tag, phase)
            if block[wanted[0]].size:
                yield block

    def _opened(self) -> Any:
        if self._file is None:
            raise TraceError("the recording is still running; ask after the `with` block")
        return self._file

    def _read(
        self, number: int, wanted: Sequence[str], layers: Sequence[int] | None, tag: str | None, phase: Phase | None
    ) -> dict[str, Array]:
        file = self._opened()
        if file.metadata.row_group(number).num_rows > _MAX_GROUP:
            raise TraceError(f"{self.path}: a row group holds more than {_MAX_GROUP} rows; not written by Moestro")
        extra = [name for name, on in (("layer", layers), ("tag", tag), ("decode", phase)) if on is not None]
        try:
            table = file.read_row_group(number, columns=list(dict.fromkeys([*wanted, *extra, "layer"])))
            block = {name: self._array(table, name) for name in table.column_names}
        except _DAMAGE as error:
            raise TraceError(f"{self.path}: {DATA_FILE} is damaged: {_line(error)}") from None
        self._check(block)
        keep = np.ones(table.num_rows, dtype=bool)
        if layers is not None:
            keep &= np.isin(block["layer"], [self.layer(layer).layer for layer in layers])
        if tag is not None:
            keep &= block["tag"] == self._tag(tag)
        if phase is not None:
            keep &= block["decode"] == (phase == "decode")
        return {name: block[name] if keep.all() else block[name][keep] for name in wanted}

    def _array(self, table: Any, name: str) -> Array:
        column = table.column(name)
        if column.null_count:
            raise TraceError(f"{self.path}: {DATA_FILE} has empty cells in column {name!r}")
        if name != "tag":
            return np.asarray(column.to_numpy())
        whole = column.combine_chunks()
        if isinstance(whole, pa.ChunkedArray):
            whole = whole.unify_dictionaries().chunk(0) if whole.num_chunks else pa.array([], column.type)
        place = np.asarray([self._tag(item) for item in whole.dictionary.to_pylist()], dtype=np.int64)
        numbers: Array = place[whole.indices.to_numpy()]
        return numbers

    def _tag(self, tag: str) -> int:
        if tag not in self.tags:
            raise TraceError(f"the trace has no tag {tag!r}; it has {', '.join(map(repr, self.tags)) or 'none'}")
        return self.tags.index(tag)

    def _check(self, block: dict[str, Array]) -> None:
        for layer in np.unique(block["layer"]):
            info = self.layer(int(layer))
            if "expert" in block:
                mine = block["expert"][block["layer"] == layer]
                if mine.min() < NO_EXPERT or mine.max() >= info.num_choices:
                    raise TraceError(
                        f"{self.path}: layer {layer} has expert ids {mine.min()} to {mine.max()} among "
                        f"{info.num_choices} choices"
                    )

    # -- counts -------------------------------------------------------------------------------------------------

    def load(
        self,
        layer: int | None = None,
        tag: str | None = None,
        *,
        phase: Phase | None = None,
        ran: bool = False,
        nulls: bool = False,
    ) -> Tensor:
        """Assignments of each expert, int64 [E] ([C] with ``nulls``).

        Args:
            layer: a layer's number; None sums over the layers, which must then agree on E.
            tag, phase: count these tokens only. ran: leave out what capacity dropped. nulls: append null experts.
        """
        if layer is not None:
            return self._load(self.layer(layer), tag, phase, ran, nulls)
        loads = self.loads(tag, phase=phase, ran=ran, nulls=nulls)
        sizes = {len(load) for load in loads.values()}
        if len(sizes) != 1:
            raise TraceError(f"the layers have {sorted(sizes)} experts; ask for one layer, or for loads()")
        return torch.stack(list(loads.values())).sum(0)

    def loads(
        self, tag: str | None = None, *, phase: Phase | None = None, ran: bool = False, nulls: bool = False
    ) -> dict[int, Tensor]:
        """``load`` of every layer: layer -> int64 [E]."""
        return {info.layer: self._load(info, tag, phase, ran, nulls) for info in self.header.layers}

    def load_by_tag(self, layer: int) -> dict[str, Tensor]:
        """``load`` of one layer for every tag: tag -> int64 [E]."""
        return {tag: self.load(layer, tag) for tag in self.tags}

    def _load(self, info: LayerInfo, tag: str | None, phase: Phase | None, ran: bool, nulls: bool) -> Tensor:
        if self._counts is None:
            blocks = self.scan(("layer", "expert", "tag", "decode", "kept"))
            self._counts = queries.load_counts(blocks, self.header.layers, len(self.tags))
        counts = self._counts[info.layer][int(ran)]
        by_phase = counts.sum(0) if tag is None else counts[self._tag(tag)]
        load_C = by_phase.sum(0) if phase is None else by_phase[int(phase == "decode")]
        return torch.from_numpy(load_C if nulls else load_C[: info.num_experts].copy())

    def entropy(self, layer: int, tag: str | None = None) -> float:
        """Entropy of the layer's load over its real experts in nats: log E when balanced, 0 when one expert has all."""
        return queries.entropy(self.load(layer, tag).numpy())

    # -- pairs --------------------------------------------------------------------------------------------------

    def pair_counts(
        self, pairs: Sequence[tuple[int, int]], *, tag: str | None = None, phase: Phase | None = None
    ) -> list[Tensor]:
        """For each pair of layers the tokens that used expert i in the first and j in the second, int64 [E_a, E_b].

        One pass for all pairs. Experts of a pair (a, a) meet inside one layer; its diagonal counts each one's tokens.
        """
        infos = {layer: self.layer(layer) for pair in pairs for layer in pair}
        blocks = self.scan(_TOKEN_KEY, layers=sorted(infos), tag=tag, phase=phase)
        return [torch.from_numpy(counts) for counts in queries.pair_counts(blocks, pairs, infos)]

    def coactivation(self, layer: int, *, tag: str | None = None, phase: Phase | None = None) -> Tensor:
        """Tokens that used both expert i and expert j of a layer, int64 [E, E]; the diagonal counts tokens of i."""
        return self.pair_counts([(layer, layer)], tag=tag, phase=phase)[0]

    def affinity(self, layer_a: int, layer_b: int, *, tag: str | None = None, phase: Phase | None = None) -> Tensor:
        """Tokens that used expert i in ``layer_a`` and expert j in ``layer_b``, all k x k pairs, int64 [E_a, E_b]."""
        return self.pair_counts([(layer_a, layer_b)], tag=tag, phase=phase)[0]

    def reuse_distance(self, layer: int, *, per_sequence: bool = True, phase: Phase | None = None) -> Tensor:
        """Histogram of stack distances of the experts that ran, int64 [E + 1]; the last entry counts first uses.

        Entry d counts accesses with d other experts between this and the previous access to the same expert, so a
        least-recently-used cache of c experts hits ``histogram[:c].sum()`` times. Experts of one token are accessed in
        rank order, tokens in execution order.

        Args:
            per_sequence: each sequence starts with an empty cache; otherwise all share one.
        """
        info = self.layer(layer)
        if info.num_experts > queries.MAX_MATRIX:
            raise TraceError(f"layer {layer} has {info.num_experts} experts; at most {queries.MAX_MATRIX} are followed")
        counter = queries.ReuseCounter(info.num_experts)
        for block in self.scan(("sequence", "expert", "kept"), layers=[layer], phase=phase):
            ran = (block["expert"] >= 0) & (block["expert"] < info.num_experts) & block["kept"]
            expert_N = block["expert"][ran].astype(np.int64)
            if not per_sequence:
                counter.add(0, expert_N)
                continue
            for owner, rows in queries.groups(block["sequence"][ran]):
                counter.add(owner, expert_N[rows])
        return torch.from_numpy(counter.histogram)

    # -- sequences ----------------------------------------------------------------------------------------------

    def rows(self, sequences: Sequence[int], columns: Sequence[str] | None = None) -> dict[str, Array]:
        """All rows of some sequences, in execution order. Reads only row groups that hold them."""
        wanted = list(COLUMNS.names if columns is None else columns)
        chosen = np.asarray(sorted(set(sequences)), dtype=np.int64)
        parts = []
        for number in range(self._opened().num_row_groups):
            low, high = self._span(number)
            if chosen.size and np.searchsorted(chosen, low) < np.searchsorted(chosen, high, side="right"):
                block = self._group(number)
                keep = np.isin(block["sequence"], chosen)
                parts.append({name: block[name][keep] for name in wanted})
        if not parts:
            parts = [{name: np.empty(0, dtype=np.int64) for name in wanted}]
        return {name: np.concatenate([part[name] for part in parts]) for name in wanted}

    def _span(self, number: int) -> tuple[int, int]:
        statistics = self._file.metadata.row_group(number).column(COLUMNS.names.index("sequence")).statistics
        if statistics is None or not statistics.has_min_max:
            return 0, (1 << 31) - 1
        return int(statistics.min), int(statistics.max)

    def _group(self, number: int) -> dict[str, Array]:
        if number not in self._groups:
            self._groups[number] = self._read(number, COLUMNS.names, None, None, None)
        self._groups.move_to_end(number)
        while len(self._groups) > _KEPT_GROUPS:
            self._groups.popitem(last=False)
        return self._groups[number]

    def tokens(self, sequence: int) -> SequenceBatch:
        """One sequence for display: a batch of one row. Raises TraceError for a number outside the trace."""
        if not 0 <= sequence < self.header.num_sequences:
            raise TraceError(f"no sequence {sequence}; the trace holds {self.header.num_sequences}")
        return assemble(self.rows([sequence]), [sequence], self.header.layers, self.tags)

    def batches(self, batch_size: int, *, layers: Sequence[int] | None = None) -> Iterator[SequenceBatch]:
        """The trace as training data: its sequences in order, ``batch_size`` at a time, padded on the right."""
        infos = self.header.layers if layers is None else [self.layer(layer) for layer in layers]
        for first in range(0, self.header.num_sequences, batch_size):
            ids = range(first, min(first + batch_size, self.header.num_sequences))
            yield assemble(self.rows(ids), ids, infos, self.tags)

    def replay(self) -> Replay:
        """An edit that makes every forward choose what was recorded; see ``Replay``."""
        return Replay(self.header.layers, lambda ids: self.rows(ids))


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _why_not(folder: Path) -> str:
    if unfinished(folder):
        return f"{folder} is not finished: its recording was stopped or still runs; record it again"
    if folder.is_dir():
        missing = [name for name in (HEADER_FILE, DATA_FILE) if not (folder / name).is_file()]
        return f"{folder} is no finished trace: {' and '.join(missing)} missing; record it again"
    return f"{folder}: no such trace (a folder with {HEADER_FILE} and {DATA_FILE})"


def layers_of(model: nn.Module) -> list[LayerInfo]:
    """What a trace's header says about a model's mixture layers, in the model's order."""
    infos: list[LayerInfo] = []
    for site, module in mixture_layers(model).items():
        router = module.router
        number = layer_number(site, {info.layer for info in infos})
        infos.append(
            LayerInfo(
                layer=number,
                site=site,
                num_experts=router.num_experts,
                num_null=router.num_null,
                top_k=router.top_k,
                causal=router.causal,
            )
        )
    return infos


@contextmanager
def trace(
    model: nn.Module, /, path: str | Path | None = None, *, tag: str = "tag", **header: Any
) -> Iterator[RoutingTrace]:
    """Record every routing decision of ``model`` inside the block; afterwards the yielded trace answers questions.

    Args:
        path: a folder to make, by custom ``X.trace``; None keeps the recording in memory.
        tag: the session tag to record beside each token.
        header: model, model_hash, tokenizer, tokenizer_hash, facts for the header.

    Raises:
        TraceError: the model has no mixture layer, or the target exists.
    """
    layers = layers_of(model)
    if not layers:
        raise TraceError(f"{type(model).__name__} has no mixture layer to record; load it with moestro.load")
    found = RoutingTrace()
    with TraceWriter(path, layers, tag=tag, **header) as writer:
        with session(recorder=_Only(model, writer.record)):
            yield found
        written = writer.close()
    if writer.path is None:
        found._attach(pa.BufferReader(writer.buffer), written, None)
    else:
        found._attach(writer.path / DATA_FILE, written, writer.path)


class _Only:
    """A recorder that takes one model's forwards and lets a teacher's or another adapter's pass by."""

    def __init__(self, model: nn.Module, record: Callable[[str, Routing, RoutingContext], None]) -> None:
        self._modules = {id(module) for module in model.modules()}
        self._alone = {module.site for module in model.modules() if isinstance(module, MoELayer)}
        self._record = record

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """See Recorder."""
        mine = site in self._alone if ctx.module is None else id(ctx.module) in self._modules
        if mine:
            self._record(site, routing, ctx)
