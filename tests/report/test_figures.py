"""Figures of studies: what is drawn is what was measured, and the same data gives the same bytes."""

import numpy as np
import pytest

from moestro.core.errors import ConfigError, DataError
from moestro.report import figures


ARMS = {"dense, trained on": [3.10, 3.05, 3.12], "mixture": [2.90, 2.86, 2.95], "one seed": [3.0]}
RUNS = {
    "bias": ([1, 2, 3], [[3.0, 2.0, 1.5], [3.2, 2.2, 1.7]]),
    "balance loss": ([1, 2, 3], [[3.0, 2.6, 2.5]]),
}


def draw():
    figure, (left, right) = figures.new(2)
    figures.arms(left, ARMS, threshold=3.0, threshold_text="claim", unit="nats", title="Held-out loss")
    figures.curves(right, RUNS, threshold=2.0, y_name="violation", title="Balance")
    return figure, left, right


def test_the_drawing_holds_the_numbers():
    _, left, right = draw()
    drawn = [sorted(np.asarray(line.get_xdata()).tolist()) for line in left.lines]
    for row, values in enumerate(ARMS.values()):
        spread, seeds, mean = drawn[3 * row : 3 * row + 3]
        assert spread == [min(values), max(values)]
        assert seeds == sorted(values)
        assert mean == [pytest.approx(sum(values) / len(values))]
    assert drawn[9] == [3.0, 3.0]
    assert [label.get_text() for label in left.get_yticklabels()] == list(ARMS)
    assert np.asarray(right.lines[0].get_ydata()).tolist() == pytest.approx([3.1, 2.1, 1.6])
    band = right.collections[0].get_paths()[0].vertices
    assert {(x, y) for x, y in band.tolist()} >= {(1, 3.0), (1, 3.2), (3, 1.5), (3, 1.7)}
    assert len(right.collections) == 1, "one seed has no band"


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_same_data_gives_the_same_bytes(kind, tmp_path):
    import matplotlib

    first = figures.save(draw()[0], tmp_path / f"a.{kind}").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": None}):
        second = figures.save(draw()[0], tmp_path / f"b.{kind}").read_bytes()
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{kind}", f"b.{kind}"]


def test_scatter_groups_differ_in_mark_and_colour():
    _, (axes,) = figures.new()
    figures.points(axes, {"a": ([1, 2], [3, 4]), "b": ([1, 2], [5, 6])}, x_name="x", y_name="y")
    assert len({line.get_marker() for line in axes.lines}) == len({line.get_color() for line in axes.lines}) == 2


def test_bad_input_is_refused(tmp_path):
    figure, (axes,) = figures.new()
    with pytest.raises(DataError, match="arm 'a' holds 0 numbers"):
        figures.arms(axes, {"a": []})
    with pytest.raises(DataError, match="not all of them finite"):
        figures.arms(axes, {"a": [1.0, float("nan")]})
    with pytest.raises(DataError, match=r"seeds have \[1, 2\] points"):
        figures.curves(axes, {"a": ([1, 2], [[1.0]])})
    with pytest.raises(DataError, match="2 values of x and 1 of y"):
        figures.points(axes, {"a": ([1, 2], [1])}, x_name="", y_name="")
    with pytest.raises(ConfigError, match=r"written as .svg or .png"):
        figures.save(figure, tmp_path / "x.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the figure was not written"):
        figures.save(figure, tmp_path / "file" / "x.svg")
    with pytest.raises(ConfigError, match="panels=0"):
        figures.new(0)
