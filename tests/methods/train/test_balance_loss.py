"""The balance loss against closed forms, Transformers' own function, and cuts of a step into micro-batches."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moestro.core.context import RoutingContext
from moestro.core.errors import ContextError
from moestro.core.routing import Routing, Scores
from moestro.core.session import Session
from tests.methods.train.helpers import build, context, tokens


def routing_of(logits_TC: torch.Tensor, top_k: int) -> Routing:
    probability = logits_TC.softmax(-1)
    chosen = probability.topk(top_k)
    return Routing.from_topk(
        chosen.indices,
        chosen.values,
        num_experts=logits_TC.shape[1],
        scores=Scores(logits_TC, probability, probability),
    )


@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_uniform_routing_gives_one_per_unit(scope: str, top_k: int) -> None:
    """8 tokens in 2 rows, expert (t + j) mod 4 in slot j, equal logits: f = P = 1/4."""
    expert = (torch.arange(8)[:, None] + torch.arange(top_k)) % 4
    flat = torch.zeros(8, 4)
    routing = Routing.from_topk(
        expert, torch.ones(8, top_k), num_experts=4, scores=Scores(flat, flat, flat.softmax(-1))
    )
    total = build("train.balance_loss", scope=scope)("s", routing, context(2, 4))
    units = {"sequence": 2, "batch": 1, "global": 8}[scope]
    torch.testing.assert_close(total / units, torch.tensor(1.0), atol=1e-6, rtol=0)
    as_transformers = build("train.balance_loss", scope=scope, scaling="transformers")("s", routing, context(2, 4))
    torch.testing.assert_close(as_transformers / units, torch.tensor(float(top_k)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
def test_collapse_onto_one_expert_gives_e(scope: str) -> None:
    logits = torch.full((8, 4), -60.0)
    logits[:, 2] = 60.0
    total = build("train.balance_loss", scope=scope)("s", routing_of(logits, 1), context(2, 4))
    units = {"sequence": 2, "batch": 1, "global": 8}[scope]
    torch.testing.assert_close(total / units, torch.tensor(4.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_transformers_scaling_over_all_layers_is_transformers_function(masked: bool) -> None:
    torch.manual_seed(0)
    layers = [torch.randn(12, 6) for _ in range(3)]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]) if masked else torch.ones(2, 6, dtype=torch.long)
    expected = load_balancing_loss_func(tuple(layers), 6, 2, mask)
    loss = build("train.balance_loss", scaling="transformers", layers="together")
    ctx = context(2, 6, valid=mask.bool().reshape(-1).tolist())
    ctx._sites = ("0", "1", "2")
    parts = [loss(str(i), routing_of(logits, 2), ctx) for i, logits in enumerate(layers)]
    torch.testing.assert_close(sum(parts), torch.as_tensor(expected), atol=1e-6, rtol=0)


def test_layers_together_is_not_the_mean_of_layers() -> None:
    """Two layers collapsed onto different experts: together the load is even."""
    first, second = torch.full((4, 2), -60.0), torch.full((4, 2), -60.0)
    first[:, 0], second[:, 1] = 60.0, 60.0
    ctx = context(1, 4)
    ctx._sites = ("a", "b")
    together = build("train.balance_loss", layers="together")
    total = together("a", routing_of(first, 1), ctx) + together("b", routing_of(second, 1), ctx)
    torch.testing.assert_close(total, torch.tensor(1.0), atol=1e-5, rtol=0)
    each = build("train.balance_loss")
    total = each("a", routing_of(first, 1), ctx) + each("b", routing_of(second, 1), ctx)
    torch.testing.assert_close(total, torch.tensor(4.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
def test_padding_changes_nothing(scope: str) -> None:
    torch.manual_seed(1)
    logits = torch.randn(8, 4)
    loss = build("train.balance_loss", scope=scope)
    plain = loss("s", routing_of(logits, 2), context(2, 4))
    wide = torch.randn(2, 6, 4)
    wide[:, 2:] = logits.view(2, 4, 4)
    valid = [False, False, True, True, True, True] * 2
    padded = loss("s", routing_of(wide.view(12, 4), 2), context(2, 6, valid=valid))
    torch.testing.assert_close(plain, padded, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_one_step_of_eight_rows_equals_eight_of_one(scope: str) -> None:
    torch.manual_seed(2)
    logits = torch.randn(8 * 5, 4, requires_grad=True)
    loss = build("train.balance_loss", scope=scope)
    units = 8 if scope == "sequence" else 40
    whole = loss("s", routing_of(logits, 2), context(8, 5)) / units
    (grad,) = torch.autograd.grad(whole, logits)
    load = routing_of(logits, 2).counts_C()
    known = Session(global_load={"s": load})
    parts = [loss("s", routing_of(row, 2), RoutingContext("t", known, tokens(1, 5))) / units for row in logits.split(5)]
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=0)
    (cut,) = torch.autograd.grad(sum(parts), logits)
    torch.testing.assert_close(cut, grad, atol=1e-7, rtol=0)


def test_demand_counts_whatever_capacity_drops() -> None:
    torch.manual_seed(3)
    routing = routing_of(torch.randn(8, 4), 1)
    dropped = routing.replace(kept_N=torch.tensor([True, False] * 4))
    loss = build("train.balance_loss")
    assert torch.equal(loss("s", routing, context(2, 4)), loss("s", dropped, context(2, 4)))


def test_gradient_flows_through_probabilities_only() -> None:
    """d/dz of E sum f P by the softmax rule: E p_j (f_j - sum_i f_i p_i) / T."""
    torch.manual_seed(4)
    logits = torch.randn(6, 3, requires_grad=True)
    routing = routing_of(logits, 1)
    (grad,) = torch.autograd.grad(build("train.balance_loss")("s", routing, context(1, 6)), logits)
    p = logits.detach().softmax(-1)
    f = routing.counts_C() / 6
    expected = 3 * p * (f - (p @ f)[:, None]) / 6
    torch.testing.assert_close(grad, expected, atol=1e-6, rtol=0)


def test_a_router_without_scores_is_refused() -> None:
    routing = routing_of(torch.randn(4, 3), 1).replace(scores=None)
    with pytest.raises(ContextError, match="needs scores"):
        build("train.balance_loss")("s", routing, context(1, 4))


def test_a_loss_over_all_layers_on_some_layers_only_is_not_lost() -> None:
    from torch import nn

    from moestro.core.context import open_stack
    from moestro.core.session import session
    from tests.methods.train.helpers import DIM, layer

    def mixture(name: str, *, with_loss: bool) -> nn.Module:
        losses = {"balance": build("train.balance_loss", layers="together")} if with_loss else {}
        made = layer(build("train.softmax_topk", num_experts=4), losses=losses)
        made.site = name
        return made

    stack = nn.Sequential(mixture("a", with_loss=True), mixture("b", with_loss=True), mixture("c", with_loss=False))
    open_stack(stack, "stack")
    with session(collect=True) as opened:
        stack(torch.randn(1, 6, DIM))
    (ctx,) = opened.take()
    assert float(sum(term.total for term in ctx.losses.values()).detach()) >= 0.5
