"""The study of PR-MoE: what its arms hold and compute, by hand, and its own rule."""

import pytest

from moestro.core.layer import mixture_layers
from moestro.studies._framework import BUDGETS, Measured
from moestro.studies.deepspeed_moe_architecture import (
    SHAPES,
    EverySeed,
    active_flops,
    build,
    expert_parameters,
    layers_of,
    scale,
)


FULL = BUDGETS["full"]
DIM, INNER = 128, 256
EXPERT = 3 * DIM * INNER


@pytest.mark.parametrize(
    ("arm", "experts", "branches", "active"),
    [
        ("moe", (4, 4), 0, 1),
        ("moe_large", (16, 16), 0, 1),
        ("top2", (4, 4), 0, 2),
        ("top2_large", (16, 16), 0, 2),
        ("residual", (4, 4), 1, 2),
        ("pyramid", (4, 8), 0, 1),
        ("pr_moe", (4, 8), 1, 2),
    ],
)
def test_what_an_arm_holds_and_computes(arm: str, experts: tuple[int, ...], branches: int, active: int) -> None:
    """Two operations a weight: of the active networks, the router, and the mix with its bias."""
    layers = mixture_layers(build(arm, scale(FULL, arm), 0))
    assert list(layers) == ["model.layers.1.mlp", "model.layers.3.mlp"]
    assert tuple(layer.bank.num_experts for layer in layers.values()) == experts
    assert expert_parameters(layers) == (sum(experts) + 2 * branches) * EXPERT
    mixes = 2 * branches * 2 * (2 * DIM + 2)
    assert active_flops(layers) == 2 * active * 2 * EXPERT + 2 * DIM * sum(experts) + mixes


def test_pr_moe_holds_less_than_45_percent_and_computes_what_two_of_many_do() -> None:
    found = {arm: mixture_layers(build(arm, scale(FULL, arm), 0)) for arm in ("pr_moe", "moe_large", "top2_large")}
    assert expert_parameters(found["pr_moe"]) <= 0.45 * expert_parameters(found["moe_large"])
    assert active_flops(found["pr_moe"]) == pytest.approx(active_flops(found["top2_large"]), rel=0.01)


def test_halves_are_equally_large_and_the_rest_is_one_model() -> None:
    models = {arm: build(arm, scale(FULL, arm), 0) for arm in ("first_half", "second_half", "no_half")}
    sizes = {arm: sum(p.numel() for p in model.parameters()) for arm, model in models.items()}
    assert sizes["first_half"] == sizes["second_half"] > sizes["no_half"]
    assert layers_of("first_half", scale(FULL, "first_half")) == [0, 1, 2, 3]
    assert layers_of("second_half", scale(FULL, "second_half")) == [4, 5, 6, 7]
    plain = dict(models["no_half"].named_parameters())
    for arm in ("first_half", "second_half"):
        shared = {name: p for name, p in models[arm].named_parameters() if name in plain}
        assert len(shared) > 40
        assert all(p.equal(plain[name]) for name, p in shared.items()), "arms start from the same weights"
    assert {arm for arm, shape in SHAPES.items() if shape is None} == {"dense", "no_half"}


@pytest.mark.parametrize(
    ("first", "verdict"),
    [
        ((2.0, 2.0, 2.0), "shown"),
        ((2.0, 2.0), "partly"),  # three seeds are asked for
        ((2.0, 2.0, 0.5), "partly"),
        ((2.0, 0.5, 0.5), "not_shown"),
        ((2.0, 1.0, 1.0), "not_shown"),  # equal is not lower
    ],
)
def test_every_seed_counts(first: tuple[float, ...], verdict: str) -> None:
    values = {"first": {"loss": dict(enumerate(first))}, "second": {"loss": dict.fromkeys(range(len(first)), 1.0)}}
    found = EverySeed(method="second", control="first")(Measured(values), "loss")
    assert found.verdict == verdict
    assert found.measured == pytest.approx(sum(first) / len(first) - 1.0)
