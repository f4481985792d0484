"""Heat maps and line charts as HTML: text in HTML at its own size, shapes in an SVG that stretches with the page."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moestro.report.scale import NOTHING, Floats, Ints, pair_factors, ratio, steps
from moestro.report.text import number


_MAX_LABELS: Final = 9
_SMALL: Final = 72  # with more rows or columns, cells get neither strokes nor lines between them
_POINTS: Final = 360


@dataclass(frozen=True)
class Tick:
    """A label of an axis: where (percent of the axis) and what."""

    at: float
    text: str


@dataclass
class HeatMap:
    """Counts drawn as steps of the page's scale.

    Attributes:
        name: id on the page. counts: int64 [R, C]. rule: key of ``scale.RULES``. rows, columns: labels.
        row_name, column_name: what a row and a column is, singular. unit: what is counted, plural.
        label: one sentence for those who cannot see it. square: cells as wide as high, for matrices.
        expected: the counts a "share" is taken of. sizes: cells of each row that exist, where rows differ.
    """

    name: str
    counts: Ints
    rule: str
    rows: list[str]
    columns: list[str]
    row_name: str
    column_name: str
    unit: str
    label: str
    square: bool = False
    expected: Ints | None = None
    sizes: list[int] | None = None

    @property
    def ratio(self) -> Floats:
        """Count over expectation, NaN where there is none; [R, C]."""
        if self.sizes is None:
            return ratio(self.rule, self.counts, self.expected)
        found = np.full(self.counts.shape, np.nan)
        for row, size in enumerate(self.sizes):
            whole = None if self.expected is None else self.expected[row : row + 1, :size]
            found[row, :size] = ratio(self.rule, self.counts[row : row + 1, :size], whole)
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        return len(self.rows), len(self.columns)

    @property
    def height(self) -> int:
        """Height in pixels of a map that is not square."""
        return int(min(560, max(28, len(self.rows) * (18 if len(self.rows) <= 20 else 12))))

    @property
    def side(self) -> float:
        """Width of a square map in rem: small matrices stay small."""
        return min(36.0, max(17.0, 2.2 * len(self.columns)))

    @property
    def paths(self) -> list[tuple[str, str]]:
        """(class, path) of each step that occurs; runs of equal cells in a row are one rectangle."""
        step_RC = steps(self.ratio)
        parts: dict[int, list[str]] = {}
        for row, step_C in enumerate(step_RC):
            starts = np.flatnonzero(np.diff(step_C, prepend=step_C[0] - 1))
            for start, stop in zip(starts, [*starts[1:], len(step_C)], strict=True):
                parts.setdefault(int(step_C[start]), []).append(f"M{start} {row}h{stop - start}v1H{start}z")
        return [("z" if step == NOTHING else f"b{step}", "".join(parts[step])) for step in sorted(parts) if step >= 0]

    @property
    def strokes(self) -> str:
        """A path of one stroke across each cell that counts nothing; empty where cells are too small for it."""
        if max(self.shape) > _SMALL:
            return ""
        return "".join(f"M{c} {r + 1}l1-1" for r, c in np.argwhere(steps(self.ratio) == NOTHING).tolist())

    @property
    def lines(self) -> str:
        """A path of lines between cells, empty where cells are too small for them."""
        rows, columns = self.shape
        if max(rows, columns) > _SMALL:
            return ""
        across = "".join(f"M0 {row}H{columns}" for row in range(1, rows))
        return across + "".join(f"M{column} 0V{rows}" for column in range(1, columns))

    @property
    def x_ticks(self) -> list[Tick]:
        """Labels of columns, few enough for a phone."""
        return _centred(self.columns, _MAX_LABELS)

    @property
    def y_ticks(self) -> list[Tick]:
        """Labels of rows."""
        return _centred(self.rows, 16 if self.square else 48)

    def data(self) -> dict[str, Any]:
        """What the page's script needs to answer for each cell."""
        data = {
            "rows": self.rows,
            "columns": self.columns,
            "rule": self.rule,
            "names": [self.row_name, self.column_name, self.unit],
            "counts": pack(self.counts),
        }
        if self.expected is not None:
            data["expected"] = pack(self.expected)
        if self.sizes is not None:
            data["sizes"] = self.sizes
        if self.rule == "pair":
            data["factors"] = pair_factors(self.counts).tolist()
        return data


def pack(counts: NDArray[Any]) -> dict[str, Any]:
    """Whole numbers as base64 of the smallest unsigned type, little-endian."""
    high = int(counts.max()) if counts.size else 0
    bits = 8 if high < 1 << 8 else 16 if high < 1 << 16 else 32
    if high >= 1 << 32:  # the script has no 64-bit arrays everywhere: scale down, and say so
        return {"bits": 32, "scale": float(high) / 0xFFFFFFFF, "data": _b64(counts * (0xFFFFFFFF / high), "<u4")}
    return {"bits": bits, "scale": 1, "data": _b64(counts, f"<u{bits // 8}")}


def _b64(values: NDArray[Any], kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values.astype(kind)).tobytes()).decode("ascii")


def _centred(labels: Sequence[str], most: int) -> list[Tick]:
    every = max(1, math.ceil(len(labels) / most))
    if every > 1:
        every = next(step for step in (2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 64, 100, 128, 10**9) if step >= every)
    return [Tick(100 * (i + 0.5) / len(labels), labels[i]) for i in range(0, len(labels), every)]


@dataclass
class Series:
    """A line.

    Attributes:
        style: number of its colour and dash. faint: drawn behind, for raw values under a smooth line.
        low, high: a band around the line, as long as it, or empty.
    """

    name: str
    x: list[float]
    y: list[float]
    style: int = 0
    faint: bool = False
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass
class LineChart:
    """Lines over a common axis.

    Attributes:
        name: id on the page. title: heading. x_name: what the axis counts. y_name: unit of the values.
        dots: mark each point, for few points. marks: horizontal lines, (value, text). zero: let the axis begin at 0.
    """

    name: str
    title: str
    x_name: str
    y_name: str
    series: list[Series]
    label: str = ""
    dots: bool = False
    marks: list[tuple[float, str]] = field(default_factory=list)
    zero: bool = False
    log: bool = False

    def __post_init__(self) -> None:
        self.series = [_thin(line) for line in self.series if any(map(math.isfinite, line.y))]
        xs = [x for line in self.series for x in line.x]
        ys = [y for line in self.series for y in (*line.y, *line.low, *line.high) if math.isfinite(y)]
        ys += [value for value, _ in self.marks]
        if self.zero:
            ys.append(0.0)
        self.x_range = _widen(min(xs, default=0.0), max(xs, default=1.0))
        self.y_steps = nice(*_widen(min(ys, default=0.0), max(ys, default=1.0)))
        self.y_range = (self.y_steps[0], self.y_steps[-1])

    @property
    def paths(self) -> list[tuple[Series, str, str]]:
        """(series, line path, path of dots) in a box of 1000 by 1000."""
        drawn = []
        for line in sorted(self.series, key=lambda one: not one.faint):
            points = [self._place(x, y) for x, y in zip(line.x, line.y, strict=True)]
            drawn.append((line, _polyline(points), _dots(points) if self.dots else ""))
        return drawn

    @property
    def bands(self) -> list[tuple[Series, str]]:
        """(series, area between its low and high)."""
        drawn = []
        for line in self.series:
            if line.low:
                there = [self._place(x, y) for x, y in zip(line.x, line.high, strict=True)]
                back = [self._place(x, y) for x, y in zip(line.x, line.low, strict=True)][::-1]
                drawn.append((line, "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in there + back) + "Z"))
        return drawn

    @property
    def rules(self) -> list[tuple[float, str]]:
        """Marks as (percent from the top, text)."""
        return [(self._place(0, value)[1] / 10, text) for value, text in self.marks]

    @property
    def x_ticks(self) -> list[Tick]:
        """Labels under the axis."""
        low, high = self.x_range
        whole = [step for step in nice(low, high, 5, whole=True) if low <= step <= high]
        return [Tick(self._place(step, 0)[0] / 10, number(step)) for step in whole]

    @property
    def y_ticks(self) -> list[Tick]:
        """Labels left of it."""
        return [Tick(self._place(0, step)[1] / 10, number(step)) for step in self.y_steps]

    @property
    def grid(self) -> str:
        """Lines at the labels."""
        return "".join(f"M0 {10 * tick.at:.1f}H1000" for tick in self.y_ticks)

    def _place(self, x: float, y: float) -> tuple[float, float]:
        (left, right), (low, high) = self.x_range, self.y_range
        return 1000 * (x - left) / (right - left), 1000 * (high - y) / (high - low)

    def data(self) -> dict[str, Any]:
        """What the page's script needs for its reading line."""
        lines = [line for line in self.series if not line.faint]
        return {
            "x": self.x_range,
            "y": self.y_range,
            "names": [self.x_name, self.y_name],
            "series": [
                {
                    "name": line.name,
                    "x": line.x,
                    "y": [y if math.isfinite(y) else None for y in line.y],
                    "low": line.low,
                    "high": line.high,
                }
                for line in lines
            ],
        }


def _polyline(points: Sequence[tuple[float, float]]) -> str:
    path, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            path.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        else:
            pen = "M"  # a gap where the value is not a number
    return "".join(path)


def _dots(points: Sequence[tuple[float, float]]) -> str:
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points if math.isfinite(y))


def _thin(line: Series) -> Series:
    """At most some hundred points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(line.x) <= _POINTS or line.low:
        return line
    keep: list[int] = [0]
    y = np.asarray(line.y, dtype=np.float64)
    for part in np.array_split(np.arange(1, len(y) - 1), _POINTS // 2):
        finite = part[np.isfinite(y[part])]
        chosen = finite if finite.size else part[:1]
        keep += sorted({int(chosen[np.argmin(y[chosen])]), int(chosen[np.argmax(y[chosen])])})
    keep.append(len(y) - 1)
    return Series(line.name, [line.x[i] for i in keep], [line.y[i] for i in keep], line.style, line.faint)


def _widen(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return low, high
    pad = abs(low) * 0.05 or 1.0
    return low - pad, high + pad


def nice(low: float, high: float, count: int = 4, *, whole: bool = False) -> list[float]:
    """Round values around a range: about ``count``, the first at or below ``low``, the last at or above ``high``.

    Args:
        whole: whole numbers only, for axes that count.
    """
    rough = max((high - low) / count, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(power * factor for factor in factors if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, max(last, first + 1) + 1)]
