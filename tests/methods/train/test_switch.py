"""Switch routing: one expert, its probability, and places counted in order."""

import pytest
import torch

from moestro.core.errors import ConfigError
from moestro.core.registry import method
from moestro.methods.train.switch import within_capacity
from tests.methods.train.helpers import build, context, layer, route


def test_the_weight_is_the_probability_of_the_best() -> None:
    router = build("train.switch", num_experts=4)
    x = torch.randn(5, 6)
    routing = route(router, x, context(1, 5))
    probability = (x @ router.weight.T).softmax(-1)
    torch.testing.assert_close(routing.weight_TK[:, 0], probability.max(1).values)
    assert torch.equal(routing.expert_TK[:, 0], probability.argmax(1))
    assert routing.kept_N is None


def test_places_are_counted_in_order_by_row_and_expert() -> None:
    expert = torch.tensor([0, 0, 1, 0, 1, 0, 0, 0])
    row = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    kept = within_capacity(expert, row, 2, 3, 2)
    assert kept.tolist() == [True, True, True, False, True, True, True, False]


def test_dropped_tokens_pass_by_and_still_count_as_demand() -> None:
    router = build("train.switch", num_experts=2, capacity=1)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0] = 1.0
    mixture = layer(router)
    x = torch.ones(2, 3, 6)
    y = mixture(x)
    assert y[:, 0].abs().sum() > 0
    assert torch.equal(y[:, 1:], torch.zeros(2, 2, 6))
    routing = route(router, x.view(6, 6), context(2, 3))
    assert routing.counts_C().tolist() == [6, 0]
    assert routing.real().token_N.tolist() == [0, 3]


@pytest.mark.parametrize(("factor", "width", "places"), [(1.0, 8, 2), (1.25, 8, 3), (2.0, 8, 4), (1.1, 200, 55)])
def test_the_capacity_factor_is_a_multiple_of_the_fair_share(factor: float, width: int, places: int) -> None:
    router = build("train.switch", num_experts=4, capacity_factor=factor)
    assert router.capacity(context(3, width)) == places


def test_jitter_only_while_training() -> None:
    router = build("train.switch", num_experts=4, jitter=0.5)
    x = torch.randn(50, 6)
    ctx = context(1, 50)
    noisy = router.train().score(x, None, ctx).logits_TC
    clean = router.eval().score(x, None, ctx).logits_TC
    torch.testing.assert_close(clean, x @ router.weight.T)
    assert not torch.allclose(noisy, clean)


def test_jitter_is_finer_than_the_models_type() -> None:
    """In bfloat16 there are four numbers between 0.99 and 1.01; the router is a float32 one."""
    router = build("train.switch", num_experts=6, jitter=0.01).train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(6))
    noise = router.score(torch.ones(20_000, 6, dtype=torch.bfloat16), None, context(1, 20_000)).logits_TC
    assert noise.var().item() == pytest.approx(0.02**2 / 12, rel=0.02)
    assert 0.99 <= noise.min() < noise.max() <= 1.01


def test_two_capacities_are_refused() -> None:
    with pytest.raises(ConfigError, match="give one"):
        method("train.switch").configure({"capacity": 2, "capacity_factor": 1.0})


def test_a_capacity_factor_is_marked_as_not_causal() -> None:
    assert build("train.switch", num_experts=2).causal
    assert build("train.switch", num_experts=2, capacity=2).causal
    router = build("train.switch", num_experts=2, capacity_factor=1.0)
    assert not router.causal
    assert not route(router, torch.randn(6, 6), context(1, 6)).causal
