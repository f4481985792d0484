"""The mixture layer: order of its steps, edits, branches, heterogeneous banks, what is kept."""

import pytest
import torch
from torch import Tensor, nn

from moestro.core.bank import Bank, HeterogeneousBank, StackedFFN
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.router import LinearRouter, Router, topk_indices
from moestro.core.routing import Routing, Scores
from moestro.core.session import Edit, session


class TopTwo(LinearRouter):
    """Two of E real experts and possibly nulls, weights as they are."""

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        logits = self.logits(x_TD)
        return Scores(logits, logits.detach(), logits.softmax(-1))

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        expert = topk_indices(scores.select_TC, 2)
        weight = scores.gate_TC.gather(1, expert)
        return Routing.from_topk(expert, weight, num_experts=self.num_experts, num_null=self.num_null, scores=scores)


def make(num_experts: int = 4, num_null: int = 0, dim: int = 6, **more: object) -> MoELayer:
    torch.manual_seed(0)
    router = TopTwo(dim, num_experts, top_k=2, num_null=num_null)
    nn.init.normal_(router.weight)
    return MoELayer(router, StackedFFN(num_experts, dim, 8), site="mlp", **more)


def expert(bank: Bank, index: int, x: Tensor) -> Tensor:
    gate, up, down = (bank.weight(index, name) for name in ("gate", "up", "down"))
    return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_the_layer_is_the_weighted_sum_of_its_experts() -> None:
    layer = make()
    x = torch.randn(2, 3, 6)
    rows = x.view(6, 6)
    probability = (rows @ layer.router.weight.T).softmax(-1)
    expected = torch.stack(
        [
            sum(probability[t, e] * expert(layer.bank, int(e), rows[t]) for e in probability[t].topk(2).indices)
            for t in range(6)
        ]
    )
    torch.testing.assert_close(layer(x).view(6, 6), expected, atol=1e-6, rtol=1e-5)


def test_nulls_add_exactly_nothing_and_a_token_of_nulls_is_exactly_zero() -> None:
    layer = make(num_experts=2, num_null=3)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2:] = torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 6)
    y = layer(torch.ones(1, 4, 6))
    assert torch.equal(y, torch.zeros(1, 4, 6))
    with torch.no_grad():
        layer.router.weight[0] = 5.0
    rows = torch.ones(4, 6)
    probability = (rows @ layer.router.weight.T).softmax(-1)
    torch.testing.assert_close(layer(rows[None])[0], probability[:, :1] * expert(layer.bank, 0, rows))


class Order(Edit):
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def on_scores(self, site: str, scores: Scores, ctx: RoutingContext) -> Scores:
        self.log.append(f"scores {self.name} {site}")
        return scores

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        self.log.append(f"routing {self.name} {site}")
        return routing


class Force(Edit):
    """Sends every token to one expert, with the weight the router would give it."""

    def __init__(self, expert: int) -> None:
        self.expert = expert

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        assert routing.scores is not None
        chosen = torch.full((routing.num_tokens, 1), self.expert)
        weight = router.weigh(routing.scores.gate_TC.gather(1, chosen))
        return Routing.from_topk(chosen, weight, num_experts=routing.num_experts, scores=routing.scores)


def test_edits_run_in_order_around_the_choice() -> None:
    log: list[str] = []
    with session(edits=[Order(log, "a")]), session(edits=[Order(log, "b")]):
        make()(torch.randn(1, 2, 6))
    assert log == ["scores a mlp", "scores b mlp", "routing a mlp", "routing b mlp"]


def test_an_edit_can_override_the_choice() -> None:
    layer = make()
    x = torch.randn(5, 6)
    with session(edits=[Force(3)]):
        y = layer(x[None])[0]
    weight = (x @ layer.router.weight.T).softmax(-1)[:, 3:]
    torch.testing.assert_close(y, weight * expert(layer.bank, 3, x), atol=1e-6, rtol=1e-5)


def test_pre_and_post_touch_the_routed_branch_only() -> None:
    torch.manual_seed(1)
    pre, post, shared = nn.Linear(6, 3, bias=False), nn.Linear(3, 6, bias=False), nn.Linear(6, 6, bias=False)
    router = TopTwo(6, 4, top_k=2)
    layer = MoELayer(router, StackedFFN(4, 3, 5), site="mlp", pre=pre, post=post, shared=shared)
    x = torch.randn(4, 6)
    probability = (x @ router.weight.T).softmax(-1)
    narrow = pre(x)
    mixed = torch.stack(
        [
            sum(probability[t, e] * expert(layer.bank, int(e), narrow[t]) for e in probability[t].topk(2).indices)
            for t in range(4)
        ]
    )
    torch.testing.assert_close(layer(x[None])[0], post(mixed) + shared(x), atol=1e-6, rtol=1e-5)


def test_combine_sees_both_branches_the_input_and_the_whole_routing() -> None:
    def identity_nulls(routed: Tensor, shared: Tensor | None, x: Tensor, routing: Routing) -> Tensor:
        null = (routing.expert_N >= routing.num_experts) * routing.weight_N
        mass = torch.zeros(routing.num_tokens).index_add(0, routing.token_N, null)
        return routed + mass[:, None] * x

    layer = make(num_experts=1, num_null=2, combine=identity_nulls)
    with torch.no_grad():
        layer.router.weight[0] = -100.0
    x = torch.ones(1, 2, 6)
    torch.testing.assert_close(layer(x), x)


def test_experts_of_different_sizes_side_by_side() -> None:
    torch.manual_seed(0)
    small, big = StackedFFN(2, 6, 3), StackedFFN(3, 6, 11)
    router = TopTwo(6, 5, top_k=2)
    layer = MoELayer(router, HeterogeneousBank([small, big]), site="mlp")
    x = torch.randn(7, 6)
    probability = (x @ router.weight.T).softmax(-1)
    expected = torch.stack(
        [
            sum(probability[t, e] * expert(layer.bank, int(e), x[t]) for e in probability[t].topk(2).indices)
            for t in range(7)
        ]
    )
    torch.testing.assert_close(layer(x[None])[0], expected, atol=1e-6, rtol=1e-5)
    assert layer.bank.nbytes(1) == 3 * 6 * 3 * 4
    assert layer.bank.nbytes(2) == 3 * 6 * 11 * 4
    assert layer.bank.flops_per_row(4) == 2 * 3 * 6 * 11


def test_router_and_bank_must_agree() -> None:
    with pytest.raises(ConfigError, match="among 4 experts but the bank holds 5"):
        MoELayer(TopTwo(6, 4, top_k=2), StackedFFN(5, 6, 8), site="mlp")


def test_what_a_session_asks_for_is_kept_with_its_gradient() -> None:
    layer = make()
    x = torch.randn(1, 3, 6, requires_grad=True)
    with session(collect=True, keeps=["input", "output"]) as opened:
        y = layer(x)
    (ctx,) = opened.take()
    assert torch.equal(ctx.kept[("mlp", "input")], x.view(3, 6))
    assert torch.equal(ctx.kept[("mlp", "output")], y.view(3, 6))
    (grad,) = torch.autograd.grad(ctx.kept[("mlp", "output")].sum(), x)
    assert grad.abs().sum() > 0


def test_layers_are_found_by_site() -> None:
    model = nn.Sequential(make(), nn.Linear(6, 6))
    assert list(mixture_layers(model)) == ["mlp"]


def test_every_expert_gets_a_gradient_even_without_tokens() -> None:
    """A parameter without gradient hangs data-parallel training."""
    layer = make()
    with session(edits=[Force(1)]):
        layer(torch.randn(1, 2, 6)).sum().backward()
    grad = layer.bank.gate_up_proj.grad
    assert grad is not None
    assert grad[1].abs().sum() > 0
    assert grad[[0, 2, 3]].abs().sum() == 0


def test_no_tokens_at_all() -> None:
    layer = make()
    assert layer(torch.zeros(1, 0, 6)).shape == (1, 0, 6)
