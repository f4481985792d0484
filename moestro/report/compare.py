"""Runs and studies side by side: a table, its figures as JSON, and loss drawn against what it took."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moestro.models.sizing_units import show_count
from moestro.report import figures
from moestro.report.results import Entry, Point, Seed
from moestro.report.text import number


Cost = Callable[[Point], float]
HEIGHT, ROW = 3.2, 0.26  # inches: of a panel at least, and of an entry's row
OPERATIONS = "operations of training"
LONGEST, FEW = 34, 6  # letters of a name in a figure; entries that still fit a legend


def equal(entries: Sequence[Entry], cost: Cost) -> tuple[float, dict[str, list[float]]]:
    """The largest cost that every curve reaches, and each entry's loss there by seed, from a line between its points.

    Returns:
        NaN and nothing where fewer than two entries have a curve of this cost. A curve that only begins later than the
        cost gives NaN.
    """
    curves = {entry.name: [_line(seed, cost) for seed in entry.seeds] for entry in entries}
    curves = {name: lines for name, lines in curves.items() if all(len(x) for x, _ in lines)}
    if len(curves) < 2:
        return math.nan, {}
    at = min(x[-1] for lines in curves.values() for x, _ in lines)
    return at, {
        name: [float(np.interp(at, x, y)) if at >= x[0] else math.nan for x, y in lines]
        for name, lines in curves.items()
    }


def _line(seed: Seed, cost: Cost) -> tuple[list[float], list[float]]:
    """Costs and losses of a curve, those that are known."""
    points = [(cost(point), point.loss) for point in seed.curve if math.isfinite(cost(point))]
    return [x for x, _ in points], [y for _, y in points]


def flops(point: Point) -> float:
    """Operations up to a point."""
    return point.flops


def seconds(point: Point) -> float:
    """Wall time up to a point."""
    return point.seconds


def summary(entries: Sequence[Entry]) -> dict[str, Any]:
    """Everything that is printed and drawn, as JSON values."""
    at_flops, by_flops = equal(entries, flops)
    at_seconds, by_seconds = equal(entries, seconds)
    return {
        "notes": notes(entries),
        "equal_flops": _or_none(at_flops),
        "equal_seconds": _or_none(at_seconds),
        "entries": [
            {
                "name": entry.name,
                "source": entry.source,
                "kind": entry.kind,
                "loss": entry.mean,
                "std": entry.std,
                "loss_at_equal_flops": _mean(by_flops.get(entry.name, [])),
                "loss_at_equal_seconds": _mean(by_seconds.get(entry.name, [])),
                "flops": _mean([seed.flops for seed in entry.seeds]),
                "seconds": _mean([seed.seconds for seed in entry.seeds]),
                "parameters": _mean([seed.parameters for seed in entry.seeds]),
                "active": _mean([seed.active for seed in entry.seeds]),
                "seeds": [_seed(seed) for seed in entry.seeds],
            }
            for entry in entries
        ],
    }


def notes(entries: Sequence[Entry]) -> list[str]:
    """What keeps losses from being compared though nothing is wrong with them, a line each."""
    kinds = list(dict.fromkeys(entry.kind for entry in entries))
    said = []
    if len(kinds) > 1:
        said.append(f"losses of {len(kinds)} kinds ({', '.join(kinds)}): compare within a kind only")
    elif len({entry.data for entry in entries}) > 1:
        said.append("studies have data and tokenizers of their own: compare losses within a study only")
    return said


def _seed(seed: Seed) -> dict[str, Any]:
    return {
        "seed": seed.seed,
        "loss": seed.loss,
        "flops": _or_none(seed.flops),
        "seconds": _or_none(seed.seconds),
        "curve": [[p.step, p.loss, _or_none(p.flops), _or_none(p.seconds)] for p in seed.curve],
    }


def _or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, None if a value is missing."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows of what ``summary`` gives. Columns in which nothing is known are left out."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "": lambda row: str(row["name"]),
        "seeds": lambda row: str(len(row["seeds"])),
        "loss": lambda row: f"{row['loss']:.4f}" + (f" ± {row['std']:.4f}" if row["std"] is not None else ""),
        f"loss at {_count(found['equal_flops'])}FLOP": lambda row: _loss(row["loss_at_equal_flops"]),
        f"loss at {_number(found['equal_seconds'])} s": lambda row: _loss(row["loss_at_equal_seconds"]),
        "FLOP": lambda row: _count(row["flops"]),
        "seconds": lambda row: _number(row["seconds"]),
        "parameters": lambda row: _count(row["parameters"]),
        "active": lambda row: _count(row["active"]),
        "which loss": lambda row: str(row["kind"]),
    }
    rows = [[read(row).strip() for read in columns.values()] for row in found["entries"]]
    kept = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    head = list(columns)
    return [[line[place] for place in kept] for line in [head, *rows]]


def _count(value: float | None) -> str:
    return "" if value is None else f"{show_count(value)} "


def _number(value: float | None) -> str:
    return "" if value is None else number(round(value, 2))


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def draw(entries: Sequence[Entry], path: str | Path) -> Path:
    """Draw the loss of every entry, and against operations, wall time and parameters where they are known.

    Seeds are dots, or a band from the lowest to the highest around their mean. An entry has one colour in all panels.

    Raises:
        ConfigError: an ending other than .svg and .png. DataError: the file cannot be written.
    """
    panels: list[Callable[[Any], None]] = [lambda axes: _final(axes, entries)]
    for cost, name in ((flops, OPERATIONS), (seconds, "seconds of training")):
        lines = {entry.name: band for entry in entries if (band := _band(entry, cost)) is not None}
        rest = [entry for entry in entries if entry.name not in lines]
        dots = _dots(rest, lambda seed, c=cost.__name__: getattr(seed, c))  # type: ignore[misc]
        if lines or dots:
            panels.append(lambda axes, r=lines, d=dots, n=name: _against(axes, entries, r, d, n))  # type: ignore[misc]
    dots = _dots(entries, lambda seed: math.nan if seed.parameters is None else seed.parameters)
    if dots:
        panels.append(lambda axes: _against(axes, entries, {}, dots, "parameters"))
    tall = max(HEIGHT, 0.6 + ROW * len(entries))
    figure, all_axes = figures.new(len(panels), width=5.2, height=tall, columns=2)
    for draw_panel, axes in zip(panels, all_axes, strict=True):
        draw_panel(axes)
    return figures.save(figure, path)


def _final(axes: Any, entries: Sequence[Entry]) -> None:
    values = {_short(entry.name): [seed.loss for seed in entry.seeds] for entry in entries}
    figures.arms(axes, values, unit=_kinds(entries), title="Loss at the end")


def _short(name: str) -> str:
    """A name that leaves room for the panel."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}\u2026{name[-(LONGEST // 2 - 1) :]}"


def _kinds(entries: Sequence[Entry]) -> str:
    kinds = list(dict.fromkeys(entry.kind for entry in entries))
    return f"loss: {kinds[0]}" if len(kinds) == 1 else "loss, of several kinds"


def _against(axes: Any, entries: Sequence[Entry], lines: Mapping[str, Any], dots: Mapping[str, Any], name: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    names = {"x_name": name, "y_name": _kinds(entries), "title": f"Loss against {name}"}
    for place, entry in enumerate(entries):
        if entry.name in lines:
            figures.curves(axes, {_short(entry.name): lines[entry.name]}, first=place, **names)
        elif entry.name in dots:
            figures.points(axes, {_short(entry.name): dots[entry.name]}, first=place, **names)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axes.get_legend() is not None:
        axes.get_legend().remove()  # drawn by one entry's call; colours are told by the first panel
    if len(lines) in range(2, FEW + 1) and name == OPERATIONS:
        with figures.style():
            axes.legend(loc="best")


def _band(entry: Entry, cost: Cost) -> tuple[list[float], list[list[float]]] | None:
    """Mean cost and every seed's loss at the steps that all seeds have; None for fewer than two."""
    curves = [{p.step: p for p in seed.curve if math.isfinite(cost(p))} for seed in entry.seeds]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if len(steps) < 2:
        return None
    x = [sum(cost(curve[step]) for curve in curves) / len(curves) for step in steps]
    return x, [[curve[step].loss for step in steps] for curve in curves]


def _dots(entries: Sequence[Entry], cost: Callable[[Seed], float]) -> dict[str, tuple[list[float], list[float]]]:
    """Cost and loss of the seeds of every entry whose cost is known."""
    found = {entry.name: ([cost(s) for s in entry.seeds], [s.loss for s in entry.seeds]) for entry in entries}
    return {name: (x, y) for name, (x, y) in found.items() if all(map(math.isfinite, x))}
