"""Top-p routing from outside: the p of a wanted mean number of experts, and the edit for any router."""

import logging

import pytest
import torch
from torch import nn

from moestro.core.errors import ConfigError, ContextError
from moestro.core.routing import Routing, Scores
from moestro.methods.train import dynamic_moe
from moestro.methods.train.dynamic_moe import TopP, calibrate_p
from tests.methods.train.helpers import build, context, route
from tests.methods.train.test_dynamic_moe import chosen, inputs, pick, scores_of, spread


# -- calibration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [{}, {"min_experts": 2, "max_experts": 5}])
@pytest.mark.parametrize("target", [2.0, 2.7, 4.3])
def test_calibration_finds_the_largest_p_that_keeps_the_mean(target: float, bounds: dict[str, int]) -> None:
    draw = torch.Generator().manual_seed(7)
    layers = [(2 * torch.randn(50, n, generator=draw)).softmax(-1) for n in (8, 8, 11)]
    p = calibrate_p(layers, target, **bounds)

    def mean(at: float) -> float:
        router = {n: build("train.dynamic_moe", num_experts=n, p=at, **bounds) for n in (8, 11)}
        counts = [len(token) for one in layers for token in chosen(router[one.shape[1]].choose(scores_of(one), ctx))]
        return sum(counts) / len(counts)

    ctx = context(1, 50)
    assert target - 1 / 150 - 1e-9 <= mean(p) <= target, "150 tokens: p can be set to a 150th of an expert"
    assert mean(min(p + 1e-6, 1.0)) > target


def test_calibration_knows_its_ends() -> None:
    layers = [(2 * torch.randn(50, 6, generator=torch.Generator().manual_seed(8))).softmax(-1)]
    assert calibrate_p(layers, 6.0) == 1.0
    assert len(chosen(pick(layers[0], p=calibrate_p(layers, 1.0)))[0]) == 1
    for wrong in (0.5, 6.1):
        with pytest.raises(
            ConfigError, match=rf"mean_experts={wrong}: these probabilities give 1 \(p=0\) to 6 \(p=1\)"
        ):
            calibrate_p(layers, wrong)
    with pytest.raises(ConfigError, match="no token"):
        calibrate_p([torch.zeros(0, 6)], 2.0)


def test_calibration_refuses_what_is_no_probability() -> None:
    rows = torch.full((3, 4), 0.25)
    for wrong, told in ((2 * rows, "sums to 2"), (torch.tensor([[1.5, -0.5]]), "sums to 1"), (rows / 0, "sums to inf")):
        with pytest.raises(ConfigError, match=f"{told}; give probabilities, >= 0"):
            calibrate_p([rows, wrong], 2.0)
    with pytest.raises(ConfigError, match="min_experts=3, max_experts=2; need 1 <= min <= max"):
        calibrate_p([rows], 2.0, min_experts=3, max_experts=2)


def test_calibration_sums_rounded_probabilities_in_float32() -> None:
    """300 bfloat16 probabilities of 1/300: sums in bfloat16 stop growing near 1/2, after half of them."""
    rows = torch.full((2, 300), 1 / 300).to(torch.bfloat16)
    assert calibrate_p([rows], 240.0) == pytest.approx(240 * float(rows[0, 0]), rel=1e-4)


# -- the edit -----------------------------------------------------------------------------------------------------


def edited(router: nn.Module, x: torch.Tensor, edit: TopP) -> tuple[Routing, Routing]:
    ctx = context(1, len(x))
    before = route(router, x, ctx)
    return before, edit.on_routing("s", before, router, ctx)


def test_the_edit_on_the_router_itself_changes_nothing() -> None:
    before, after = edited(spread(build("train.dynamic_moe", num_experts=9, p=0.5)), inputs(), TopP(0.5))
    assert chosen(after) == chosen(before)


@pytest.mark.parametrize("softmax", ["all", "chosen"])
def test_the_edit_weighs_as_the_router_would(softmax: str) -> None:
    """Where top-p takes two experts the weights are those of the top-2 router; elsewhere they still sum to 1."""
    router = spread(build("train.softmax_topk", num_experts=6, top_k=2, softmax=softmax))
    before, after = edited(router, inputs(), TopP(0.6))
    lengths = [len(token) for token in chosen(after)]
    assert set(lengths) >= {1, 2, 3}
    for was, now, probability in zip(chosen(before), chosen(after), before.scores.probabilities(), strict=True):
        if len(now) == 2:
            assert now == pytest.approx(was)
        assert sum(now.values()) == pytest.approx(1)
        mass = sorted(probability.tolist(), reverse=True)
        assert sum(mass[: len(now)]) > 0.6 >= sum(mass[: len(now) - 1])


def test_sigmoid_scores_are_read_as_parts_of_their_sum() -> None:
    router = build("train.sigmoid_bias", num_experts=4, top_k=2, scale=2.0)
    torch.nn.init.zeros_(router.weight)
    _, after = edited(router, inputs(2), TopP(0.6))
    assert chosen(after) == [{0: pytest.approx(2 / 3), 1: pytest.approx(2 / 3), 2: pytest.approx(2 / 3)}] * 2


def test_the_edit_says_that_it_saves_nothing_and_refuses_what_it_cannot_do(caplog) -> None:
    dynamic_moe._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="moestro"):
        edited(build("train.softmax_topk", num_experts=4), inputs(3), TopP(0.4))
    assert "SoftmaxTopK was not trained for top-p" in caplog.text
    with pytest.raises(ContextError, match="drops tokens by capacity"):
        edited(build("train.switch", num_experts=4, capacity=1), inputs(3), TopP(0.4))
    router = build("train.softmax_topk", num_experts=4)
    bare = route(router, inputs(3), context(1, 3)).replace(scores=None)
    with pytest.raises(ContextError, match="needs a score"):
        TopP(0.4).on_routing("s", bare, router, context(1, 3))
    for wrong in ({"p": 1.2}, {"p": 0.4, "min_experts": 0}, {"p": 0.4, "min_experts": 3, "max_experts": 2}):
        with pytest.raises(ConfigError):
            TopP(**wrong)


def test_the_edit_keeps_to_its_bounds() -> None:
    router = spread(build("train.softmax_topk", num_experts=6, top_k=2))
    _, free = edited(router, inputs(), TopP(0.6))
    counts = [len(token) for token in chosen(free)]
    assert set(counts) >= {1, 2, 3}
    for least, most in ((2, None), (1, 2), (2, 2)):
        _, bound = edited(router, inputs(), TopP(0.6, min_experts=least, max_experts=most))
        assert [len(token) for token in chosen(bound)] == [min(max(count, least), most or 6) for count in counts]


def test_the_edit_counts_probability_not_weight() -> None:
    """Gates ten times the probabilities cross p = 0.6 at two experts all the same."""
    scores = scores_of([[0.5, 0.2, 0.3]])
    routing = pick([[0.5, 0.2, 0.3]], p=0.0).replace(scores=scores.replace(gate_TC=10 * scores.gate_TC))
    after = TopP(0.6).on_routing("s", routing, build("train.dynamic_moe", num_experts=3), context(1, 1))
    assert chosen(after) == [{0: pytest.approx(5), 2: pytest.approx(3)}]


def test_the_edit_may_choose_nulls_and_keeps_the_mark_of_what_reads_ahead() -> None:
    scores: Scores = scores_of([[0.1, 0.3, 0.6]])
    one = torch.zeros(1, dtype=torch.long)
    before = Routing(one, one, torch.ones(1), 1, 2, 1, scores, False)
    after = TopP(0.7).on_routing("s", before, build("train.softmax_topk", num_experts=2, top_k=1), context(1, 1))
    assert (after.num_experts, after.num_null, after.expert_N.tolist()) == (2, 1, [2, 1])
    assert not after.causal
    assert after.real().expert_N.tolist() == [1]
