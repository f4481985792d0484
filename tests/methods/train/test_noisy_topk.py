"""Noisy top-k: the size of the noise, where it is, and where it is not."""

import torch

from tests.methods.train.helpers import build, context, route


def test_without_training_it_is_softmax_over_the_chosen() -> None:
    router = build("train.noisy_topk", num_experts=6, top_k=2).eval()
    x = torch.randn(7, 6)
    routing = route(router, x, context(1, 7))
    logits = x @ router.weight.T
    best = logits.topk(2)
    assert torch.equal(routing.expert_TK, best.indices)
    torch.testing.assert_close(routing.weight_TK, best.values.softmax(-1))


def test_the_noise_has_the_stated_scale_and_the_raw_logits_are_clean() -> None:
    router = build("train.noisy_topk", num_experts=4, top_k=2).train()
    with torch.no_grad():
        router.noise_weight[:, 0] = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    x = torch.zeros(40_000, 6)
    x[:, 0] = 1.0
    scores = router.score(x, None, context(1, 40_000))
    torch.testing.assert_close(scores.logits_TC, x @ router.weight.T)
    spread = (scores.select_TC - scores.logits_TC).std(0)
    expected = torch.nn.functional.softplus(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    torch.testing.assert_close(spread, expected, rtol=0.02, atol=0.0)


def test_gradient_reaches_both_weights() -> None:
    router = build("train.noisy_topk", num_experts=4, top_k=2).train()
    route(router, torch.randn(9, 6), context(1, 9)).weight_TK[:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0
    assert router.noise_weight.grad.abs().sum() > 0
