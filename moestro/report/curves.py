"""Training curves from a run's metrics: one JSON object a step."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moestro.core.errors import DataError
from moestro.report.plots import LineChart, Series


Row = Mapping[str, Any]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` (or of the one in a run's folder); a last line cut short by a kill is left out.

    Raises:
        DataError: missing, empty, or a line that is no JSON object with a ``step``.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise DataError(f"{path}: {reason}; expected JSON lines of a training run") from None
    rows = []
    for place, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no step")
        except (ValueError, RecursionError):
            if place == len(lines) and rows:
                break
            raise DataError(f"{path}: line {place} is no JSON object with a whole number `step`") from None
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no line in it; the run has not made a step")
    return rows


def curves(rows: Sequence[Row]) -> list[LineChart]:
    """The charts of a run, those whose numbers are there."""
    steps = [row for row in rows if "loss" in row]
    charts = [
        _loss(rows, steps),
        _chart("losses", "Parts of the loss", "weighted as in the run", _parts(steps)),
        _chart("evenness", "Load entropy", "1 is even, 0 one expert", _router(steps, "load_entropy", "entropy")),
        _chart("violation", "Highest load over the mean, less 1", "0 is even", _router(steps, "max_violation")),
        _chart("idle", "Idle experts", "of all layers", _idle(steps), zero=True),
        _chart("certainty", "Entropy of the router's softmax", "nats a token", _router(steps, "token_entropy")),
        _chart("grad", "Gradient norm", "before clipping", [_line(steps, "grad_norm")], zero=True),
        _chart("lr", "Learning rate", "", [_line(steps, "lr")], zero=True),
        _chart("speed", "Speed", "tokens a second", [_speed(steps)], zero=True),
    ]
    return [chart for chart in charts if chart is not None and chart.series]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _chart(name: str, title: str, y_name: str, series: Iterable[Series], *, zero: bool = False) -> LineChart | None:
    chart = LineChart(f"run-{name}", title, "step", y_name, list(series), zero=zero)
    chart.label = f"Line chart of {title.lower()} over the steps of the run."
    return chart if chart.series else None


def _line(rows: Sequence[Row], key: str, name: str = "", style: int = 0) -> Series:
    return _series(rows, lambda row: _number(row.get(key)), name or key, style)


def _series(rows: Sequence[Row], read: Callable[[Row], float], name: str, style: int = 0) -> Series:
    points = [(float(row["step"]), read(row)) for row in rows]
    return Series(name, [x for x, _ in points], [y for _, y in points], style)


def _loss(rows: Sequence[Row], steps: Sequence[Row]) -> LineChart | None:
    raw = _line(steps, "loss", "training")
    lines = [raw]
    if len(raw.x) >= 60:
        lines = [Series("each step", raw.x, raw.y, 0, faint=True), Series("training, smoothed", raw.x, smooth(raw.y))]
    held = [row for row in rows if isinstance(row.get("heldout"), Mapping)]
    names = list(dict.fromkeys(name for row in held for name in row["heldout"]))
    for style, name in enumerate(names[:4], 1):
        text = "held out" if len(names) == 1 else f"held out: {name}"
        lines.append(_series(held, lambda row, name=name: _number(row["heldout"].get(name)), text, style))
    return _chart("loss", "Loss", "nats a target", lines)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean with a half-life of 2 % of the values, its start unbiased; gaps stay gaps."""
    keep = 0.5 ** (1 / max(1.0, 0.02 * len(values)))
    total = weight = 0.0
    out = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight if weight and math.isfinite(value) else math.nan)
    return out


def _parts(rows: Sequence[Row]) -> list[Series]:
    """The named losses, if there is more than one."""
    parts = [(row, row.get("losses") or row.get("terms") or {}) for row in rows]
    names = list(dict.fromkeys(name for _, part in parts for name in part))
    if len(names) < 2:
        return []
    lines = []
    for style, name in enumerate(names[:6]):
        x, y = zip(*((float(row["step"]), _number(part.get(name))) for row, part in parts), strict=True)
        lines.append(Series(name, list(x), list(y), style))
    return lines


def _router(rows: Sequence[Row], *keys: str) -> list[Series]:
    """A router figure over the layers: lowest, mean, highest."""
    points = []
    for row in rows:
        values = [_first(layer, keys) for layer in row.get("router", {}).values()]
        known = [value for value in values if math.isfinite(value)]
        if known:
            points.append((float(row["step"]), min(known), sum(known) / len(known), max(known), len(known)))
    if not points:
        return []
    x, low, mean, high, counts = (list(column) for column in zip(*points, strict=True))
    line = Series("mean of the layers", x, mean)
    if max(counts) > 1:
        line.low, line.high = low, high
    return [line]


def _first(layer: Row, keys: Sequence[str]) -> float:
    return next((_number(layer[key]) for key in keys if key in layer), math.nan)


def _idle(rows: Sequence[Row]) -> list[Series]:
    found = [row for row in rows if row.get("router")]
    return [_series(found, _dead, "idle experts")] if found else []


def _dead(row: Row) -> float:
    counts = [layer.get("dead", 0) for layer in row["router"].values()]
    return float(sum(len(count) if isinstance(count, list) else _number(count) for count in counts))


def _speed(rows: Sequence[Row]) -> Series:
    """From ``tokens_per_second``, or from the tokens and seconds of neighbouring rows."""
    if any("tokens_per_second" in row for row in rows):
        return _line(rows, "tokens_per_second", "tokens a second")
    x, y = [], []
    for before, row in itertools.pairwise(rows):
        gained, seconds = _number(row.get("tokens")) - _number(before.get("tokens")), _number(row.get("seconds"))
        x.append(float(row["step"]))
        y.append(gained / seconds if seconds > 0 else math.nan)
    return Series("tokens a second", x, y)
