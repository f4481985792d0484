"""Figures for studies: arms with seeds and spread, curves with bands, thresholds. The same data gives the same bytes.

figure, (axes,) = figures.new(1)
figures.arms(axes, {"dense": [3.1, 3.0], "mixture": [2.9, 2.8]}, threshold=3.0, unit="nats")
figures.save(figure, "results/upcycling.svg")
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from moestro.core.errors import ConfigError, DataError


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Final = ("#0072b2", "#c2500a", "#00825f", "#a8588b", "#a87500", "#3f8fbf", "#59646c")
DASHES: Final = ("-", (0, (5, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2)), (0, (3, 2)), (0, (8, 3)), "-")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
_STYLE: Final = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.5, "axes.titlesize": 10.5,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#59646c", "axes.labelcolor": "#1c2226", "xtick.color": "#59646c", "ytick.color": "#59646c",
    "axes.axisbelow": True, "grid.color": "#e2e4df", "grid.linewidth": 0.8, "legend.frameon": False,
    "legend.fontsize": 9, "lines.linewidth": 1.8, "svg.hashsalt": "moestro", "svg.fonttype": "path",
    "figure.facecolor": "white", "savefig.facecolor": "white", "path.simplify": False,
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for these figures, whatever the user's own are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]
        yield


def new(
    panels: int = 1, *, width: float = 4.6, height: float = 3.0, columns: int | None = None
) -> "tuple[Figure, list[Axes]]":
    """A figure with panels, each ``width`` by ``height`` inches, side by side or at most ``columns`` in a row."""
    if panels < 1:
        raise ConfigError(f"panels={panels}; a figure needs at least 1")
    across = min(panels, columns or panels)
    rows = -(-panels // across)
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width * across, height * rows), layout="constrained")
        return figure, [figure.add_subplot(rows, across, place + 1) for place in range(panels)]


def arms(
    axes: "Axes",
    values: Mapping[str, Sequence[float]],
    *,
    threshold: float | None = None,
    threshold_text: str = "threshold",
    unit: str = "",
    title: str = "",
) -> None:
    """One row an arm: every seed as a small dot, the mean as a diamond, a line from the lowest to the highest.

    Args:
        values: arm -> one number a seed, first arm on top.
        threshold: a vertical line, named ``threshold_text``.

    Raises:
        DataError: an arm without a finite number.
    """
    with style():
        for row, (arm, numbers) in enumerate(values.items()):
            seeds = np.asarray(numbers, dtype=np.float64)
            if not seeds.size or not np.isfinite(seeds).all():
                raise DataError(f"arm {arm!r} holds {seeds.size} numbers, not all of them finite; nothing to draw")
            colour = COLOURS[row % len(COLOURS)]
            axes.plot([seeds.min(), seeds.max()], [row, row], color=colour, linewidth=1.4, zorder=2)
            axes.plot(seeds, np.full(seeds.size, row), "o", color=colour, markersize=4, alpha=0.5, zorder=3)
            axes.plot([seeds.mean()], [row], "D", color=colour, markersize=6.5, zorder=4)
        if threshold is not None:
            _threshold(axes, threshold, threshold_text, vertical=True)
        axes.set_yticks(range(len(values)), list(values), color="#1c2226")
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.grid(True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(unit)
        axes.set_title(title)


def curves(
    axes: "Axes",
    runs: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]],
    *,
    threshold: float | None = None,
    threshold_text: str = "threshold",
    x_name: str = "step",
    y_name: str = "",
    title: str = "",
    log: bool = False,
    first: int = 0,
) -> None:
    """One line an arm: the mean over seeds, with a band from the lowest to the highest seed.

    Args:
        runs: arm -> (x [n], one list of y [n] a seed). threshold: a horizontal line, named ``threshold_text``.
        log: logarithmic y axis. first: how many colours the panel has used already.

    Raises:
        DataError: lists of different lengths.
    """
    with style():
        for place, (arm, (x, seeds)) in enumerate(runs.items(), first):
            lengths = {len(x), *map(len, seeds)}
            if len(lengths) != 1 or not seeds:
                raise DataError(
                    f"arm {arm!r}: x and its {len(seeds)} seeds have {sorted(lengths)} points; need the same"
                )
            y = np.asarray(seeds, dtype=np.float64)
            colour = COLOURS[place % len(COLOURS)]
            dash: Any = DASHES[place % len(DASHES)]
            if len(y) > 1:
                axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, y.mean(0), color=colour, linestyle=dash, label=arm)
        if threshold is not None:
            _threshold(axes, threshold, threshold_text, vertical=False)
        if log:
            axes.set_yscale("log")
        axes.grid(True, axis="y")
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        axes.set_title(title)
        if len(runs) > 1:
            axes.legend(loc="best")


def points(
    axes: "Axes",
    groups: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_name: str,
    y_name: str,
    title: str = "",
    first: int = 0,
) -> None:
    """A scatter of several groups, each with its own colour and mark: name -> (x [n], y [n]).

    Args:
        first: how many colours the panel has used already.
    """
    with style():
        for place, (name, (x, y)) in enumerate(groups.items(), first):
            if len(x) != len(y):
                raise DataError(f"group {name!r}: {len(x)} values of x and {len(y)} of y; need the same")
            colour, mark = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            axes.plot(x, y, mark, color=colour, markersize=5.5, alpha=0.85, label=name)
        axes.grid(True, axis="both")
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        axes.set_title(title)
        if first + len(groups) > 1:
            axes.legend(loc="best")


def save(figure: "Figure", path: str | Path) -> Path:
    """Write ``path`` (.svg or .png) in one step; no date, no random id, no metadata that changes.

    Raises:
        ConfigError: another ending. DataError: the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in ("svg", "png"):
        raise ConfigError(f"{path}: figures are written as .svg or .png")
    metadata: dict[str, Any] = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            with style():
                figure.savefig(name, format=kind, dpi=160, metadata=metadata)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; the figure was not written") from None
    return path


def _threshold(axes: "Axes", value: float, text: str, *, vertical: bool) -> None:
    line = axes.axvline if vertical else axes.axhline
    line(value, color="#1c2226", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    if vertical:
        axes.annotate(text, (value, 1), xycoords=("data", "axes fraction"), xytext=(3, -2),
                      textcoords="offset points", va="top", fontsize=8.5, color="#59646c")  # fmt: skip
    else:
        axes.annotate(text, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 3),
                      textcoords="offset points", ha="right", fontsize=8.5, color="#59646c")  # fmt: skip
