"""One figure per study: every arm's seeds as points, the mean and its interval, one panel per metric of a claim."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any


__all__ = ["draw"]

COLOURS = {"method": "#1b6ca8", "control": "#b3541e", "reference": "#6b6b6b"}
MAX_PANELS = 4
LABEL = 38  # characters that fit under a panel


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Write `path` (SVG; the same record gives the same bytes)."""
    import matplotlib

    # No display and no dates or random ids in the file, so that a figure changes only when its numbers do.
    with matplotlib.rc_context({"svg.hashsalt": "moestro", "svg.fonttype": "path", "font.size": 9}):
        from matplotlib.figure import Figure

        metrics = list(dict.fromkeys(claim["metric"] for claim in record["claims"]))[:MAX_PANELS]
        arms = record["arms"]
        figure = Figure(figsize=(1.2 + 3.0 * len(metrics), 1.3 + 0.38 * len(arms)), layout="constrained")
        for number, metric in enumerate(metrics):
            axes = figure.add_subplot(1, len(metrics), number + 1)
            _panel(axes, record, metric)
            axes.set_yticks(range(len(arms)), [arm["name"] for arm in arms] if number == 0 else [""] * len(arms))
            axes.set_ylim(len(arms) - 0.5, -0.5)
        figure.suptitle(f"{record['title']} ({record['verdict'].replace('_', ' ')}, {len(record['seeds'])} seeds)")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(axes: Any, record: Mapping[str, Any], metric: str) -> None:
    for row, arm in enumerate(record["arms"]):
        found = record["measured"][arm["name"]].get(metric)
        if found is None:
            continue
        colour = COLOURS[arm["role"]]
        values = list(found["seeds"].values())
        axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.45, markersize=4)
        if found["interval"] is not None:
            axes.plot(found["interval"], [row, row], "-", color=colour, linewidth=2)
        axes.plot([found["mean"]], [row], "D", color=colour, markersize=5)
    unit = record["units"].get(metric)
    axes.set_xlabel(textwrap.fill(f"{metric} ({unit})" if unit else metric, LABEL))
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
