"""Sigmoid scores with a selection bias, the DeepSeek-V3 rules one by one."""

import pytest
import torch

from moestro.core.session import session
from tests.methods.train.helpers import build, context, route


def logits_router(logits: list[float], bias: list[float] | None = None, **config: object):
    table = torch.tensor([logits])
    router = build("train.sigmoid_bias", num_experts=table.shape[1], **config)
    router.weight = torch.nn.Parameter(table.T.clone())
    if bias is not None:
        router.selection_bias.copy_(torch.tensor(bias))
    return router, torch.ones(1, 1)


def test_bias_moves_the_choice_and_never_the_weight() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    router, x = logits_router(logits, [0.0, -1.0, 0.0, 0.5], top_k=2, renormalise=False)
    routing = route(router, x, context(1, 1))
    score = torch.tensor(logits).sigmoid()
    assert routing.expert_TK.tolist() == [[0, 3]]  # .881, .269 + .5 beat .731 - 1 and .5
    torch.testing.assert_close(routing.weight_TK[0], score[[0, 3]])


def test_a_constant_on_the_bias_changes_nothing() -> None:
    plain, x = logits_router([2.0, 1.0, 0.0, -1.0], [0.1, 0.0, -0.2, 0.3], top_k=2)
    moved, _ = logits_router([2.0, 1.0, 0.0, -1.0], [7.1, 7.0, 6.8, 7.3], top_k=2)
    first, second = route(plain, x, context(1, 1)), route(moved, x, context(1, 1))
    assert torch.equal(first.expert_TK, second.expert_TK)
    assert torch.equal(first.weight_TK, second.weight_TK)


def test_renormalised_weights_times_scale() -> None:
    router, x = logits_router([2.0, 1.0, 0.0, -1.0], top_k=2, scale=2.5)
    score = torch.tensor([2.0, 1.0]).sigmoid()
    torch.testing.assert_close(route(router, x, context(1, 1)).weight_TK[0], 2.5 * score / score.sum())


def test_groups_score_the_sum_of_their_two_best() -> None:
    """Group 0 has the single best expert, group 1 the better pair."""
    router, x = logits_router([3.0, -4.0, -4.0, 1.5, 1.4, -4.0], top_k=2, num_groups=2, groups_kept=1)
    assert route(router, x, context(1, 1)).expert_TK.tolist() == [[3, 4]]


def test_closed_groups_lose_even_when_every_open_score_is_negative() -> None:
    """A mask of 0 instead of -inf would pick experts of the closed group here."""
    router, x = logits_router([0.0, 0.0, 0.0, 0.0], [-3.0, -3.0, -4.0, -4.0], top_k=2, num_groups=2, groups_kept=1)
    assert route(router, x, context(1, 1)).expert_TK.tolist() == [[0, 1]]


def test_after_step_moves_overloaded_experts_down_by_gamma() -> None:
    router, _ = logits_router([0.0] * 4, top_k=2, gamma=0.01)
    router.after_step(torch.tensor([10, 2, 4, 4]))
    torch.testing.assert_close(router.selection_bias, torch.tensor([-0.01, 0.01, 0.01, 0.01]))
    router.after_step(torch.tensor([5, 5, 5, 5]))
    torch.testing.assert_close(router.selection_bias, torch.tensor([-0.01, 0.01, 0.01, 0.01]))
    router.after_step(torch.tensor([0, 0, 0, 0]))
    torch.testing.assert_close(router.selection_bias, torch.tensor([-0.01, 0.01, 0.01, 0.01]))
    with session(values={"bias_speed": 0.0}):
        router.after_step(torch.tensor([10, 2, 4, 4]))
    torch.testing.assert_close(router.selection_bias, torch.tensor([-0.01, 0.01, 0.01, 0.01]))


def test_the_bias_stays_exact_when_the_model_is_cast() -> None:
    router, _ = logits_router([0.0] * 4, [0.123456789, 1.001, -2.0003, 0.5], top_k=2)
    exact = router.selection_bias.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.selection_bias.dtype == torch.float32
    assert torch.equal(router.selection_bias, exact)
    assert torch.equal(router.state_dict()["selection_bias"], exact)


def test_probabilities_are_sigmoids_over_their_sum() -> None:
    router, x = logits_router([2.0, 1.0, 0.0, -1.0], top_k=2)
    scores = route(router, x, context(1, 1)).scores
    sigmoid = torch.tensor([2.0, 1.0, 0.0, -1.0]).sigmoid()
    torch.testing.assert_close(scores.probabilities()[0], sigmoid / sigmoid.sum())


@pytest.mark.parametrize("gamma", [0.002, 0.005])
def test_the_bias_alone_balances_a_skewed_router(gamma: float) -> None:
    """Logits that favour expert 0 for every token: without the bias its load is 100 %."""
    torch.manual_seed(0)
    router = build("train.sigmoid_bias", num_experts=4, top_k=1, gamma=gamma)
    x = torch.randn(512, 6)
    x[:, 0] = 1.0
    with torch.no_grad():
        router.weight.mul_(25)
        router.weight[:, 0] = torch.tensor([3.0, 0.0, 0.0, 0.0])
    start = route(router, x, context(1, 512)).counts_C()
    assert start[0] > 400
    for _ in range(500):
        router.after_step(route(router, x, context(1, 512)).counts_C())
    load = route(router, x, context(1, 512)).counts_C().float()
    assert load.max() / load.mean() < 1.5
