"""Monet: halves that make n^2 experts, equal to the sum over all of them, masked exactly, routed once a group."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moestro
from moestro.core.context import RoutingContext, open_stack
from moestro.core.errors import ConfigError, ContextError
from moestro.core.registry import method
from moestro.core.routing import Routing, Scores
from moestro.core.session import Edit, session
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.product_keys import AxisRouter, keep, threshold
from moestro.methods.train.monet import Config, HalfExperts, MonetLayer, mix, used
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model
from tests.methods.train.helpers import context


WIDTH = 6
SMALL = {"axis": 4, "heads": 2, "expert_size": 2, "top_k": 2, "group_size": 2, "losses": {}}
KINDS = pytest.mark.parametrize("kind", ["horizontal", "vertical"])


class Stack(nn.Module):
    """Layers one after the other around a residual stream, in one routing context."""

    def __init__(self, count: int, **config: object) -> None:
        super().__init__()
        use = method("train.monet")
        settings = use.configure({**SMALL, **config})
        shared = Shared()
        sites = [
            Site(path=f"layers.{i}.mlp", kind="mlp", module=nn.Identity(), dim=WIDTH, layer=i) for i in range(count)
        ]
        self.layers = nn.ModuleList(use.build(site, settings, shared) for site in sites)
        self.shared = shared.modules
        open_stack(self, "model")

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            inputs_embeds = inputs_embeds + layer(inputs_embeds)
        return inputs_embeds


def stack(count: int = 1, **config: object) -> Stack:
    torch.manual_seed(0)
    made = Stack(count, **config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.7)
    return made.eval()


def weights(tokens: int, heads: int, axis: int) -> Tensor:
    """Some zeros, each head summing to 1."""
    g = torch.rand(tokens, heads, axis) * (torch.rand(tokens, heads, axis) > 0.4)
    g[..., 0] += 0.1
    return g / g.sum(-1, keepdim=True)


def dense(routing: Routing, heads: int) -> Tensor:
    g = torch.zeros(routing.num_tokens, routing.num_experts)
    for token, expert, weight in zip(routing.token_N, routing.expert_N, routing.weight_N.detach(), strict=True):
        g[token, expert] = weight
    return g.view(len(g), heads, -1)


def double_sum(experts: HalfExperts, x_TD: Tensor, g1: Tensor, g2: Tensor, open_CC: Tensor) -> Tensor:
    """Token by token, head by head, expert by expert, each expert put together from its halves."""
    get = dict(experts.named_parameters())
    size = get["first_up"].shape[1] if experts.vertical else 0
    rows = []
    for t, x in enumerate(x_TD):
        y = torch.zeros(WIDTH)
        for h in range(g1.shape[1]):
            for i, j in open_CC.nonzero().tolist():
                if not experts.vertical:
                    hidden = (get["up"][i] @ x + get["up_bias"][i]).relu() ** 2
                    answer = get["down"][j].T @ hidden + get["down_bias"][j]
                else:
                    u = (get["first_up"][i] @ x + get["first_up_bias"][i]).relu() ** 2
                    v = (get["second_up"][j] @ x + get["second_up_bias"][j]).relu() ** 2
                    one, two = get["first_down"][i], get["second_down"][j]
                    top = one[:size].T @ u + one[size:].T @ v + get["first_down_bias"][i]
                    low = two[:size].T @ u + two[size:].T @ v + get["second_down_bias"][j]
                    answer = torch.cat([top, low])
                y = y + g1[t, h, i] * g2[t, h, j] * answer
        rows.append(y)
    return torch.stack(rows)


def experts(kind: str, axis: int = 4, size: int = 2) -> HalfExperts:
    torch.manual_seed(3)
    made = HalfExperts(WIDTH, WIDTH, Config(axis=axis, top_k=2, expert_size=size, decompose=kind))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.6)
    return made


@KINDS
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_outputs_and_gradients_equal_the_sum_over_every_expert(kind: str, masked: bool) -> None:
    made = experts(kind)
    x = torch.randn(5, WIDTH, requires_grad=True)
    g1, g2 = (weights(5, 2, 4).requires_grad_() for _ in range(2))
    open_CC = torch.ones(4, 4, dtype=torch.bool)
    if masked:
        open_CC[[0, 0, 1, 3], [0, 2, 3, 1]] = False
        open_CC[2] = False
    found = made(x, g1, g2, open_CC if masked else None)
    expected = double_sum(made, x, g1, g2, open_CC)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    wish = torch.randn_like(found)
    inputs = [x, g1, g2, *made.parameters()]
    ours, theirs = (torch.autograd.grad((y * wish).sum(), inputs) for y in (found, expected))
    for one, two in zip(ours, theirs, strict=True):
        assert two.abs().max() > 1e-3
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@KINDS
def test_weights_that_do_not_sum_to_one_are_taken_as_they_are(kind: str) -> None:
    made, x = experts(kind), torch.randn(3, WIDTH)
    g1, g2 = 2.5 * weights(3, 2, 4), 0.3 * weights(3, 2, 4)
    expected = double_sum(made, x, g1, g2, torch.ones(4, 4, dtype=torch.bool))
    torch.testing.assert_close(made(x, g1, g2), expected, atol=1e-5, rtol=1e-5)


@KINDS
def test_a_mask_of_ones_is_no_mask_and_masking_all_leaves_exactly_nothing(kind: str) -> None:
    made = experts(kind, axis=7, size=4)
    x, g1, g2 = torch.randn(9, WIDTH), weights(9, 3, 7), weights(9, 3, 7)
    ones = torch.ones(7, 7, dtype=torch.bool)
    torch.testing.assert_close(made(x, g1, g2, ones), made(x, g1, g2), atol=1e-6, rtol=1e-6)
    assert (made(x, g1, g2, ~ones) == 0).all()


def test_shared_sums_by_hand() -> None:
    g = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    other = torch.tensor([[[0.25, 0.75], [0.0, 1.0]]])
    value = torch.tensor([[[2.0], [10.0]]])
    assert mix(g, value, other).flatten().tolist() == pytest.approx([0.25 * 6, 0.75 * 6 + 2])
    assert used(g, other).flatten().tolist() == pytest.approx([1.5, 0.5])
    only = torch.tensor([[True, False], [False, True]])
    assert mix(g, value, other, only).flatten().tolist() == pytest.approx([0.25 * 1, 0.75 * 5])
    assert used(g, other, only).flatten().tolist() == pytest.approx([0.125, 0.375])


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@KINDS
def test_nothing_as_large_as_all_pairs_arises(kind: str) -> None:
    tokens, heads, axis = 8, 2, 64
    made = experts(kind, axis=axis, size=4)
    x, g1, g2 = (torch.randn(tokens, WIDTH), weights(tokens, heads, axis), weights(tokens, heads, axis))
    with Largest() as seen:
        made(x, g1, g2).sum().backward()
    assert 0 < seen.elements <= tokens * axis * max(4, heads)
    with Largest() as seen:
        made(x, g1, g2, torch.rand(axis, axis) > 0.1).sum().backward()
    assert seen.elements <= max(tokens * axis * 4, axis * axis)


# -- sizes --------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(("axis", "size", "heads", "top_k"), [(4, 2, 2, 2), (48, 8, 4, 6), (33, 6, 3, 5)])
def test_parameters_grow_with_the_root_of_the_experts(kind: str, axis: int, size: int, heads: int, top_k: int) -> None:
    config = {"axis": axis, "expert_size": size, "heads": heads, "top_k": top_k, "decompose": kind}
    made = stack(2, **config)
    for layer in made.layers:
        assert sum(p.numel() for p in layer.parameters()) == 2 * axis * size * WIDTH + axis * size + axis * WIDTH
        assert layer.open.numel() == axis**2
    assert sum(p.numel() for p in made.shared.parameters()) == 2 * WIDTH * heads * axis


def test_sharing_a_router_in_24_layers_saves_what_the_paper_says() -> None:
    with torch.device("meta"):
        use = method("train.monet")
        counts = {}
        for group in (1, 4):
            shared = Shared()
            config = use.configure({"group_size": group, "decompose": "horizontal"})
            for i in range(24):
                use.build(
                    Site(path=f"layers.{i}.mlp", kind="mlp", module=nn.Identity(), dim=2048, layer=i), config, shared
                )
            counts[group] = (len(shared.modules), sum(p.numel() for p in shared.modules.parameters()))
    assert counts[1][0] - counts[4][0] == 18
    assert counts[1][1] - counts[4][1] == 18 * 2 * 2048 * 8 * 512  # 302 million: 1.767 B - 1.465 B


# -- the router ---------------------------------------------------------------------------------------------------


def test_the_threshold_is_the_normal_quantile() -> None:
    assert threshold(512, 32) == pytest.approx(1.534, abs=5e-4)
    assert threshold(8, 4) == pytest.approx(0.0, abs=1e-12)
    assert threshold(8, 8) == float("-inf")


def test_choices_above_the_threshold_or_the_best_one_are_kept() -> None:
    inf = float("inf")
    normal = torch.tensor([[2.0, 1.5, 0.1], [0.3, 0.9, -2.0], [-inf, -3.0, -inf], [-inf, -inf, -inf]])
    kept = keep(normal[:, None], 1.0).squeeze(1)
    assert kept.tolist() == [[True, True, False], [False, True, False], [False, True, False], [False] * 3]


def test_about_k_of_n_are_kept_at_least_one_and_weights_sum_to_one() -> None:
    torch.manual_seed(0)
    router = AxisRouter(64, 128, 4, 8).train()
    nn.init.normal_(router.weight, mean=0.0, std=0.3)
    ctx = context(4, 100)
    scores = router.score(torch.randn(400, 64), None, ctx)
    routing = router.choose(scores, ctx)
    g = dense(routing, 4)
    torch.testing.assert_close(g.sum(-1), torch.ones(400, 4), atol=1e-5, rtol=0)
    kept = (g > 0).sum(-1)
    assert kept.min() >= 1
    assert kept.float().mean() == pytest.approx(8, rel=0.2)
    z = scores.logits_TC.view(400, 4, 128)
    ratio = (g[0, 0].log() - z[0, 0])[g[0, 0] > 0]  # softmax of the raw scores, not of the normalised ones
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), atol=1e-4, rtol=0)


def test_statistics_are_those_of_batch_norm_over_tokens_that_are_real() -> None:
    torch.manual_seed(0)
    router, reference = AxisRouter(WIDTH, 5, 3, 2).train(), nn.BatchNorm1d(3, affine=False).train()
    nn.init.normal_(router.weight, std=0.8)
    for _ in range(3):
        x = torch.randn(8, WIDTH)
        padded = torch.cat([x, 50 + torch.randn(4, WIDTH)])
        ctx = context(2, 6, valid=[True] * 8 + [False] * 4)
        expected = reference(router.logits(x).view(8, 3, 5))
        found = router.score(padded, None, ctx).select_TC[:8].view(8, 3, 5)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(router.mean, reference.running_mean)
    torch.testing.assert_close(router.variance, reference.running_var)
    router.eval(), reference.eval()
    x = torch.randn(4, WIDTH)
    found = router.score(x, None, context(1, 4)).select_TC.view(4, 3, 5)
    torch.testing.assert_close(found, reference(router.logits(x).view(4, 3, 5)), atol=1e-5, rtol=1e-5)


def test_a_trained_model_routes_a_row_alike_alone_and_in_a_batch() -> None:
    made = stack(4).train()
    for _ in range(3):
        made(3 + torch.randn(4, 5, WIDTH))
    assert made.shared["product_keys_0"].first.mean.abs().max() > 0.1
    x = 3 + torch.randn(4, 5, WIDTH)
    batched = made(x), made(x[:1])
    assert not torch.allclose(batched[0][0], batched[1][0], atol=1e-4)  # training: statistics of the batch
    made.eval()
    torch.testing.assert_close(made(x[:1])[0], made(x)[0], atol=1e-5, rtol=1e-5)


def test_averages_stay_exact_in_a_low_precision_model() -> None:
    router = AxisRouter(WIDTH, 4, 2, 2)
    router.mean.fill_(1.0009765625)
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert (router.mean == 1.0009765625).all()


def test_weighing_a_choice_without_its_head_is_refused() -> None:
    with pytest.raises(ContextError, match="weighed within its head"):
        AxisRouter(WIDTH, 4, 2, 2).weigh(torch.ones(1, 2))


# -- groups of layers ---------------------------------------------------------------------------------------------


def test_layers_of_a_group_use_the_scores_of_its_first() -> None:
    made = stack(5)
    assert [layer.owner for layer in made.layers] == [f"layers.{i}.mlp" for i in (0, 0, 2, 2, 4)]
    x = torch.randn(2, 3, WIDTH)
    with session(collect=True) as opened:
        made(x)
    (ctx,) = opened.take()
    assert list(ctx.routings) == [f"layers.{i}.mlp.{axis}" for i in range(5) for axis in ("first", "second")]
    for follower in (1, 3):
        one, two = (ctx.routings[f"layers.{i}.mlp.first"] for i in (follower - 1, follower))
        assert torch.equal(one.expert_N, two.expert_N)
    assert not torch.equal(
        ctx.routings["layers.1.mlp.first"].scores.logits_TC, ctx.routings["layers.2.mlp.first"].scores.logits_TC
    )
    with torch.no_grad():  # the same halves in both layers of a group, the same input: the same answer
        made.layers[1].experts.load_state_dict(made.layers[0].experts.state_dict())
        seen: list[Tensor] = []
        for layer in made.layers[:2]:
            layer.register_forward_pre_hook(lambda module, args: (x,))
            layer.register_forward_hook(lambda module, args, output: seen.append(output))
        made(x)
    assert torch.equal(seen[0], seen[1])


def test_a_layer_without_its_router_is_refused() -> None:
    made = stack(2)
    with pytest.raises(ContextError, match=r"layers\.1\.mlp uses the scores of layers\.0\.mlp, which did not run"):
        made.layers[1](torch.randn(1, 3, WIDTH))


class Close(Edit):
    """Closes choices of one site, and notes which sites ask."""

    def __init__(self, site: str, choices: slice) -> None:
        self.site, self.choices, self.sites = site, choices, []

    def on_scores(self, site: str, scores: Scores, ctx: RoutingContext) -> Scores:
        self.sites.append(site)
        if site != self.site:
            return scores
        select = scores.select_TC.clone()
        select[:, self.choices] = float("-inf")
        return scores.replace(select_TC=select)


class Double(Edit):
    def on_routing(self, site: str, routing: Routing, router: object, ctx: RoutingContext) -> Routing:
        return routing.replace(weight_N=routing.weight_N * 2) if site.endswith("second") else routing


def test_edits_act_on_each_axis_of_each_layer_by_itself() -> None:
    made = stack(2)
    x = torch.randn(1, 6, WIDTH)
    edit = Close("layers.1.mlp.first", slice(0, 3))
    with session(edits=[edit], collect=True) as opened:
        made(x)
    (ctx,) = opened.take()
    assert edit.sites == [f"layers.{i}.mlp.{axis}" for i in (0, 1) for axis in ("first", "second")]
    assert (ctx.routings["layers.1.mlp.first"].expert_N >= 3).all()
    assert (ctx.routings["layers.0.mlp.first"].expert_N < 3).any()
    alone = made.layers[0]
    plain = alone(x)
    with session(edits=[Double()]):
        torch.testing.assert_close(alone(x), 2 * plain)
    with (
        session(edits=[Close("layers.0.mlp.first", slice(0, 4))]),
        pytest.raises(ContextError, match="token 0 may choose nothing in routing head 0"),
    ):
        alone(x)


def test_losses_are_those_of_routers_not_of_layers() -> None:
    uses = {name: {"method": f"train.{name}_loss"} for name in ("uniformity", "ambiguity")}
    made = stack(4, losses={**uses, "z": {"method": "train.z_loss"}}).train()
    with session(collect=True) as opened:
        made(torch.randn(2, 5, WIDTH))
    (ctx,) = opened.take()
    sites = [f"layers.{i}.mlp.{axis}" for i in (0, 2) for axis in ("first", "second")]
    assert sorted(ctx.losses) == sorted((site, name) for site in sites for name in (*uses, "z"))
    g = [dense(ctx.routings[site], 2) for site in sites]
    sure = sum(float((1 - one.amax(-1)).mean()) for one in g) / 2  # mean over axes, sum over routers
    even = sum(float(-one.mean(0).clamp(min=1e-12).log().mean()) for one in g) / 2
    total = {name: sum(ctx.losses[site, name].total.item() for site in sites) for name in uses}
    assert total["ambiguity"] / 10 == pytest.approx(sure, rel=1e-4)
    assert total["uniformity"] == pytest.approx(even, rel=1e-4)


# -- masks --------------------------------------------------------------------------------------------------------


def test_masks_of_a_layer() -> None:
    made = stack()
    layer = made.layers[0]
    x = torch.randn(1, 5, WIDTH)
    before = layer(x)
    layer.mask([(0, 1), (3, 2)])
    layer.mask(torch.tensor([[1, 1]]))
    assert (~layer.open).nonzero().tolist() == [[0, 1], [1, 1], [3, 2]]
    with session(collect=True) as opened:
        found = layer(x)[0]
    g1, g2 = (dense(routing, 2) for routing in opened.take()[0].routings.values())
    torch.testing.assert_close(found, double_sum(layer.experts, x[0], g1, g2, layer.open), atol=1e-5, rtol=1e-5)
    assert (found - before[0]).abs().max() > 1e-3
    layer.mask(torch.ones(4, 4, dtype=torch.bool))
    assert (layer(x) == 0).all()
    layer.open.fill_(True)
    assert torch.equal(layer(x), before)  # and what is no mask is refused
    refused = {"a mask of": [torch.ones(4, 3).bool()], "numbered 0 to 3": [[(0, 4)], [(-1, 0)]]}
    refused["a mask is pairs"] = [[(0.0, 1.0)], torch.zeros(2), [(0, 1), (2,)], [("a", "b")]]
    for odd, words in ((odd, words) for words, some in refused.items() for odd in some):
        with pytest.raises(ConfigError, match=words):
            layer.mask(odd)


# -- whole models -------------------------------------------------------------------------------------------------

MODEL = {"axis": 8, "heads": 2, "expert_size": 4, "top_k": 3, "group_size": 2}


def monet_model(**config: object) -> nn.Module:
    model = adopt(tiny_model("llama"))
    swap(model, "train.monet", {**MODEL, **config})
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name or "product_keys" in name:
                parameter.normal_(std=0.3)
    return model


@KINDS
def test_a_model_saves_loads_and_generates(tmp_path: object, kind: str) -> None:
    model = monet_model(decompose=kind)
    ids = torch.tensor([[5, 9, 17, 3], [0, 8, 4, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    model.train()(input_ids=ids, attention_mask=mask)  # moves the running averages
    layers = [module for module in model.modules() if isinstance(module, MonetLayer)]
    layers[1].mask([(0, 0), (2, 5)])
    with torch.no_grad():
        whole = model.eval()(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:, 1:]).logits
    torch.testing.assert_close(whole[1, 1:], alone[0], atol=1e-5, rtol=1e-5)
    moestro.save(model, tmp_path)
    again = moestro.load(str(tmp_path))
    assert [int((~m.open).sum()) for m in again.modules() if isinstance(m, MonetLayer)][:2] == [0, 2]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids, attention_mask=mask).logits, whole, atol=1e-6, rtol=1e-6)
    settings = {"max_new_tokens": 6, "do_sample": False}
    cached = again.generate(ids[:1], **settings)
    assert torch.equal(cached, again.generate(ids[:1], use_cache=False, **settings))
    if kind == "vertical":  # another head class of the same folder finds its shared routers
        from transformers import AutoModel

        bare = AutoModel.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            expected = again.model(input_ids=ids, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(bare(input_ids=ids, attention_mask=mask).last_hidden_state, expected)


def gradients(model: nn.Module, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, {name: buffer.clone() for name, buffer in model.named_buffers() if "product_keys" in name}


def test_checkpointed_and_compiled_models_equal_the_plain_one() -> None:
    ids = torch.tensor([[5, 9, 17, 3, 22, 41]])
    plain, moved = gradients(monet_model().train(), ids)
    model = monet_model().train()
    moestro.checkpoint(model)
    replayed, moved_once = gradients(model, ids)
    assert plain.keys() == replayed.keys()
    assert any("product_keys" in name for name in plain)
    for name, gradient in plain.items():
        assert torch.equal(gradient, replayed[name]), name
    for name, buffer in moved.items():
        assert torch.equal(buffer, moved_once[name]), name
        assert not torch.equal(buffer, torch.full_like(buffer, float("variance" in name)))
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
        ({"top_k": 5}, "top_k=5 a head but axis=4: top_k\\^2 is more than the 16 experts"),
        ({"expert_size": 3, "decompose": "vertical"}, "expert_size=3 is odd"),
        ({"axis": 1}, "greater than or equal to 2"),
        ({"heads": 0}, "greater than or equal to 1"),
        ({"losses": {"x": {"method": "train.softmax_topk"}}}, "builds no routing loss"),
    ],
)
def test_wrong_settings_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stack(**config)


def test_wrong_sites_are_refused() -> None:
    use = method("train.monet")
    odd = Site(path="mlp", kind="mlp", module=nn.Identity(), dim=7, layer=0)
    with pytest.raises(ConfigError, match="output width 7 is odd"):
        use.build(odd, use.configure(SMALL), Shared())
    attention = Site(path="attention", kind="attention", module=nn.Identity(), dim=6)
    with pytest.raises(ConfigError, match="site of kind attention"):
        use.build(attention, use.configure(SMALL), Shared())
