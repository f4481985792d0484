"""Softmax top-k against formulas written out by hand."""

import math

import pytest
import torch

from moestro.core.errors import ConfigError, ContextError
from moestro.core.registry import method
from tests.methods.train.helpers import build, context, layer, route


def logits_router(logits: list[list[float]], **config: object):
    """A router whose logits are given: the input is one-hot."""
    table = torch.tensor(logits)
    router = build("train.softmax_topk", num_experts=table.shape[1], **config)
    router.weight = torch.nn.Parameter(torch.zeros(table.shape[1], len(table)))
    with torch.no_grad():
        router.weight.copy_(table.T)
    return router, torch.eye(len(table))


LOGITS = [[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0], [-5.0, -4.0, -3.0, -2.0]]


def test_weights_by_hand() -> None:
    """exp(2), exp(1), exp(0), exp(-1) over their sum; renormalised the two best are e/(e+1) and 1/(e+1)."""
    router, x = logits_router(LOGITS, top_k=2, renormalise=False)
    routing = route(router, x, context(1, 3))
    total = sum(math.exp(v) for v in LOGITS[0])
    assert routing.expert_TK[0].tolist() == [0, 1]
    torch.testing.assert_close(routing.weight_TK[0], torch.tensor([math.exp(2) / total, math.exp(1) / total]))

    router, x = logits_router(LOGITS, top_k=2, renormalise=True)
    weight = route(router, x, context(1, 3)).weight_TK[0]
    torch.testing.assert_close(weight, torch.tensor([math.e / (math.e + 1), 1 / (math.e + 1)]))


def test_softmax_over_the_chosen_equals_renormalised_softmax_over_all() -> None:
    router, x = logits_router(LOGITS, top_k=3, softmax="chosen")
    other, _ = logits_router(LOGITS, top_k=3, softmax="all", renormalise=True)
    chosen, renormalised = (route(r, x, context(1, 3)) for r in (router, other))
    assert torch.equal(chosen.expert_TK, renormalised.expert_TK)
    torch.testing.assert_close(chosen.weight_TK, renormalised.weight_TK)


def test_ties_go_to_the_lower_expert() -> None:
    router, x = logits_router([[0.0] * 64, [1.0] * 32 + [2.0] * 32], top_k=4)
    routing = route(router, x, context(1, 2))
    assert routing.expert_TK.tolist() == [[0, 1, 2, 3], [32, 33, 34, 35]]


def test_scale_multiplies_after_renormalising() -> None:
    router, x = logits_router(LOGITS, top_k=2, renormalise=True, scale=2.5)
    torch.testing.assert_close(route(router, x, context(1, 3)).weight_TK.sum(1), torch.full((3,), 2.5))


def test_groups_by_best_member() -> None:
    """Groups {0,1} and {2,3}: the second holds the best expert, so both slots fall there."""
    router, x = logits_router([[2.0, 1.9, 2.1, -3.0]], top_k=2, num_groups=2, groups_kept=1, renormalise=False)
    routing = route(router, x, context(1, 1))
    assert routing.expert_TK.tolist() == [[2, 3]]
    probability = torch.tensor([2.0, 1.9, 2.1, -3.0]).softmax(0)
    torch.testing.assert_close(routing.weight_TK[0], probability[[2, 3]])


def test_all_groups_kept_is_no_limit() -> None:
    limited, x = logits_router(LOGITS, top_k=2, num_groups=2, groups_kept=2)
    free, _ = logits_router(LOGITS, top_k=2)
    assert torch.equal(route(limited, x, context(1, 3)).expert_TK, route(free, x, context(1, 3)).expert_TK)


def test_the_router_gets_gradient_and_all_negative_logits_are_no_special_case() -> None:
    router, x = logits_router([[-80.0, -81.0, -82.0, -83.0]], top_k=2)
    routing = route(router, x, context(1, 1))
    assert routing.expert_TK.tolist() == [[0, 1]]
    routing.weight_TK[0, 0].backward()
    assert router.weight.grad.abs().sum() > 0


def test_chosen_experts_equal_a_reference_on_many_tokens() -> None:
    torch.manual_seed(3)
    router = build("train.softmax_topk", num_experts=16, top_k=4)
    x = torch.randn(20_000, 6) * 20
    routing = route(router, x, context(1, 20_000))
    logits = torch.nn.functional.linear(x, router.weight).softmax(-1)
    reference = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :4]
    assert torch.equal(routing.expert_TK, reference)


def test_a_layer_with_one_expert_is_that_expert() -> None:
    router = build("train.softmax_topk", num_experts=1, top_k=1)
    mixture = layer(router)
    x = torch.randn(2, 3, 6)
    hidden = x @ mixture.bank.weight(0, "gate").T
    expected = (torch.nn.functional.silu(hidden) * (x @ mixture.bank.weight(0, "up").T)) @ mixture.bank.weight(
        0, "down"
    ).T
    torch.testing.assert_close(mixture(x), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts": 4, "top_k": 5}, "top_k=5"),
        ({"num_experts": 6, "num_groups": 4}, "num_groups=4 does not divide num_experts=6"),
        ({"num_experts": 8, "num_groups": 4, "groups_kept": 1, "top_k": 3}, "hold only 2"),
        ({"num_experts": 8, "topk": 3}, "did you mean 'top_k'"),
    ],
)
def test_wrong_settings_are_refused_with_numbers(config: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method("train.softmax_topk").configure(config)


def test_closing_more_experts_than_top_k_leaves_is_refused() -> None:
    router, x = logits_router(LOGITS, top_k=2)
    scores = router.score(x, None, context(1, 3))
    select = scores.select_TC.clone()
    select[1, [0, 1, 3]] = float("-inf")
    with pytest.raises(ContextError, match="token 1 may choose among 1 experts but top_k=2"):
        router.choose(scores.replace(select_TC=select), context(1, 3))


def test_one_normalised_expert_a_token_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    build("train.softmax_topk", top_k=1, renormalise=False)
    assert not caplog.records
    build("train.softmax_topk", top_k=1, renormalise=True)
    assert "no gradient" in caplog.text
