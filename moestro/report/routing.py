"""The figures of a trace: loads, labels, pairs, entropy."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from moestro.core.trace import RoutingTrace
from moestro.report.per_token import PerToken, per_token
from moestro.report.plots import HeatMap, LineChart, Series
from moestro.report.scale import Ints, information, transition_ratio
from moestro.report.text import number, share, times


MAX_TAGS: Final = 8
MAX_SIDE: Final = 64  # experts of a matrix; of larger layers the busiest are shown
BUDGET: Final = 1_200_000  # cells of all matrices of one kind that a page carries


@dataclass
class LayerRow:
    """A layer in numbers."""

    layer: int
    experts: int
    assignments: int
    busiest: str
    idle: int
    idle_experts: str
    effective: float
    evenness: str


@dataclass
class Special:
    """An expert that one label uses more than the others do."""

    layer: int
    expert: int
    tag: str
    part: str
    lift: str
    tokens: str


@dataclass
class Matrices:
    """Matrices of which the page shows one at a time.

    Attributes:
        name: id. shown: the first drawn. choices: (value, text) of all. data: for the script. note: what was left out.
    """

    name: str
    shown: HeatMap
    choices: list[tuple[str, str]]
    data: dict[str, Any]
    note: str = ""


@dataclass
class RoutingFigures:
    """Everything a trace gives to the page."""

    tiles: list[tuple[str, str, str]]
    load: HeatMap | None = None
    per_token: PerToken | None = None
    layers: list[LayerRow] = field(default_factory=list)
    by_tag: list[tuple[str, str, HeatMap]] = field(default_factory=list)
    tags_left_out: int = 0
    special: list[Special] = field(default_factory=list)
    tag_information: LineChart | None = None
    pairs: Matrices | None = None
    affinity: Matrices | None = None
    affinity_chart: LineChart | None = None
    entropy: LineChart | None = None
    causal: bool = True


def routing_figures(trace: RoutingTrace) -> RoutingFigures:
    """Read a trace and work out its figures. Loads count chosen assignments of real experts, dropped ones included."""
    loads = {layer: load.numpy() for layer, load in trace.loads().items()}
    figures = RoutingFigures(tiles=_tiles(trace, loads), causal=all(info.causal for info in trace.header.layers))
    if not loads:
        return figures
    figures.layers = [_layer_row(layer, load) for layer, load in loads.items()]
    figures.load = _load_map(loads, "load", "assignments")
    tags = _tags(trace)
    figures.tags_left_out = max(0, len([tag for tag in trace.tags if tag]) - len(tags))
    figures.per_token = per_token(trace, tags if len(tags) > 1 else [])
    if figures.per_token is not None:
        name, value, _ = figures.tiles[1]
        figures.tiles[1] = (name, value, figures.per_token.note)
    if len(tags) > 1:
        figures.by_tag = _tag_maps(trace, tags)
        figures.special = _special(trace, tags)
        figures.tag_information = _tag_information(trace, tags)
    figures.entropy = _entropy(trace, loads, tags)
    figures.pairs = _pairs(trace, loads)
    figures.affinity, figures.affinity_chart = _affinity(trace, loads)
    return figures


def effective(load_E: Ints) -> float:
    """exp of the load's entropy: as many equally used experts would look the same."""
    total = load_E.sum()
    if not total:
        return 0.0
    part = load_E[load_E > 0] / total
    return float(np.exp(-(part * np.log(part)).sum()))


def _tiles(trace: RoutingTrace, loads: dict[int, Ints]) -> list[tuple[str, str, str]]:
    header = trace.header
    tiles = [("tokens traced", number(header.num_tokens), f"{number(header.num_sequences)} sequences")]
    if not loads:
        return tiles
    sizes = sorted({len(load) for load in loads.values()})
    slots = sorted({info.top_k for info in header.layers if info.top_k is not None})
    choice = f"{' or '.join(map(str, slots))} a token" if slots else "varying number a token"
    tiles.append(("experts a layer", " – ".join(map(number, sizes[:1] + sizes[1:][-1:])), choice))
    tiles.append(("routed layers", number(len(loads)), f"layers {min(loads)} to {max(loads)}"))
    idle = sum(int((load == 0).sum()) for load in loads.values())
    tiles.append(("idle experts", number(idle), f"of {number(sum(map(len, loads.values())))}, never chosen"))
    worst = max(loads, key=lambda layer: _peak(loads[layer]))
    tiles.append(
        ("highest load", times(_peak(loads[worst])), f"the mean; layer {worst}, expert {loads[worst].argmax()}")
    )
    even = np.mean([effective(load) / len(load) for load in loads.values()])
    tiles.append(("effective experts", share(float(even), 1), "of each layer's, on average"))
    return tiles


def _peak(load_E: Ints) -> float:
    return float(load_E.max() / load_E.mean()) if load_E.sum() else 0.0


def _layer_row(layer: int, load_E: Ints) -> LayerRow:
    idle = np.flatnonzero(load_E == 0)
    total = int(load_E.sum())
    busiest = f"{load_E.argmax()} ({share(int(load_E.max()), total)})" if total else "—"
    experts = ", ".join(map(str, idle[:16])) + (", …" if idle.size > 16 else "")
    size = len(load_E)
    evenness = number(math.log(effective(load_E)) / math.log(size)) if total and size > 1 else "—"
    return LayerRow(layer, size, total, busiest, int(idle.size), experts, effective(load_E), evenness)


def _stack(loads: dict[int, Ints]) -> tuple[Ints, list[str], list[str]]:
    """Loads as one table, its rows and columns; layers with fewer experts end in zeros (see ``HeatMap.sizes``)."""
    width = max(len(load) for load in loads.values())
    table = np.zeros((len(loads), width), dtype=np.int64)
    for row, load in enumerate(loads.values()):
        table[row, : len(load)] = load
    return table, [str(layer) for layer in loads], [str(expert) for expert in range(width)]


def _load_map(loads: dict[int, Ints], name: str, unit: str) -> HeatMap:
    table, rows, columns = _stack(loads)
    sizes = [len(load) for load in loads.values()]
    return HeatMap(
        name, table, "row", rows, columns, "layer", "expert", unit,
        label=f"Heat map of {unit} by layer and expert; {len(rows)} layers, up to {len(columns)} experts.",
        sizes=sizes if len(set(sizes)) > 1 else None,
    )  # fmt: skip


def _tags(trace: RoutingTrace) -> list[str]:
    """The labels to show, those with most assignments first."""
    totals = {tag: sum(int(load.sum()) for load in trace.loads(tag).values()) for tag in trace.tags if tag}
    return sorted(totals, key=lambda tag: -totals[tag])[:MAX_TAGS]


def _tag_table(trace: RoutingTrace, layer: int, tags: list[str]) -> Ints:
    """Assignments by label and expert, int64 [tags, E]."""
    loads = trace.load_by_tag(layer)
    return np.stack([loads[tag].numpy() for tag in tags])


def _tag_maps(trace: RoutingTrace, tags: list[str]) -> list[tuple[str, str, HeatMap]]:
    """(label, its part of all assignments, map): its load against what its part of each layer's load would give."""
    tables = {layer: _tag_table(trace, layer, tags) for layer in trace.layers}
    total = sum(int(table.sum()) for table in tables.values())
    maps = []
    for place, tag in enumerate(tags):
        loads = {layer: table[place] for layer, table in tables.items()}
        heat = _load_map(loads, f"tag-{place}", "assignments")
        heat.expected = _stack({layer: table.sum(0) for layer, table in tables.items()})[0]
        heat.rule = "share"
        heat.label = f"Heat map of the load of texts labelled {tag} against the load of all labelled texts."
        part = sum(int(load.sum()) for load in loads.values())
        maps.append((tag, share(part, total), heat))
    return maps


def _special(trace: RoutingTrace, tags: list[str], most: int = 12) -> list[Special]:
    """Experts with the largest lift of one label; an expert needs the layer's mean load to be listed."""
    found = []
    for layer in trace.layers:
        table = _tag_table(trace, layer, tags)
        lift = transition_ratio(table)
        load_E = table.sum(0)
        for tag, expert in zip(*np.nonzero(np.nan_to_num(lift) > 1), strict=True):
            if load_E[expert] >= load_E.mean() / 2:
                found.append(
                    (float(lift[tag, expert]), layer, int(expert), int(tag), table[tag, expert], load_E[expert])
                )
    found.sort(key=lambda row: (-row[0], row[1], row[2]))
    return [
        Special(layer, expert, tags[tag], share(count, load), times(lift), number(int(count)))
        for lift, layer, expert, tag, count, load in found[:most]
    ]


def _tag_information(trace: RoutingTrace, tags: list[str]) -> LineChart:
    bits = [information(_tag_table(trace, layer, tags)) for layer in trace.layers]
    return LineChart(
        "tag-information", "What an expert tells about the label", "layer", "bits",
        [Series("label and expert", [float(layer) for layer in trace.layers], bits)], dots=True, zero=True,
        label="Line chart of the mutual information of label and chosen expert by layer, in bits.",
    )  # fmt: skip


def _entropy(trace: RoutingTrace, loads: dict[int, Ints], tags: list[str]) -> LineChart:
    x = [float(layer) for layer in loads]
    lines = [Series("all tokens", x, [effective(load) for load in loads.values()])]
    for place, tag in enumerate(tags[:5] if len(tags) > 1 else []):
        y = [effective(trace.load(layer, tag).numpy()) for layer in loads]
        lines.append(Series(tag, x, y, style=place + 1))
    sizes = {len(load) for load in loads.values()}
    unit = f"of {' or '.join(map(str, sorted(sizes)))}"
    marks = [(float(size), "even load") for size in sizes] if len(sizes) == 1 else []
    return LineChart(
        "entropy", "Effective experts", "layer", unit, lines, dots=True, zero=True, marks=marks,
        label="Line chart of the number of effectively used experts by layer, for all tokens and for each label.",
    )  # fmt: skip


def _busiest(load_E: Ints) -> Ints:
    """The experts a matrix shows: all, or the busiest ones in the order of their ids."""
    order = np.argsort(-load_E, kind="stable")[:MAX_SIDE]
    return np.sort(order)


def _matrix(
    name: str, counts: Ints, rule: str, rows: Ints, columns: Ints, names: tuple[str, str], label: str
) -> HeatMap:
    chosen = counts[np.ix_(rows, columns)]
    return HeatMap(
        name, chosen, rule, [str(i) for i in rows], [str(i) for i in columns], *names, "tokens", label, square=True
    )  # fmt: skip


def _fit(items: list[Any], cells: int) -> tuple[list[Any], str]:
    """As many items, evenly spread, as the page may carry."""
    room = max(1, BUDGET // max(cells, 1))
    if len(items) <= room:
        return items, ""
    places = np.unique(np.linspace(0, len(items) - 1, room).round().astype(int))
    return [items[i] for i in places], f"{len(places)} of {len(items)} are on this page, evenly spread"


def _note(load_E: Ints, left_out: str) -> str:
    busy = f"the {MAX_SIDE} busiest of {len(load_E)} experts" if len(load_E) > MAX_SIDE else ""
    return "; ".join(part for part in (busy, left_out) if part)


def _pairs(trace: RoutingTrace, loads: dict[int, Ints]) -> Matrices | None:
    """Co-activation of every layer; None where no token has two experts."""
    side = min(MAX_SIDE, max(len(load) for load in loads.values()))
    layers, left_out = _fit(list(loads), side * side)
    maps = []
    for layer, counts in zip(layers, trace.pair_counts([(layer, layer) for layer in layers]), strict=True):
        counts_EE = counts.numpy()
        if counts_EE.sum() == np.trace(counts_EE):
            continue
        rows = _busiest(loads[layer])
        label = f"Matrix of the tokens that use two experts of layer {layer} together."
        heat = _matrix("pairs", counts_EE, "pair", rows, rows, ("expert", "with expert"), label)
        maps.append((str(layer), f"layer {layer}", heat, information(_off_diagonal(heat.counts))))
    return _chooser("pairs", maps, _note(next(iter(loads.values())), left_out))


def _off_diagonal(counts_EE: Ints) -> Ints:
    return counts_EE - np.diag(np.diag(counts_EE))


def _affinity(trace: RoutingTrace, loads: dict[int, Ints]) -> tuple[Matrices | None, LineChart | None]:
    """Transitions between consecutive routed layers."""
    order = list(loads)
    hops = list(itertools.pairwise(order))
    if not hops:
        return None, None
    side = min(MAX_SIDE, max(len(load) for load in loads.values()))
    shown, left_out = _fit(hops, side * side)
    maps, bits = [], []
    for (a, b), counts in zip(hops, trace.pair_counts(hops), strict=True):
        counts_EE = counts.numpy()
        bits.append(information(counts_EE))
        if (a, b) in shown and counts_EE.sum():
            label = f"Matrix of the tokens that use an expert of layer {a} and then an expert of layer {b}."
            names = (f"layer {a} expert", f"layer {b} expert")
            heat = _matrix("affinity", counts_EE, "transition", _busiest(loads[a]), _busiest(loads[b]), names, label)
            maps.append((f"{a}-{b}", f"layer {a} → {b}", heat, bits[-1]))
    chart = LineChart(
        "hops", "What a layer's expert tells about the next", "from layer", "bits",
        [Series("this layer and the next", [float(a) for a, _ in hops], bits)], dots=True, zero=True,
        label="Line chart of the mutual information of the experts of consecutive layers, in bits.",
    )  # fmt: skip
    return _chooser("affinity", maps, _note(loads[order[0]], left_out)), chart if len(hops) > 1 else None


def _chooser(name: str, maps: list[tuple[str, str, HeatMap, float]], note: str) -> Matrices | None:
    """The map with most structure is drawn; the script draws the others when chosen."""
    if not maps:
        return None
    best = max(maps, key=lambda item: item[3])
    best[2].name = name
    return Matrices(
        name=name,
        shown=best[2],
        choices=[(value, text) for value, text, _, _ in maps],
        data={"first": best[0], "maps": {value: heat.data() for value, _, heat, _ in maps}},
        note=note,
    )
