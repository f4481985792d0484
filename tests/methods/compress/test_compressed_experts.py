"""Compressed experts: the main choices compute, the auxiliary ones scale, held against a loop over tokens."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.flop_counter import FlopCounterMode

from moestro import ops
from moestro.core.bank import StackedFFN
from moestro.core.context import checkpoint_contexts, open_stack
from moestro.core.cost import RowCounter, Work, cost
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.routing import Routing
from moestro.core.session import Edit, session
from moestro.core.site import Shared, Site
from moestro.methods.compress._parts.compressed_bank import CompressedFFN, operations, shares, width
from moestro.methods.compress.compressed_experts import main_count
from tests.methods.train.helpers import build as built


ID = "compress.compressed_experts"
DIM, INNER, EXPERTS, TOP_K = 8, 12, 6, 4  # inner wider than the model: its vector is as long as it
FORMS = pytest.mark.parametrize(
    ("gated", "bias", "activation"),
    [(True, False, "silu"), (True, True, "gelu"), (False, True, "relu"), (True, True, "swiglu_oss")],
)
INJECT = pytest.mark.parametrize("inject", ["all", "input"])


class Stack(nn.Module):
    """A mixture that opens its own routing context."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.mlp = layer
        open_stack(self, "model")

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.mlp(inputs_embeds)
        return y


def mixture(top_k: int = TOP_K, router: str = "train.softmax_topk", renormalise: bool = True, **form: Any) -> MoELayer:
    settings = {"renormalise": renormalise} if router == "train.softmax_topk" else {}
    torch.manual_seed(0)
    use = method(router)
    here = Site(path="block.mlp", kind="mlp", module=nn.Identity(), dim=DIM)
    routes: Any = use.build(here, use.configure({"num_experts": EXPERTS, "top_k": top_k, **settings}), Shared())
    layer = MoELayer(routes, StackedFFN(EXPERTS, DIM, INNER, **form), site="block.mlp")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def change(layer: nn.Module, **config: Any) -> MoELayer:
    use = method(ID)
    here = Site(path="block.mlp", kind="mlp", module=layer, dim=DIM)
    made: Any = use.build(here, use.configure(config), Shared())
    return made


def spread(layer: MoELayer, std: float = 0.5) -> MoELayer:
    """Vectors that say something."""
    torch.manual_seed(7)
    with torch.no_grad():
        layer.bank.deltas.normal_(std=std)
    return layer


def tokens(count: int = 9, seed: int = 2) -> Tensor:
    return torch.randn(1, count, DIM, generator=torch.Generator().manual_seed(seed))


def seen(layer: nn.Module, x: Tensor, **more: Any) -> Routing:
    with session(collect=True, **more) as opened:
        Stack(layer)(x)
        routing = opened.take()[0].routings["block.mlp"]
    assert routing is not None
    return routing


def loop(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """Token by token, expert by expert, weights scaled instead of rows."""
    bank = layer.bank
    assert isinstance(bank, CompressedFFN)
    p_TE = F.linear(x_TD, layer.router.weight).softmax(-1)
    rows = []
    for x, p in zip(x_TD, p_TE, strict=True):
        order = p.argsort(descending=True)[:TOP_K]
        w = p[order] / p[order].sum()
        main, auxiliary = order[: bank.n_main], order[bank.n_main :]
        theta = torch.ones(bank.deltas.shape[1])
        for i, share in zip(auxiliary, w[bank.n_main :] / w[bank.n_main :].sum(), strict=True):
            theta = theta + share * bank.deltas[i]
        t1 = t3 = theta[:DIM]
        t2 = torch.ones(INNER)
        if bank.inject == "all":
            t2, t3 = theta[DIM : DIM + INNER], theta[DIM + INNER :]
        y = torch.zeros(DIM)
        for i, weight in zip(main, w, strict=False):
            up, bias = bank.up_weight[i], None if bank.up_bias is None else bank.up_bias[i]
            scaled = up * torch.cat([t1.expand(INNER, -1), t3.expand(INNER, -1)]) if bank.gated else up * t1
            hidden = ops.apply_activation(F.linear(x, scaled, bias), bank.activation, bank.gated)
            last = None if bank.down_proj_bias is None else bank.down_proj_bias[i]
            y = y + weight * F.linear(hidden, bank.down_proj[i] * t2, last)
        rows.append(y)
    return torch.stack(rows)


# -- the formula --------------------------------------------------------------------------------------------------


@INJECT
@FORMS
@pytest.mark.parametrize("n_main", [1, 2, 3])
def test_values_and_gradients_equal_the_loop(
    n_main: int, gated: bool, bias: bool, activation: str, inject: str
) -> None:
    layer = spread(change(mixture(gated=gated, bias=bias, activation=activation), n_main=n_main, inject=inject))
    x = tokens().requires_grad_()
    found, wanted = Stack(layer)(x)[0], loop(layer, x[0])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weigh = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    inputs = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad((y * weigh).sum(), inputs) for y in (found, wanted))
    for name, one, two in zip(["x", *dict(layer.named_parameters())], ours, theirs, strict=True):
        assert two.abs().max() > 1e-4, name
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4, msg=name)


@INJECT
@FORMS
@pytest.mark.parametrize("count", [1, 9])
def test_at_the_start_it_is_the_layer_that_chooses_fewer_bit_for_bit(
    count: int, gated: bool, bias: bool, activation: str, inject: str
) -> None:
    form = {"gated": gated, "bias": bias, "activation": activation, "renormalise": False}
    fewer, layer = mixture(top_k=2, **form), change(mixture(**form), inject=inject)
    for kind in (torch.float32, torch.bfloat16):
        x = tokens(count).to(kind)
        with torch.no_grad():
            wanted = Stack(fewer.to(kind))(x)
            assert wanted.abs().max() > 1e-3
            assert torch.equal(Stack(layer.to(kind))(x), wanted)


def test_at_the_start_of_training_it_has_the_bits_of_the_reference_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer, layer = mixture(top_k=2, renormalise=False), change(mixture(renormalise=False))
    x = tokens(64)
    found = Stack(layer)(x)
    assert found.requires_grad
    fused = ops.fused_ffn
    monkeypatch.setattr(ops, "fused_ffn", lambda *a, **k: fused(*a, **{**k, "backend": "loop"}))
    assert torch.equal(found, Stack(fewer)(x))


def test_all_main_is_the_layer_as_it_was() -> None:
    old, x = mixture(), tokens()
    layer = spread(change(old, n_main=TOP_K))
    assert torch.equal(Stack(layer)(x), Stack(old)(x))
    assert seen(layer, x).kept_N is None


def test_shares_sum_to_one_and_say_nothing_where_weights_vanish() -> None:
    weight = torch.tensor([[3e-9, 1e-9], [0.5, 0.25], [0.0, 0.0], [1e-38, 1e-38]])
    found = shares(weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:2], torch.tensor([[0.75, 0.25], [2 / 3, 1 / 3]]))
    assert (found[2:] == 0).all()
    many = torch.rand(100, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    torch.testing.assert_close(shares(many).sum(-1), torch.ones(100), atol=1e-6, rtol=0)


def test_a_router_that_is_sure_leaves_theta_at_one_and_gradients_finite() -> None:
    layer, x = spread(change(mixture(renormalise=False))), tokens()
    with torch.no_grad():
        layer.router.weight.mul_(1e4)
    y = Stack(layer)(x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    with torch.no_grad():
        layer.bank.deltas.zero_()
        torch.testing.assert_close(Stack(layer)(x), y, atol=1e-6, rtol=0)


def test_main_weights_are_those_among_all_or_take_the_auxiliary_share() -> None:
    x = tokens()
    whole = seen(mixture(), x).weight_TK
    plain, filled = (seen(change(mixture(), n_main=1, renormalise_main=on), x).weight_TK for on in (False, True))
    assert torch.equal(plain, whole)
    torch.testing.assert_close(filled[:, 0], torch.ones(len(whole)))
    assert torch.equal(filled[:, 1:], whole[:, 1:])
    open_ended = seen(mixture(renormalise=False), x).weight_TK
    assert open_ended.sum(-1).max() < 1
    filled = seen(change(mixture(renormalise=False), renormalise_main=True), x).weight_TK
    torch.testing.assert_close(filled[:, :2].sum(-1), open_ended.sum(-1))
    torch.testing.assert_close(filled[:, 0] / filled[:, 1], open_ended[:, 0] / open_ended[:, 1])


@pytest.mark.parametrize(("top_k", "given", "wanted"), [(4, None, 2), (5, None, 3), (2, None, 1), (3, 1, 1), (1, 1, 1)])
def test_half_of_the_choices_is_rounded_up(top_k: int, given: int | None, wanted: int) -> None:
    assert main_count(top_k, given) == wanted


# -- who learns what ----------------------------------------------------------------------------------------------


def test_vectors_learn_from_auxiliary_choices_only_and_experts_from_main_ones() -> None:
    layer, x = change(mixture()), tokens(3)
    chosen = seen(layer, x).expert_TK
    Stack(layer)(x).square().sum().backward()
    bank = layer.bank
    auxiliary, main = set(chosen[:, 2:].flatten().tolist()), set(chosen[:, :2].flatten().tolist())
    assert auxiliary < set(range(EXPERTS)), "the case has an expert that is never auxiliary"
    assert main < set(range(EXPERTS)), "the case has an expert that is never main"
    for expert in range(EXPERTS):
        assert bool((bank.deltas.grad[expert] != 0).any()) == (expert in auxiliary)
        assert bool((bank.gate_up_proj.grad[expert] != 0).any()) == (expert in main)


def test_order_of_tokens_and_company_change_nothing() -> None:
    layer, x = spread(change(mixture())), tokens(11)
    turned = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = Stack(layer)(x)
        torch.testing.assert_close(Stack(layer)(x[:, turned]), whole[:, turned], atol=1e-6, rtol=0)
        torch.testing.assert_close(Stack(layer)(x[:, 4:5]), whole[:, 4:5], atol=1e-6, rtol=0)
        assert Stack(layer)(x[:, :0]).shape == (1, 0, DIM)


def test_a_replayed_forward_has_the_same_gradients() -> None:
    class Replayed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: Tensor) -> Any:
            return recompute(self.inner, hidden, use_reentrant=False, context_fn=checkpoint_contexts)

    found = []
    for again in (False, True):
        layer = spread(change(mixture()))
        Stack(Replayed(layer) if again else layer)(tokens()).square().sum().backward()
        found.append([p.grad for p in layer.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_bfloat16_trains_near_float32() -> None:
    layer, x = spread(change(mixture())), tokens(30)
    exact = Stack(layer)(x)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    y = Stack(half)(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().mean() < 0.03 * exact.abs().mean()
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in half.parameters())


def test_losses_see_all_choices_and_counters_those_that_compute() -> None:
    rows = RowCounter()
    routing = seen(change(mixture()), tokens(), recorder=rows)
    assert int(routing.counts_C().sum()) == 9 * TOP_K
    assert rows.counts["block.mlp"].sum() == 9 * 2
    assert torch.equal(routing.kept_N.view(9, TOP_K)[0], torch.tensor([True, True, False, False]))


class Without(Edit):
    """Takes an expert out of what computes."""

    def on_routing(self, site: str, routing: Routing, router: Any, ctx: Any) -> Routing:
        assert routing.kept_N is not None
        return routing.replace(kept_N=routing.kept_N & (routing.expert_N != 2))


def test_an_expert_that_an_edit_takes_out_does_not_become_auxiliary() -> None:
    layer, x = spread(change(mixture())), tokens()
    chosen = seen(layer, x).expert_TK
    assert (chosen[:, :2] == 2).any(1).sum() >= 1
    with torch.no_grad():
        with session(edits=[Without()]):
            found = Stack(layer)(x)[0]
        layer.bank.down_proj[2] = 0
        torch.testing.assert_close(found, Stack(layer)(x)[0], atol=1e-6, rtol=0)


# -- costs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_main", [1, 2, 3])
def test_operations_of_experts_are_exactly_those_of_main_choices(n_main: int) -> None:
    old, x = mixture(), tokens(10)
    layer = spread(change(old, n_main=n_main))
    counted = []
    for one in (old, layer):
        rows = RowCounter()
        with session(recorder=rows), FlopCounterMode(display=False) as run:
            Stack(one)(x)
        counted.append(run.get_total_flops() / 10)
        assert cost(one, Work(10, False, rows.per_token())) == pytest.approx(counted[-1], rel=0.01)
        assert cost(one, Work(10)) == pytest.approx(counted[-1], rel=0.01)
    router = 2 * EXPERTS * DIM
    parts = operations(DIM, INNER, DIM, gated=True, top_k=TOP_K, n_main=n_main, inject="all")
    assert [flops - router for flops in counted] == [parts["main"] + parts["auxiliary"], parts["main"]]
    assert (counted[1] - router) / (counted[0] - router) == n_main / TOP_K


def test_operations_of_vectors_by_hand() -> None:
    """d = 8, f = 12, 2 of 4 main: 28 numbers, two summed with weights, 8 + 8 scaled once, 12 for each main expert."""
    assert width(8, 12, True, "all") == 28
    assert operations(8, 12, 8, gated=True, top_k=4, n_main=2, inject="all")["vectors"] == 2 * 2 * 28 + 16 + 2 * 12
    assert operations(8, 12, 8, gated=False, top_k=4, n_main=1, inject="all")["vectors"] == 2 * 3 * 20 + 8 + 12
    assert operations(8, 12, 8, gated=True, top_k=4, n_main=2, inject="input")["vectors"] == 2 * 2 * 8 + 8
    assert operations(8, 12, 8, gated=True, top_k=4, n_main=4, inject="all")["vectors"] == 0


def test_vectors_are_all_that_is_added() -> None:
    old = mixture()
    for inject, numbers in (("all", 2 * DIM + INNER), ("input", DIM)):
        layer = change(old, inject=inject)
        shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
        assert shapes.pop("bank.deltas") == (EXPERTS, numbers)
        assert shapes == {name: tuple(p.shape) for name, p in old.named_parameters()}
        assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in old.state_dict().items())
        assert not (layer.bank.deltas != 0).any()


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("router", "settings"),
    [
        ("train.expert_choice", {}),
        ("train.dynamic_moe", {}),
        ("train.adamoe", {"num_null": EXPERTS}),
        ("train.switch", {"capacity_factor": 1.0}),
    ],
)
def test_choices_without_ranks_are_refused(router: str, settings: dict[str, Any]) -> None:
    layer = mixture()
    layer.router = built(router, num_experts=EXPERTS, **settings)
    with pytest.raises(ConfigError, match=r"block\.mlp: \w+ does not rank a fixed number of experts"):
        change(layer)


class Ragged(Edit):
    """Drops a choice of the first token."""

    def on_routing(self, site: str, routing: Routing, router: Any, ctx: Any) -> Routing:
        n = slice(1, None)
        return routing.replace(
            token_N=routing.token_N[n], expert_N=routing.expert_N[n], weight_N=routing.weight_N[n], top_k=None,
            kept_N=None,
        )  # fmt: skip


def test_a_ragged_routing_is_refused_when_it_arrives() -> None:
    with session(edits=[Ragged()]), pytest.raises(ContextError, match="ranked choices among 6 experts; got a ragged"):
        Stack(change(mixture()))(tokens())


def test_what_cannot_be_compressed_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="n_main=5, but the router chooses 4"):
        change(mixture(), n_main=5)
    with pytest.raises(ConfigError, match="chooses 1 expert, none of which can be auxiliary"):
        change(mixture(top_k=1, renormalise=False))
    with pytest.raises(ConfigError, match="need a mixture of equal feed-forward experts; a Linear stands there"):
        change(nn.Linear(DIM, DIM))
    with pytest.raises(ConfigError, match="has compressed experts already; strip them first"):
        change(change(mixture()))
    with pytest.raises(ConfigError, match="has no compressed experts to strip"):
        change(mixture(), strip=True)
    with pytest.raises(ConfigError, match="n_main"):
        method(ID).configure({"n_main": 0})
    with pytest.raises(ConfigError, match="leave the other settings out"):
        method(ID).configure({"strip": True, "n_main": 2})
    unknown = mixture()
    del unknown.router.made_by
    with pytest.raises(ConfigError, match="nothing says how its SoftmaxTopK was made"):
        change(unknown)


def test_what_was_frozen_stays_frozen_and_vectors_learn() -> None:
    old = mixture()
    old.bank.down_proj.requires_grad_(False)
    old.router.requires_grad_(False)
    learns = {name for name, parameter in change(old).named_parameters() if parameter.requires_grad}
    assert learns == {"bank.gate_up_proj", "bank.deltas"}


def test_the_old_layer_stays_as_it_was() -> None:
    old, x = mixture(), tokens()
    before = Stack(old)(x)
    layer = spread(change(old))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(Stack(old)(x), before)
    assert type(old.router).__name__ == "SoftmaxTopK"
    assert seen(old, x).kept_N is None
