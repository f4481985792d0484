"""The study of MC-MoE: bootstrap, and the rule that asks every seed."""

import numpy as np
import pytest

from moestro.studies._framework import BUDGETS, Measured
from moestro.studies._rows import bootstrap
from moestro.studies.mc_moe import Better, assembled, at_width, measured


def test_a_bootstrap_holds_the_mean_and_shrinks_with_rows() -> None:
    draw = np.random.default_rng(0)
    few, many = draw.normal(1.0, 1.0, 50), draw.normal(1.0, 1.0, 5000)
    low, high = bootstrap(few)
    assert low < few.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * few.std() / 50**0.5, rel=0.1)
    narrow = bootstrap(many)
    assert narrow[1] - narrow[0] < (high - low) / 5


@pytest.mark.parametrize(
    ("lows", "gains", "verdict"),
    [
        ([[0.1, 0.2], [0.3, 0.1]], [[1, 1], [1, 1]], "shown"),
        ([[0.1, -0.2], [0.3, 0.1]], [[1, 1], [1, 1]], "partly"),
        ([[0.1, 0.2], [0.3, -1]], [[1, 1], [1, -3]], "not_shown"),
    ],
)
def test_every_control_and_seed_counts(lows: list[list[float]], gains: list[list[float]], verdict: str) -> None:
    values = {
        arm: {"gain": dict(enumerate(gain)), "gain_low": dict(enumerate(low))}
        for arm, gain, low in zip("ab", gains, lows, strict=True)
    }
    assert Better(controls=("a", "b"))(Measured(values), "ppl").verdict == verdict


def test_one_seed_shows_nothing_fully() -> None:
    values = {"a": {"gain": {0: 1.0}, "gain_low": {0: 0.5}}}
    assert Better(controls=("a",))(Measured(values), "ppl").verdict == "partly"


def test_an_assembled_mixture_has_each_expert_at_its_width() -> None:
    from moestro.core.layer import mixture_layers
    from moestro.methods.compress.mc_moe import widths_of
    from moestro.studies.mc_moe import config_of
    from moestro.surgery.opened import OpenModel

    budget = BUDGETS["ci"]
    model, taken = assembled("pmq", 2.0, 0, budget, 0)
    there = OpenModel(model).shape.layers[0]
    widths, _, size = widths_of(there, *measured(0, budget)[0], config_of(budget, avg_bits=2.0), 0)
    assert taken == size
    assert set(widths) == {1, 2, 3}
    (layer,) = mixture_layers(model).values()
    for expert, width in enumerate(widths):
        (packed,) = mixture_layers(at_width(width, 0, budget)).values()
        assert layer.bank.weight(expert, "up").equal(packed.bank.weight(expert, "up"))
