"""Duo-LLM: two modules, one for each token; chances, temperature, budget."""

import pytest
import torch
from torch import Tensor, nn

import moestro
import moestro.models.load
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.registry import method
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.methods.train.duo_llm import BudgetLoss
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model
from tests.methods.train.helpers import DIM, context


BIG, RATIO = 32, 4


def build(**config: object) -> MoELayer:
    torch.manual_seed(0)
    use = method("train.duo_llm")
    site = Site(path="block.mlp", kind="mlp", module=nn.Identity(), dim=DIM, out=DIM)
    layer = use.build(site, use.configure({"big": BIG, "small_ratio": RATIO, **config}), Shared())
    assert isinstance(layer, MoELayer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def ffn(layer: MoELayer, expert: int, x: Tensor) -> Tensor:
    gate, up, down = (layer.bank.weight(expert, name) for name in ("gate", "up", "down"))
    return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_the_small_module_is_a_ratio_of_the_big_one_and_skip_costs_nothing() -> None:
    layer = build(skip=True)
    assert layer.bank.weight(0, "down").shape == (DIM, BIG)
    assert layer.bank.weight(1, "down").shape == (DIM, BIG // RATIO)
    assert layer.bank.flops_per_row(0) == RATIO * layer.bank.flops_per_row(1)
    assert (layer.router.num_experts, layer.router.num_null) == (2, 1)


@pytest.mark.parametrize("fixed", ["big", "small", "skip"])
def test_a_fixed_route_is_that_module_alone(fixed: str) -> None:
    layer = build(route="fixed", fixed=fixed, skip=True)
    x = torch.randn(2, 7, DIM)
    y = layer(x)
    if fixed == "skip":
        assert (y == 0).all()
    else:
        torch.testing.assert_close(y, ffn(layer, int(fixed == "small"), x), atol=1e-5, rtol=1e-5)


def test_all_big_equals_the_dense_layer_bit_for_bit() -> None:
    layer = build(route="fixed", fixed="big")
    use = method("train.moe")
    router = {"method": "train.random_router", "config": {"mode": "random", "top_k": 1}}
    form = {"num_experts": 1, "expert_size": BIG, "activation": "silu", "gated": True, "bias": False, "router": router}
    site = Site(path="block.mlp", kind="mlp", module=nn.Identity(), dim=DIM, out=DIM)
    dense = use.build(site, use.configure(form), Shared())
    dense.bank.load_state_dict(layer.bank.parts[0].state_dict())
    x = torch.randn(3, 11, DIM)
    assert torch.equal(layer(x), dense(x))


def test_random_routing_mixes_modules_by_their_chances() -> None:
    layer = build(skip=True, probabilities=[0.2, 0.5, 0.3])
    count = 20_000
    x = torch.randn(1, count, DIM)
    with session(collect=True) as opened:
        y = layer(x)
    (ctx,) = opened.take()
    routing = ctx.routings["block.mlp"]
    share = routing.counts_C() / count
    for found, chance in zip(share.tolist(), [0.2, 0.5, 0.3], strict=True):
        assert abs(found - chance) < 4 * (chance * (1 - chance) / count) ** 0.5
    expected = torch.stack([ffn(layer, 0, x[0]), ffn(layer, 1, x[0]), torch.zeros(count, DIM)])
    chosen = expected.gather(0, routing.expert_TK[:, 0].view(1, -1, 1).expand(1, count, DIM))[0]
    torch.testing.assert_close(y[0], chosen, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("skip", "chances"), [(False, [0.5, 0.5]), (True, [0.45, 0.45, 0.1])])
def test_without_chances_big_and_small_are_equally_likely(skip: bool, chances: list[float]) -> None:
    count = 20_000
    with session(collect=True) as opened:
        build(skip=skip)(torch.randn(1, count, DIM))
    (ctx,) = opened.take()
    share = (ctx.routings["block.mlp"].counts_C() / count).tolist()
    assert share == pytest.approx(chances, abs=4 * 0.5 / count**0.5)


def test_layers_and_tokens_draw_for_themselves() -> None:
    torch.manual_seed(5)
    one, two = build(), build()
    torch.manual_seed(1)
    with session(collect=True) as opened:
        one(torch.randn(1, 400, DIM))
        two(torch.randn(1, 400, DIM))
    first, second = (ctx.routings["block.mlp"].expert_TK[:, 0].float() for ctx in opened.take())
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.15
    assert abs(float(torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1])) < 0.15


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_a_learned_route_trains_as_a_soft_mixture_and_runs_hard(tau: float, skip: bool) -> None:
    layer = build(route="learned", skip=skip)
    x, wish = torch.randn(9, DIM), torch.randn(9, DIM)
    layer.train()
    with session(values={"duo_tau": tau}):
        soft = layer(x[None])[0]
        p = (x @ layer.router.weight.T / tau).softmax(-1)
        expected = p[:, :1] * ffn(layer, 0, x) + p[:, 1:2] * ffn(layer, 1, x)
        torch.testing.assert_close(soft, expected, atol=1e-5, rtol=1e-5)
        names, tensors = zip(*layer.named_parameters(), strict=True)
        ours, theirs = (torch.autograd.grad((y * wish).sum(), tensors) for y in (soft, expected))
        for name, a, b in zip(names, ours, theirs, strict=True):
            assert b.abs().max() > 1e-3, name
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=name)
        hard = layer.eval()(x[None])[0]
    modules = torch.stack([ffn(layer, 0, x), ffn(layer, 1, x), torch.zeros(9, DIM)])
    best = p.argmax(-1)
    assert len(best.unique()) > 1
    torch.testing.assert_close(hard, modules[best, torch.arange(9)], atol=1e-5, rtol=1e-5)


def test_a_falling_temperature_hardens_the_mixture() -> None:
    layer = build(route="learned").train()
    x = torch.randn(1, 30, DIM)
    hard = layer.eval()(x)
    gaps = []
    for tau in (1.0, 0.3, 0.01):
        with session(values={"duo_tau": tau}):
            gaps.append(float((layer.train()(x) - hard).detach().abs().mean()))
    assert gaps[0] > gaps[1] > 2 * gaps[2]


def budget_of(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with session(collect=True) as opened:
        model(input_ids=ids, attention_mask=mask)
    (ctx,) = opened.take()
    return torch.stack([term.total for (_, name), term in ctx.losses.items() if name == "budget"]).sum().detach()


def learned(budget: float = 0.25) -> nn.Module:
    model = moestro.models.load.adopt(tiny_model("llama")).train()
    swap(model, "train.duo_llm", {"route": "learned", "small_ratio": 4, "budget": budget})
    return model


def test_the_budget_is_global_over_layers() -> None:
    model = learned(budget=0.5)
    first, second = mixture_layers(model).values()
    ids = torch.tensor([[3, 9, 4, 27]])
    with torch.no_grad():
        for layer in (first, second):
            layer.router.weight.zero_()
    assert float(budget_of(model, ids)) == pytest.approx(0.0, abs=1e-12)  # P_big is one half everywhere
    # One layer always big, the other never: the mean is still on budget, although no layer is.
    edits = {first.site: 50.0, second.site: -50.0}

    class Push(moestro.core.session.Edit):
        def on_scores(self, site, scores, ctx):
            logits = scores.logits_TC + torch.tensor([edits[site], 0.0])
            return scores.replace(
                logits_TC=logits, select_TC=logits, gate_TC=logits.softmax(-1), prob_TC=logits.softmax(-1)
            )

    with session(edits=[Push()]):
        assert float(budget_of(model, ids)) == pytest.approx(0.0, abs=1e-10)
        edits[second.site] = 50.0
        assert float(budget_of(model, ids)) == pytest.approx(0.25, abs=1e-6)  # (1 - 0.5)^2


def test_padding_does_not_count_for_the_budget() -> None:
    model = learned(budget=0.9)
    with torch.no_grad():
        for layer in mixture_layers(model).values():
            layer.router.weight.normal_(std=3.0)
    ids = torch.tensor([[5, 9, 17]])
    padded = torch.tensor([[0, 0, 5, 9, 17]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    alone, with_pads = budget_of(model, ids), budget_of(model, padded, mask)
    torch.testing.assert_close(alone, with_pads, atol=1e-6, rtol=1e-5)
    assert float(alone) > 1e-3


def test_the_budget_loss_by_hand() -> None:
    ctx = context(1, 3, valid=[True, True, False])
    layer = build(route="learned")
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0, 0.0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]))
    x = torch.zeros(3, DIM)
    x[:, 0] = torch.log(torch.tensor([3.0, 1.0, 9.0]))  # P_big 3/4, 1/2, and a padded token
    routing = layer.router.choose(layer.router.score(x, layer.bank, ctx), ctx)
    loss = BudgetLoss(0.25)("block.mlp", routing, ctx)
    assert float(loss.detach()) == pytest.approx((0.625 - 0.25) ** 2)


def test_a_model_saves_loads_and_generates(tmp_path: object) -> None:
    model = learned().eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for layer in mixture_layers(model).values():
            for parameter in layer.parameters():
                parameter.normal_(std=0.3)
    ids = torch.tensor([[5, 9, 17, 3]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    moestro.save(model, tmp_path)
    again = moestro.load(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, logits, atol=1e-6, rtol=1e-6)
    settings = {"max_new_tokens": 6, "do_sample": False}
    cached = again.generate(ids, **settings)
    assert torch.equal(cached, again.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("route", ["random", "learned"])
def test_checkpointed_and_compiled_models_equal_the_plain_one(route: str) -> None:
    model = moestro.models.load.adopt(tiny_model("llama")).train()
    swap(model, "train.duo_llm", {"route": route, "small_ratio": 4})
    ids = torch.tensor([[5, 9, 17, 3, 22, 41]])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(4)
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    moestro.checkpoint(model)
    replayed = gradients()
    assert plain.keys() == replayed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, replayed[name]), name
    model.activation_checkpointing_disable()
    model.eval()
    compiled = torch.compile(model.model, backend="eager")
    outputs = []
    for run in (model.model, compiled):
        torch.manual_seed(7)
        with torch.no_grad():
            outputs.append(run(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"small_ratio": 33}, "small_ratio=33 leaves nothing of big=32; at most 32"),
        ({"probabilities": [0.5, 0.3]}, "must be >= 0 and sum to 1"),
        ({"probabilities": [0.5, 0.3, 0.2]}, "3 entries for 2 choices"),
        ({"fixed": "skip"}, "needs skip=True"),
        ({"budget": 0.5}, "has nothing to learn"),
        ({"budget": 1.5, "route": "learned"}, "less than or equal to 1"),
        ({"big": None}, "does not tell the inner width; give big"),
    ],
)
def test_wrong_settings_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**config)
