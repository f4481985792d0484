"""Null experts: weights by hand, a plain loop, what costs nothing, surgery on a trained mixture."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import moestro
from moestro import surgery
from moestro.core.bank import StackedFFN
from moestro.core.dispatch import LocalDispatcher
from moestro.core.errors import ConfigError, SaveError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.registry import method
from moestro.core.routing import Routing
from moestro.core.session import Edit, session
from moestro.core.site import Shared, Site
from moestro.methods.train.adamoe import NullTopK, RandomDepth, real_per_token
from moestro.models.export import export
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.surgery import plans
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_folder, tiny_model
from tests.methods.train.helpers import DIM, build, context, layer, route
from tests.surgery.helpers import ids, layers_of, logits, mixture


INF = float("inf")


def given(table: list[list[float]], **config: Any) -> tuple[Any, Tensor]:
    """A router whose logits are given: the input is one-hot."""
    logits_TC = torch.tensor(table)
    config = {"num_experts": 2, "num_null": logits_TC.shape[1] - config.get("num_experts", 2), **config}
    router = build("train.adamoe", **config)
    router.weight = nn.Parameter(logits_TC.T.contiguous())
    return router, torch.eye(len(table))


def random_layer(**config: Any) -> MoELayer:
    """A layer of width DIM whose logits are far apart."""
    router = build("train.adamoe", **config)
    made = layer(router)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.7)
    return made


class Seen:
    """A recorder that keeps routings by site."""

    def __init__(self) -> None:
        self.routings: dict[str, Routing] = {}

    def record(self, site: str, routing: Routing, ctx: Any) -> None:
        self.routings[site] = routing


# -- weights -----------------------------------------------------------------------------------------------------

# Two experts, two nulls. Token 0 finds both experts and a null, token 1 one expert, token 2 only nulls.
TABLE = [[2.0, 1.0, 1.5, 0.0], [0.0, 1.0, 3.0, 2.0], [-9.0, -8.0, 1.0, 2.0]]


def test_weights_over_true_experts_by_hand() -> None:
    router, x = given(TABLE, top_k=3)
    routing = route(router, x, context(1, 3))
    assert routing.expert_TK.tolist() == [[0, 2, 1], [2, 3, 1], [3, 2, 1]]
    part = math.e / (1 + math.e)
    expected = torch.tensor([[part, 0, 1 - part], [0, 0, 1], [0, 0, 1]])
    torch.testing.assert_close(routing.weight_TK, expected)
    router, x = given(TABLE, top_k=2)
    routing = route(router, x, context(1, 3))
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    assert real_per_token(routing).tolist() == [1, 0, 0]


def test_weights_over_all_chosen_by_hand() -> None:
    router, x = given(TABLE, top_k=2, normalise="all")
    routing = route(router, x, context(1, 3))
    half = 1 / (1 + math.exp(-0.5))
    part = math.e / (1 + math.e)
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[half, 1 - half], [part, 1 - part], [part, 1 - part]]))


def test_true_weights_equal_masked_and_divided_probabilities() -> None:
    """The other way to write it: softmax over all choices, nulls set to 0, divided by what is left."""
    torch.manual_seed(5)
    router, x = given(torch.randn(200, 12).tolist(), num_experts=7, top_k=4)
    routing = route(router, x, context(1, 200))
    probability = router.weight.T.softmax(-1).gather(1, routing.expert_TK).masked_fill(routing.expert_TK >= 7, 0.0)
    total = probability.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weight_TK, probability / total.clamp(min=1e-30), atol=1e-6, rtol=0)
    live = real_per_token(routing) > 0
    assert 0 < int(live.sum()) < 200
    sums = routing.weight_TK.sum(-1)
    torch.testing.assert_close(sums[live], torch.ones(int(live.sum())))
    assert (sums[~live] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_hold_where_probabilities_underflow(dtype: torch.dtype) -> None:
    router, x = given([[-256.0, -258.0, 200.0, -400.0], [-1.0, -2.0, 200.0, 300.0]], top_k=3)
    routing = route(router.to(dtype), x.to(dtype), context(1, 2))
    assert routing.scores is not None
    assert routing.scores.logits_TC.dtype == torch.float32
    assert routing.expert_TK.tolist() == [[2, 0, 1], [3, 2, 0]]
    part = math.exp(2) / (1 + math.exp(2))
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[0, part, 1 - part], [0, 0, 1]]), atol=1e-6, rtol=0)
    routing.weight_TK.sum().backward()
    assert router.weight.grad.isfinite().all()


def test_ties_go_to_experts_first() -> None:
    router, x = given([[1.0, 2.0, 1.0, 2.0, 1.0, 2.0]], num_experts=2, top_k=4)
    assert route(router, x, context(1, 1)).expert_TK.tolist() == [[1, 3, 5, 0]]


@pytest.mark.parametrize("num_experts", [1, 3, 5, 8])
def test_copied_rows_tie_in_every_bit(num_experts: int) -> None:
    for tokens in (1, 2, 7, 64):
        router = build("train.adamoe", num_experts=num_experts, num_null=2 * num_experts, top_k=3, bias=True)
        with torch.no_grad():
            router.weight.copy_(torch.randn(num_experts, DIM).repeat(3, 1))
            router.bias.copy_(torch.randn(num_experts).repeat(3))
        own, *copies = router.logits(torch.randn(tokens, DIM)).split(num_experts, -1)
        assert all(torch.equal(own, copy) for copy in copies)


# -- the layer ---------------------------------------------------------------------------------------------------


def loop(made: MoELayer, x_TD: Tensor, *, identity: bool = False) -> Tensor:
    """The layer token by token, from the formula; normalise="true" unless ``identity``."""
    router, bank = made.router, made.bank
    rows = []
    for x in x_TD:
        z = router.weight @ x
        value = z.tolist()
        chosen = sorted(range(len(z)), key=lambda i: (-value[i], i))[: router.top_k]
        real = [i for i in chosen if i < router.num_experts]
        over = chosen if identity else real
        total = sum((z[i].exp() for i in over), torch.zeros(()))
        y = torch.zeros_like(x)
        for i in real:
            hidden = nn.functional.silu(bank.weight(i, "gate") @ x) * (bank.weight(i, "up") @ x)
            y = y + z[i].exp() / total * (bank.weight(i, "down") @ hidden)
        if identity:
            y = y + sum(z[i].exp() / total for i in chosen if i >= router.num_experts) * x
        rows.append(y)
    return torch.stack(rows)


def check_against_loop(made: MoELayer, *, identity: bool) -> None:
    torch.manual_seed(2)
    x = torch.randn(40, DIM)
    wish = torch.randn(40, DIM)
    found, expected = made(x[None])[0], loop(made, x, identity=identity)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    names, tensors = zip(*made.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad((y * wish).sum(), tensors) for y in (found, expected))
    for name, one, two in zip(names, ours, theirs, strict=True):
        assert two.abs().sum() > 0, name
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4, msg=name)


def test_outputs_and_gradients_equal_a_plain_loop() -> None:
    check_against_loop(random_layer(num_experts=4, num_null=3, top_k=4), identity=False)


def identity_layer(there: MoELayer | None = None, out: int = DIM, **config: Any) -> MoELayer:
    there = there or random_layer(num_experts=config["num_experts"], num_null=0, top_k=1)
    use = method("train.adamoe")
    config = {"nulls": "identity", "normalise": "all", "init": "random", **config}
    site = Site(path="block.mlp", kind="mlp", module=there, dim=DIM, out=out)
    made = use.build(site, use.configure(config), Shared())
    if isinstance(made, MoELayer):
        nn.init.normal_(made.router.weight, std=0.7)
    return made


def test_identity_nulls_equal_a_plain_loop() -> None:
    check_against_loop(identity_layer(num_experts=4, num_null=3, top_k=4), identity=True)


def test_identity_nulls_alone_give_the_input() -> None:
    made = identity_layer(num_experts=3, num_null=2, top_k=2)
    with torch.no_grad():
        made.router.weight[3:] = 5.0
        made.router.weight[:3] = -5.0
    x = torch.rand(4, DIM) + 0.1
    torch.testing.assert_close(made(x[None])[0], x)


def test_what_surrounds_the_experts_stays_when_nulls_give_their_input() -> None:
    router, loss = build("train.softmax_topk", num_experts=4, top_k=2), build("train.null_balance_loss")
    parts = {name: nn.Linear(DIM, DIM) for name in ("shared", "pre", "post", "noise")}
    there = layer(router, losses={"balance": loss}, **parts)
    there.dispatcher = LocalDispatcher()
    made = identity_layer(there, num_experts=4)
    again = identity_layer(there=made, num_experts=4)
    for name in ("bank", "dispatcher", *parts):
        assert getattr(made, name) is getattr(there, name), name
    assert made.losses["balance"] is loss
    assert isinstance(again, NullTopK), "nulls that give their input already need no new mixture"


@pytest.mark.parametrize("top_k", [1, 3])
def test_without_nulls_it_is_the_plain_layer_bit_for_bit(top_k: int) -> None:
    made = random_layer(num_experts=4, num_null=0, top_k=top_k)
    plain = layer(build("train.softmax_topk", num_experts=4, top_k=top_k, softmax="chosen"))
    plain.load_state_dict(made.state_dict())
    x = torch.randn(2, 9, DIM)
    one, two = made(x), plain(x)
    assert torch.equal(one, two)
    grads = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in ((one, made), (two, plain))]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


class Watched(StackedFFN):
    """A bank that notes what it is asked to compute."""

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        self.asked = (routing.token_N.tolist(), routing.expert_N.tolist())
        return super().forward(x_TD, routing)


def test_a_token_with_nulls_only_gets_exactly_nothing_and_no_expert() -> None:
    router, x = given(TABLE, top_k=2)
    made = MoELayer(router, Watched(2, 3, 5), site="s")
    y = made(x[None])[0]
    assert made.bank.asked == ([0], [0]), "only token 0 has an expert among its two best"
    assert (y[1:] == 0).all()
    assert y[0].abs().sum() > 0


@pytest.mark.parametrize("num_null", [0, 5, 40])
def test_floating_point_operations_are_those_of_the_real_assignments(num_null: int) -> None:
    made = random_layer(num_experts=5, num_null=num_null, top_k=3)
    x = torch.randn(1, 64, DIM)
    seen = Seen()
    with torch.no_grad(), session(recorder=seen), FlopCounterMode(display=False) as counter:
        made(x)
    load = float(real_per_token(seen.routings["block.mlp"]).float().mean())
    scores = 2 * 64 * DIM * (5 + num_null)
    assert load < 3 or not num_null
    assert counter.get_total_flops() - scores == pytest.approx(64 * load * made.bank.flops_per_row(0))


def test_one_true_expert_teaches_the_router_nothing_unless_nulls_share_the_weight() -> None:
    """Token 1 has the weight 1 whatever its logits; only tokens with two experts or shared weights have a gradient."""
    grads = {}
    for normalise in ("true", "all"):
        router, x = given(TABLE, top_k=3, normalise=normalise)
        made = MoELayer(router, StackedFFN(2, 3, 5), site="s")
        (grads[normalise],) = torch.autograd.grad(made(x[None]).sum(), router.weight)
    assert (grads["true"][:, 1:] == 0).all()
    assert grads["true"][:2, 0].abs().min() > 0
    assert grads["all"].abs().sum(0).min() > 0


def test_the_balance_loss_holds_the_even_load() -> None:
    """A router that begins with experts only comes to use k n / (n + m) of them."""
    router = build("train.adamoe", num_experts=4, num_null=8, top_k=3, bias=True)
    assert router.config.even_load == 1.0
    with torch.no_grad():
        router.bias[:4] = 1.0
    made = layer(router, losses={"balance": build("train.null_balance_loss")})
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    torch.manual_seed(4)
    loads = []
    for _ in range(120):
        seen = Seen()
        with session(recorder=seen, collect=True) as opened:
            made(torch.randn(1, 256, DIM))
        (ctx,) = opened.take()
        ctx.losses["block.mlp", "balance"].total.backward()
        optimizer.step()
        optimizer.zero_grad()
        loads.append(float(real_per_token(seen.routings["block.mlp"]).float().mean()))
    assert loads[0] > 2.5
    assert sum(loads[-20:]) / 20 == pytest.approx(1.0, rel=0.15)


# -- a trained mixture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("copies", "top_k"), [(1, 4), (2, 6), (1, 3), (2, 4)])
def test_tiled_nulls_keep_a_trained_mixtral_also_on_disk(copies: int, top_k: int, tmp_path: Path) -> None:
    """k = 2 (1 + c), and every smaller k whose best 2 pairs still hold both experts."""
    plain = tiny_folder("mixtral", tmp_path / "stock")
    before = logits(plain)
    model = moestro.load(tmp_path / "stock")
    rows = layers_of(model)[0].router.weight.clone()
    swap(model, "train.adamoe", {"num_experts": 5, "num_null": 5 * copies, "top_k": top_k})
    assert torch.equal(layers_of(model)[0].router.weight, rows.repeat(1 + copies, 1))
    seen = Seen()
    with session(recorder=seen):
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    for routing in seen.routings.values():
        assert (routing.num_null, routing.top_k) == (5 * copies, top_k)
        assert (real_per_token(routing) == 2).all()
    moestro.save(model, tmp_path / "own")
    again = moestro.load(tmp_path / "own")
    torch.testing.assert_close(logits(again), before, atol=1e-5, rtol=0)
    assert torch.equal(layers_of(again)[1].router.weight, layers_of(model)[1].router.weight)


def test_a_smaller_k_takes_the_second_expert_away() -> None:
    model = adopt(tiny_model("mixtral"))
    swap(model, "train.adamoe", {"num_experts": 5, "num_null": 5, "top_k": 2})
    top1 = adopt(tiny_model("mixtral", num_experts_per_tok=1))
    torch.testing.assert_close(logits(model), logits(top1), atol=1e-5, rtol=0)


def test_a_router_with_a_bias_keeps_it() -> None:
    model = adopt(tiny_model("gpt_oss"))
    before = logits(model)
    with pytest.raises(ConfigError, match="give bias=true"):
        swap(model, "train.adamoe", {"num_experts": 5, "num_null": 5, "top_k": 4})
    swap(model, "train.adamoe", {"num_experts": 5, "num_null": 5, "top_k": 4, "bias": True})
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


def nulled(**config: Any) -> Any:
    """A tiny Mixtral with nulls whose rows were trained away from their sources."""
    model = adopt(tiny_model("mixtral"))
    swap(model, "train.adamoe", {"num_experts": 5, "num_null": 5, "top_k": 3, **config})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for made in mixture_layers(model).values():
            made.router.weight[5:].normal_(0.0, 0.2, generator=generator)
    return model


IDENTITY = {"nulls": "identity", "normalise": "all"}


@pytest.mark.parametrize("config", [{}, {"normalise": "all"}, IDENTITY])
def test_saved_rows_of_nulls_come_back_and_generation_agrees(config: dict[str, Any], tmp_path: Path) -> None:
    model = nulled(**config)
    moestro.save(model, tmp_path / "own")
    again = moestro.load(tmp_path / "own")
    assert torch.equal(logits(again), logits(model))
    plain = nulled()
    assert config == {} or (logits(plain) - logits(model)).abs().max() > 1e-3
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        cached = again.generate(ids(), use_cache=True, **options)
        assert torch.equal(cached, again.generate(ids(), use_cache=False, **options))
        whole = again(cached).logits[:, :-1].argmax(-1)
    assert torch.equal(whole[:, 6:], cached[:, 7:]), "each new token is the best one of a whole forward"


def test_padding_and_later_tokens_change_nothing() -> None:
    model = nulled()
    batch = ids(2, 7)
    before = logits(model, batch)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)], 1)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), batch], 1)
    torch.testing.assert_close(logits(model, padded, attention_mask=mask)[:, 3:], before, atol=1e-5, rtol=0)
    seen, later = Seen(), Seen()
    with session(recorder=seen):
        logits(model, batch)
    other = torch.cat([batch[:, :4], batch[:, 4:] - 1], 1)
    with session(recorder=later):
        torch.testing.assert_close(logits(model, other)[:, :4], before[:, :4], atol=1e-6, rtol=0)
    for site, routing in seen.routings.items():
        first, second = (r.expert_TK.view(2, 7, -1) for r in (routing, later.routings[site]))
        assert torch.equal(first[:, :4], second[:, :4])
        assert not torch.equal(first, second)


@pytest.mark.parametrize("edits", [[], [RandomDepth(1.4)]])
def test_checkpointing_changes_no_gradient(edits: list[Edit]) -> None:
    found = []
    for checkpointed in (False, True):
        model = (nulled() if not edits else adopt(tiny_model("mixtral"))).train()
        if checkpointed:
            moestro.checkpoint(model)
        torch.manual_seed(11)
        with session(edits=edits):
            model(input_ids=ids(), labels=ids()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_agrees() -> None:
    model = nulled()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids()).logits, logits(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", [{}, IDENTITY])
def test_surgery_takes_the_rows_of_nulls_along(config: dict[str, Any], tmp_path: Path) -> None:
    model = nulled(**config)
    before = logits(model)
    rows = layers_of(model)[0].router.weight.clone()
    order = [4, 2, 0, 1, 3]
    surgery.apply(model, plans.prune(OpenModel(model).shape, {0: order, 1: order}, method="test"))
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    surgery.apply(model, plans.prune(OpenModel(model).shape, {0: [0, 2, 3]}, method="test"))
    router = layers_of(model)[0].router
    assert (router.num_experts, router.num_null) == (3, 5)
    assert torch.equal(router.weight, rows[[4, 0, 1, 5, 6, 7, 8, 9]])
    moestro.save(model, tmp_path / "own")
    assert torch.equal(logits(moestro.load(tmp_path / "own")), logits(model))


def test_another_k_later_keeps_the_trained_rows() -> None:
    model = nulled()
    rows = layers_of(model)[0].router.weight.clone()
    swap(model, "train.adamoe", {"num_experts": 5, "num_null": 5, "top_k": 6})
    assert torch.equal(layers_of(model)[0].router.weight, rows)
    assert layers_of(model)[0].router.top_k == 6
    with pytest.raises(ConfigError, match="has 5 nulls already"):
        swap(model, "train.adamoe", {"num_experts": 5, "num_null": 10, "top_k": 6})


@pytest.mark.parametrize("normalise", ["true", "all"])
def test_nulls_that_gave_their_input_can_give_nothing_again(normalise: str, tmp_path: Path) -> None:
    model, plain = nulled(**IDENTITY), nulled(normalise=normalise)
    swap(model, "train.adamoe", {"num_experts": 5, "num_null": 5, "top_k": 3, "normalise": normalise})
    assert torch.equal(logits(model), logits(plain))
    moestro.save(model, tmp_path / "own")
    assert torch.equal(logits(moestro.load(tmp_path / "own")), logits(plain))


def test_random_rows_for_nulls_leave_the_experts_rows() -> None:
    model = adopt(tiny_model("mixtral"))
    rows = layers_of(model)[0].router.weight.clone()
    swap(model, "train.adamoe", {"num_experts": 5, "num_null": 3, "top_k": 3, "init": "random"})
    weight = layers_of(model)[0].router.weight
    assert torch.equal(weight[:5], rows)
    assert 0.01 < weight[5:].detach().std() < 0.03


def test_no_stock_architecture_passes_for_it(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="its router is NullTopK"):
        export(nulled(), tmp_path / "stock")


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts": 4, "num_null": 2, "top_k": 7}, "top_k=7 but there are 6 choices, 2 of them nulls"),
        ({"num_null": -1}, "num_null=-1"),
        ({"nulls": "identity"}, 'give normalise="all"'),
        ({"nulls": "identity", "normalise": "all", "num_null": 0}, "num_null=0"),
        ({"num_nulls": 8}, "did you mean 'num_null'"),
    ],
)
def test_wrong_settings_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method("train.adamoe").configure(config)
    assert method("train.adamoe").configure({"num_experts": 2, "num_null": 6, "top_k": 5}).top_k == 5


@pytest.mark.parametrize(
    ("router", "config", "message"),
    [
        ("train.softmax_topk", {"num_null": 6}, "num_null=6 is no multiple of num_experts=4"),
        ("train.hash_router", {"num_null": 4}, "a HashRouter has no rows to tile"),
        ("train.softmax_topk", {"num_experts": 5, "num_null": 5}, "chooses among 5 experts, the bank has 4"),
    ],
)
def test_a_mixture_that_cannot_get_nulls_stays_as_it_is(router: str, config: dict[str, Any], message: str) -> None:
    model = mixture(router={"method": router, "config": {"top_k": 2}})
    before = logits(model)
    with pytest.raises(ConfigError, match=message):
        swap(model, "train.adamoe", {"num_experts": 4, **config})
    assert torch.equal(logits(model), before)


def test_identity_nulls_need_a_mixture_as_wide_as_its_input() -> None:
    with pytest.raises(ConfigError, match=r"need a mixture there; swap train.moe in first"):
        swap(adopt(tiny_model("llama")), "train.adamoe", IDENTITY)
    with pytest.raises(ConfigError, match=f"makes 9 values of {DIM}"):
        identity_layer(num_experts=4, out=9)
