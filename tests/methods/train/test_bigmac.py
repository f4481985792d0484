"""BigMac: narrow between two projections, equal to the plain layer where it must be, counted where it travels."""

import pytest
import torch
from torch import Tensor, nn

import moestro
import moestro.models.load
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.registry import method
from moestro.core.routing import Routing
from moestro.core.session import Edit, session
from moestro.core.site import Shared, Site
from moestro.methods.train.bigmac import inner_width, layer_parameters, narrow_width
from moestro.models.swap import swap
from moestro.testing.distributed import run_distributed
from moestro.testing.tiny import tiny_model
from moestro.training.expert_parallel import shard_experts


WIDTH = 16


def build(width: int = WIDTH, **config: object) -> MoELayer:
    torch.manual_seed(0)
    use = method("train.bigmac")
    site = Site(path="mlp", kind="mlp", module=nn.Identity(), dim=width, out=width)
    settings = {"num_experts": 4, "top_k": 2, "down_ratio": 0.5, **config}
    layer = use.build(site, use.configure(settings), Shared())
    assert isinstance(layer, MoELayer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def loop(layer: MoELayer, x_TD: Tensor, *, ascend_first: bool = False) -> Tensor:
    """Token by token from the formula; with ``ascend_first`` every expert's answer goes up before the sum."""
    reads_narrow = hasattr(layer.router, "inner")
    weight = (layer.router.inner if reads_narrow else layer.router).weight
    gated = layer.bank.gated
    rows = []
    for x in x_TD:
        narrow = layer.pre.weight @ x
        p = (weight @ (narrow if reads_narrow else x)).softmax(-1)
        total = torch.zeros(())
        for i in p.topk(layer.router.top_k).indices.tolist():
            hidden = layer.bank.weight(i, "up") @ narrow
            if gated:
                hidden = nn.functional.silu(layer.bank.weight(i, "gate") @ narrow) * hidden
            else:
                hidden = nn.functional.gelu(hidden)
            answer = p[i] * (layer.bank.weight(i, "down") @ hidden)
            total = total + (layer.post.weight @ answer if ascend_first else answer)
        rows.append(total if ascend_first else layer.post.weight @ total)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "config", [{}, {"gated": True, "activation": "silu"}, {"router_input": "down"}], ids=["plain", "gated", "reads x'"]
)
def test_outputs_and_gradients_equal_a_plain_loop(config: dict[str, object]) -> None:
    layer = build(**config)
    x, wish = torch.randn(12, WIDTH), torch.randn(12, WIDTH)
    found, expected = layer(x[None])[0], loop(layer, x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    names, tensors = zip(*layer.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad((y * wish).sum(), tensors) for y in (found, expected))
    for name, one, two in zip(names, ours, theirs, strict=True):
        assert two.abs().max() > 1e-3, name
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4, msg=name)


def test_narrow_sum_then_ascent_equals_ascent_of_every_expert() -> None:
    layer = build()
    x = torch.randn(12, WIDTH)
    torch.testing.assert_close(layer(x[None])[0], loop(layer, x, ascend_first=True), atol=1e-5, rtol=1e-5)


def test_without_narrowing_and_with_identity_projections_it_is_the_plain_mixture() -> None:
    layer = build(down_ratio=1.0)
    use = method("train.moe")
    router = {"method": "train.softmax_topk", "config": {"top_k": 2, "renormalise": False}}
    site = Site(path="mlp", kind="mlp", module=nn.Identity(), dim=WIDTH, out=WIDTH)
    form = {"num_experts": 4, "expert_size": WIDTH, "activation": "gelu", "gated": False, "bias": False}
    plain = use.build(site, use.configure({**form, "router": router}), Shared())
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith(("pre.", "post."))})
    with torch.no_grad():
        layer.pre.weight.copy_(torch.eye(WIDTH))
        layer.post.weight.copy_(torch.eye(WIDTH))
    x = torch.randn(2, 9, WIDTH)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=1e-6)


def test_projections_keep_the_scale_of_rows_at_the_start() -> None:
    torch.manual_seed(0)
    use = method("train.bigmac")
    site = Site(path="mlp", kind="mlp", module=nn.Identity(), dim=512, out=512)
    layer = use.build(site, use.configure({"down_ratio": 0.25}), Shared())
    x = torch.randn(64, 512)
    narrow = layer.pre(x)
    assert float(narrow.detach().std()) == pytest.approx(1.0, abs=0.05)
    assert float(layer.post(torch.randn(64, 128)).detach().std()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("width", "ratio", "experts"), [(16, 0.5, 4), (96, 0.25, 6), (64, 0.125, 3)])
def test_parameters_are_the_closed_form_and_experts_as_large_as_fine_grained_ones(
    width: int, ratio: float, experts: int, gated: bool
) -> None:
    layer = build(width, num_experts=experts, down_ratio=ratio, gated=gated, activation="silu")
    narrow, inner, matrices = narrow_width(width, ratio), inner_width(width, gated), 3 if gated else 2
    counted = sum(p.numel() for p in layer.parameters())
    assert counted == layer_parameters(width, narrow, inner, experts, matrices)
    bank = sum(p.numel() for p in layer.bank.parameters())
    fine = experts * 2 * width * narrow  # two matrices between h and r h
    assert bank == fine if not gated else abs(bank - fine) <= experts * 3 * narrow
    assert counted - bank - experts * width == 2 * width * narrow


def test_the_full_width_router_does_not_see_the_projection() -> None:
    chosen = {}
    for reads in ("full", "down"):
        layer = build(router_input=reads)
        x = torch.randn(1, 40, WIDTH)
        with session(collect=True) as opened:
            layer(x)
            with torch.no_grad():
                layer.pre.weight.copy_(layer.pre.weight.flip(0))
            layer(x)
        before, after = (ctx.routings["mlp"].expert_TK for ctx in opened.take())
        chosen[reads] = torch.equal(before, after)
    assert chosen == {"full": True, "down": False}


class Drop(Edit):
    """Takes all assignments of token 1 away."""

    def on_routing(self, site: str, routing: Routing, router: object, ctx: object) -> Routing:
        keep = routing.token_N != 1
        return Routing(routing.token_N[keep], routing.expert_N[keep], routing.weight_N[keep], routing.num_tokens, 4)


def test_a_token_without_experts_gets_exactly_nothing() -> None:
    layer = build()
    with session(edits=[Drop()]):
        y = layer(torch.randn(1, 3, WIDTH))[0]
    assert (y[1] == 0).all()
    assert (y[[0, 2]] != 0).all()


def traffic(rank: int, world: int) -> dict[str, list[int]]:
    """Bytes of rows for ratio, top-k and inner width; random tokens, the same routers."""
    found = {}
    for name, config in {
        "base": {},
        "quarter": {"down_ratio": 0.25},
        "wide": {"expert_size": 96},
        "all": {"top_k": 4},
    }.items():
        layer = build(32, **config)
        with torch.no_grad():
            layer.router.weight.copy_(torch.randn(4, 32, generator=torch.Generator().manual_seed(9)))
        counter = shard_experts(layer, one_copy=False).traffic
        torch.manual_seed(rank)
        layer(torch.randn(64, 32)).sum().backward()
        found[name] = [counter.rows_out, counter.rows_back, counter.gradients]
    return found


def test_bytes_on_the_wire_follow_the_narrow_width_and_not_the_experts() -> None:
    for found in run_distributed(traffic, 2):
        assert min(found["base"]) > 0
        assert found["quarter"] == [count // 2 for count in found["base"]]  # r halves, the router reads x
        assert found["wide"] == found["base"]
        assert found["all"][0] == 64 * 2 * 16 * 4  # every token to both experts of the other rank, 16 floats


def test_a_model_trains_saves_loads_and_generates(tmp_path: object) -> None:
    model = moestro.models.load.adopt(tiny_model("llama"))
    swap(model, "train.bigmac", {"num_experts": 4, "top_k": 2, "down_ratio": 0.5, "router_input": "down"})
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in mixture_layers(model).values():
            for parameter in layer.parameters():
                parameter.normal_(std=0.2)
    ids = torch.tensor([[5, 9, 17, 3], [0, 8, 4, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    with torch.no_grad():
        whole = model.eval()(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:, 1:]).logits
    torch.testing.assert_close(whole[1, 1:], alone[0], atol=1e-5, rtol=1e-5)
    moestro.save(model, tmp_path)
    again = moestro.load(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids, attention_mask=mask).logits, whole, atol=1e-6, rtol=1e-6)
    settings = {"max_new_tokens": 6, "do_sample": False}
    cached = again.generate(ids[:1], **settings)
    assert torch.equal(cached, again.generate(ids[:1], use_cache=False, **settings))


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointed_and_compiled_models_equal_the_plain_one() -> None:
    model = moestro.models.load.adopt(tiny_model("llama")).train()
    swap(model, "train.bigmac", {"num_experts": 4, "top_k": 2, "down_ratio": 0.5})
    ids = torch.tensor([[5, 9, 17, 3, 22, 41]])
    plain = gradients(model, ids)
    moestro.checkpoint(model)
    replayed = gradients(model, ids)
    assert plain.keys() == replayed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, replayed[name]), name
    model.activation_checkpointing_disable()
    model.eval()
    compiled = torch.compile(model.model, backend="eager")
    with torch.no_grad():
        expected = model.model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(compiled(input_ids=ids).last_hidden_state, expected, atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"down_ratio": 0.3}, "0.3 makes 16 wide rows 4.8 wide; it must be a multiple of 8"),
        ({"down_ratio": 0.25}, "16 wide rows 4 wide"),
        ({"down_ratio": 1.5}, "less than or equal to 1"),
        ({"down_ratio": 0.0}, "greater than 0"),
        ({"top_k": 5}, "top_k=5 but num_experts=4"),
        ({"router": {"method": "train.z_loss"}}, "builds no router"),
        ({"router": {"method": "train.softmax_topk", "config": {"top_k": 1}}}, "router.top_k=1, but the layer has 2"),
        ({"losses": {"x": {"method": "train.softmax_topk"}}}, "builds no routing loss"),
    ],
)
def test_wrong_settings_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**config)
