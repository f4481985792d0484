"""How many experts a token gets, where that varies: top-p, null experts, expert choice, capacity."""

from dataclasses import dataclass

import numpy as np

from moestro.core.trace import RoutingTrace
from moestro.core.trace_format import LayerInfo
from moestro.core.trace_queries import Block, groups
from moestro.report.plots import HeatMap, LineChart, Series
from moestro.report.scale import Ints
from moestro.report.text import number, share, times


LINES = 5  # labels that get a line of their own


@dataclass
class LabelRow:
    """A label in numbers, over all layers: mean experts a token, that against all tokens, how many got none, most."""

    tag: str
    mean: str
    lift: str
    none: str
    most: int


@dataclass
class PerToken:
    """Experts that ran for a token: mean by layer and label, histogram by layer; in short: ``note``."""

    means: LineChart
    counts: HeatMap
    labels: list[LabelRow]
    note: str


def per_token(trace: RoutingTrace, tags: list[str]) -> PerToken | None:
    """The figures; None where every token has the same number of experts. Nulls and dropped assignments are none.

    Args:
        tags: the labels to tell apart, none for a trace of one label.
    """
    if not trace.layers or not _varies(trace):
        return None
    tables = histograms(trace)
    total = np.sum([table.sum(0) for table in tables.values()], axis=0)
    if not total.sum():
        return None
    used = np.flatnonzero(total)
    tags = [tag for tag in tags if any(table[trace.tags.index(tag)].any() for table in tables.values())]
    return PerToken(
        _means(trace, tables, tags[:LINES]),
        _map(tables, int(used[-1]) + 1),
        [_label(trace, tables, tag, mean(total)) for tag in tags],
        f"{number(round(mean(total), 2))} a token, {used[0]} to {used[-1]}",
    )


def _varies(trace: RoutingTrace) -> bool:
    if any(info.top_k is None or info.num_null for info in trace.header.layers):
        return True
    ran = trace.loads(ran=True)
    return any(not load.equal(ran[layer]) for layer, load in trace.loads().items())


def histograms(trace: RoutingTrace) -> dict[int, Ints]:
    """Tokens by number of real experts that ran for them: layer -> int64 [tags, 0 .. E], E that of the widest layer."""
    infos = {info.layer: info for info in trace.header.layers}
    shape = max(len(trace.tags), 1), max(info.num_experts for info in infos.values()) + 1
    found = {layer: np.zeros(shape, dtype=np.int64) for layer in infos}
    for block in trace.scan(("layer", "forward", "sequence", "position", "expert", "kept", "tag")):
        for layer, rows in groups(block["layer"]):
            found[layer] += _count({name: column[rows] for name, column in block.items()}, infos[layer], found[layer])
    return found


def _count(block: Block, info: LayerInfo, like: Ints) -> Ints:
    """The histogram of a block of one layer, whose rows stand token by token."""
    key_N3 = np.stack([block[name] for name in ("forward", "sequence", "position")], axis=1)
    starts_N = np.ones(len(key_N3), dtype=bool)
    starts_N[1:] = (key_N3[1:] != key_N3[:-1]).any(1)
    ran_N = (block["expert"] >= 0) & (block["expert"] < info.num_experts) & block["kept"]
    count_T = np.add.reduceat(ran_N.astype(np.int64), np.flatnonzero(starts_N))
    place_T = np.ravel_multi_index((block["tag"][starts_N].astype(np.int64), count_T), like.shape)
    return np.bincount(place_T, minlength=like.size).reshape(like.shape)


def mean(count_X: Ints) -> float:
    """The mean number of experts behind a histogram; NaN of nothing."""
    return float((count_X * np.arange(len(count_X))).sum() / count_X.sum()) if count_X.sum() else float("nan")


def _means(trace: RoutingTrace, tables: dict[int, Ints], tags: list[str]) -> LineChart:
    x = [float(layer) for layer in tables]
    lines = [Series("all tokens", x, [mean(table.sum(0)) for table in tables.values()])]
    for place, tag in enumerate(tags):
        row = trace.tags.index(tag)
        lines.append(Series(tag, x, [mean(table[row]) for table in tables.values()], style=place + 1))
    return LineChart(
        "per-token", "Mean number of experts", "layer", "experts a token", lines, dots=True, zero=True,
        label="Line chart of the mean number of experts a token by layer, for all tokens and for each label.",
    )  # fmt: skip


def _map(tables: dict[int, Ints], width: int) -> HeatMap:
    counts = np.stack([table.sum(0)[:width] for table in tables.values()])
    return HeatMap(
        "per-token-map", counts, "row", [str(layer) for layer in tables], [str(count) for count in range(width)],
        "layer", "experts", "tokens",
        f"Heat map of tokens by layer and number of experts; {len(tables)} layers, 0 to {width - 1} experts.",
    )  # fmt: skip


def _label(trace: RoutingTrace, tables: dict[int, Ints], tag: str, overall: float) -> LabelRow:
    counts = np.sum([table[trace.tags.index(tag)] for table in tables.values()], axis=0)
    lift = times(mean(counts) / overall) if overall else "—"
    none = share(int(counts[0]), int(counts.sum()))
    return LabelRow(tag, number(round(mean(counts), 3)), lift, none, int(np.flatnonzero(counts)[-1]))
