"""The entropy loss: closed forms, its gradient by hand, and what certainty does to it."""

import math

import pytest
import torch

from moestro.core.errors import ContextError
from moestro.core.routing import Routing, Scores
from tests.methods.train.helpers import build, context, route


def routing_of(logits_TC: torch.Tensor) -> Routing:
    probability = logits_TC.softmax(-1)
    best = probability.max(-1, keepdim=True)
    scores = Scores(logits_TC, probability, probability)
    return Routing.from_topk(best.indices, best.values, num_experts=logits_TC.shape[1], scores=scores)


@pytest.mark.parametrize("experts", [2, 7])
def test_equal_logits_give_log_e_per_token(experts: int) -> None:
    total = build("train.entropy_loss")("s", routing_of(torch.full((5, experts), 3.0)), context(1, 5))
    torch.testing.assert_close(total, torch.tensor(5 * math.log(experts)))


def test_a_case_worked_out_by_hand() -> None:
    """P = (1/2, 1/4, 1/4) costs 3/2 ln 2; P = (1/2, 1/2, 0) costs ln 2."""
    probability = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]])
    total = build("train.entropy_loss")("s", routing_of(probability.log()), context(1, 2))
    torch.testing.assert_close(total, torch.tensor(2.5 * math.log(2)))


def test_the_gradient_is_that_of_the_formula() -> None:
    """dH / dz_i = -P_i (log P_i + H), token by token."""
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (grad,) = torch.autograd.grad(build("train.entropy_loss")("s", routing_of(logits), context(1, 6)), logits)
    for row in range(6):
        p = [math.exp(z) for z in logits[row].tolist()]
        p = [one / sum(p) for one in p]
        entropy = -sum(one * math.log(one) for one in p)
        expected = [-one * (math.log(one) + entropy) for one in p]
        torch.testing.assert_close(grad[row], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("gap", [30.0, 80.0, 300.0, 3e4, float("inf")])
def test_certainty_costs_nothing_and_has_no_gradient(gap: float) -> None:
    logits = torch.tensor([[0.0, -gap, -gap], [-gap, -gap, 0.0]], requires_grad=True)
    total = build("train.entropy_loss")("s", routing_of(logits), context(1, 2))
    (grad,) = torch.autograd.grad(total, logits)
    assert 0 <= total.item() <= 1e-10
    assert float(grad.abs().max()) <= 1e-10


def test_one_expert_has_no_entropy() -> None:
    logits = torch.randn(3, 1, requires_grad=True)
    total = build("train.entropy_loss")("s", routing_of(logits), context(1, 3))
    (grad,) = torch.autograd.grad(total, logits)
    assert total.item() == 0
    assert torch.equal(grad, torch.zeros(3, 1))


def test_padding_does_not_count_and_gets_no_gradient() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = build("train.entropy_loss")
    padded = loss("s", routing_of(logits), context(1, 6, valid=[True, False, True, True, False, True]))
    torch.testing.assert_close(padded, loss("s", routing_of(logits[[0, 2, 3, 5]]), context(1, 4)))
    (grad,) = torch.autograd.grad(padded, logits)
    assert torch.equal(grad.abs().sum(-1) > 0, torch.tensor([True, False, True, True, False, True]))
    assert loss.unit == "token"


def test_a_sigmoid_router_is_read_through_its_own_probabilities() -> None:
    router = build("train.sigmoid_bias", num_experts=4, top_k=2)
    torch.nn.init.zeros_(router.weight)
    x, ctx = torch.randn(3, 6), context(1, 3)
    total = build("train.entropy_loss")("s", route(router, x, ctx), ctx)
    torch.testing.assert_close(total, torch.tensor(3 * math.log(4)))


def test_descending_it_makes_a_router_decide() -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(2), requires_grad=True)
    best = logits.detach().argmax(-1)
    loss, ctx = build("train.entropy_loss"), context(1, 20)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    for _ in range(200):
        optimizer.zero_grad()
        loss("s", routing_of(logits), ctx).backward()
        optimizer.step()
    assert logits.softmax(-1).max(-1).values.min() >= 0.98
    assert torch.equal(logits.argmax(-1), best)


def test_a_router_without_scores_is_refused() -> None:
    routing = routing_of(torch.randn(4, 3)).replace(scores=None)
    with pytest.raises(ContextError, match="needs scores"):
        build("train.entropy_loss")("s", routing, context(1, 4))
