"""MoMa: groups keep to their modality, experts take their share, scores are no softmax, and inference is causal."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moestro
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.routing import Routing, Scores
from moestro.core.session import Edit, Session, session
from moestro.core.site import Shared
from moestro.methods.train._parts.batch_choice import parting_level, selection_loss, whole_share
from moestro.methods.train.moma import Config, modality_of
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model
from tests.methods.train.helpers import DIM, site, tokens


FIRST = 50  # image ids of these tests: 50 to 96
MODALITY = {"image": [(FIRST, 96)]}
INNER = 5


def build(**config: object) -> MoELayer:
    torch.manual_seed(0)
    use = method("train.moma")
    settings = {"groups": {"text": 2, "image": 2}, "modality": MODALITY, "expert_size": INNER, **config}
    layer = use.build(site(), use.configure(settings), Shared())
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.ndim > 1 and not name.endswith(".out"):
                parameter.normal_(std=0.7)
    return layer.train()


def teach(layer: nn.Module, seed: int = 5) -> None:
    """Put the auxiliary routers somewhere else than their start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "auxiliary" in name:
                parameter.normal_(std=0.8, generator=draw)


def context(ids: Tensor, *, valid: list[bool] | None = None, rows: int = 1, **more: object) -> RoutingContext:
    return RoutingContext(
        "test", Session(collect=True, **more), tokens(rows, ids.numel() // rows, valid=valid, ids=ids.view(-1))
    )


def mixed(text: int, image: int, seed: int = 0) -> Tensor:
    ids = torch.cat([torch.arange(text) % FIRST, FIRST + torch.arange(image) % 40])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]


def run(layer: MoELayer, x: Tensor, ctx: RoutingContext) -> tuple[Tensor, Routing]:
    routing = layer.route(x, ctx)
    return layer.run_experts(x, routing), routing


def expert(layer: MoELayer, number: int, x: Tensor) -> Tensor:
    gate, up, down = (layer.bank.weight(number, name) for name in ("gate", "up", "down"))
    return down @ (nn.functional.silu(gate @ x) * (up @ x))


class Forced(Edit):
    """Every score is one."""

    def on_scores(self, site: str, scores: Scores, ctx: RoutingContext) -> Scores:
        return scores.replace(gate_TC=torch.ones_like(scores.gate_TC))


# -- who may go where ---------------------------------------------------------------------------------------------


def test_outputs_and_gradients_equal_a_loop_over_groups_experts_and_tokens() -> None:
    layer, ids = build(groups={"text": 3, "image": 2}), mixed(7, 5)
    x = torch.randn(12, DIM, requires_grad=True)
    found, _ = run(layer, x, context(ids))
    total = [torch.zeros(DIM) for _ in ids]
    for experts, mine in ((range(3), ids < FIRST), (range(3, 5), ids >= FIRST)):
        for e in experts:
            score = x @ layer.router.weight[e]
            rank = score.detach()
            order = sorted(mine.nonzero().flatten().tolist(), key=lambda t: -float(rank[t]))
            for t in order[: round(int(mine.sum()) / len(experts) + 1e-9)]:
                total[t] = total[t] + torch.sigmoid(score[t]) * expert(layer, e, x[t])
    weight = layer.post.weight
    expected = torch.stack([y / (y.square().mean() + 1e-6).sqrt() * weight for y in total])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    wish = torch.randn_like(found)
    inputs = [x, layer.router.weight, weight, *layer.bank.parameters()]
    ours, theirs = (torch.autograd.grad((y * wish).sum(), inputs) for y in (found, expected))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


def test_text_alone_gives_image_experts_and_their_router_no_gradient() -> None:
    layer = build()
    y, routing = run(layer, torch.randn(6, DIM), context(torch.arange(6)))
    assert routing.counts_C().tolist() == [3, 3, 0, 0]
    y.square().sum().backward()
    for parameter in (layer.bank.gate_up_proj, layer.bank.down_proj, layer.router.weight):
        assert float(parameter.grad[:2].abs().max()) > 0
        assert not parameter.grad[2:].any()


def test_an_image_token_does_not_move_what_text_experts_take_or_learn() -> None:
    layer, ids = build(), torch.tensor([1, 2, 60, 3, 4, 70])
    x = torch.randn(6, DIM)
    other = x.clone()
    other[[2, 5]] = 5 * torch.randn(2, DIM)
    grads = []
    for rows in (x, other):
        y, routing = run(layer, rows, context(ids))
        layer.zero_grad()
        y[ids < FIRST].square().sum().backward()
        grads.append((layer.bank.down_proj.grad[:2].clone(), layer.router.weight.grad.clone(), routing.expert_N < 2))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])
    assert torch.equal(grads[0][2], grads[1][2])
    assert not grads[0][1][2:].any()


def test_one_expert_a_modality_with_score_one_is_two_dense_layers_chosen_by_label() -> None:
    layer, ids = build(groups={"text": 1, "image": 1}, post_norm=False), mixed(5, 4)
    x = 0.5 * torch.randn(9, DIM)
    ctx = context(ids, edits=(Forced(),))
    y, routing = run(layer, x, ctx)
    assert routing.counts_C().tolist() == [5, 4], "c = 1 takes all"
    expected = torch.stack([expert(layer, int(i >= FIRST), row) for i, row in zip(ids, x, strict=True)])
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("text", "image"), [(8, 4), (7, 5), (1, 9), (3, 0), (0, 2), (10, 1)])
def test_each_expert_takes_its_share_rounded_up_or_down(text: int, image: int) -> None:
    layer = build(groups={"text": 3, "image": 4})
    _, routing = run(layer, torch.randn(text + image, DIM), context(mixed(text, image)))
    counts = routing.counts_C().tolist()
    for taken, count, size in [(counts[:3], text, 3), (counts[3:], image, 4)]:
        assert len(set(taken)) == 1
        fair = count / size
        assert taken[0] in ({0} if count == 0 else {max(1, math.floor(fair)), max(1, math.ceil(fair))})


def test_the_share_is_rounded_by_hand() -> None:
    from fractions import Fraction

    cases = [(0, "1/4", 0), (1, "1/4", 1), (5, "1/4", 1), (6, "1/4", 2), (7, "1/4", 2), (10, "1/4", 3), (4, "1", 4)]
    for count, share, expected in cases:
        assert whole_share(count, Fraction(share)) == expected


def test_a_capacity_factor_is_a_share_of_the_modality() -> None:
    layer = build(capacity_factor=0.3)
    _, routing = run(layer, torch.randn(15, DIM), context(mixed(10, 5)))
    assert routing.counts_C().tolist() == [3, 3, 2, 2]


def test_tokens_in_another_order_give_the_same_outputs_in_that_order() -> None:
    layer, ids = build(), mixed(9, 7)
    x, order = torch.randn(16, DIM), torch.randperm(16)
    y, _ = run(layer, x, context(ids))
    shuffled, _ = run(layer, x[order], context(ids[order]))
    torch.testing.assert_close(shuffled[order.argsort()], y, atol=1e-6, rtol=0)
    assert float((shuffled - y).detach().abs().max()) > 0.1


@pytest.mark.parametrize("post_norm", [True, False])
def test_a_token_that_no_expert_took_gets_exactly_zero(post_norm: bool) -> None:
    layer = build(groups={"text": 3, "image": 1}, post_norm=post_norm)
    y, routing = run(layer, torch.randn(12, DIM), context(torch.arange(12)))
    count = torch.bincount(routing.token_N, minlength=12)
    assert set(count.tolist()) >= {0, 1, 2}
    assert torch.equal((y == 0).all(1), count == 0)


def test_scores_are_sigmoids_that_do_not_sum_to_one_and_saturated_ones_are_still_ranked() -> None:
    layer = build(groups={"text": 2, "image": 1})
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0] = layer.router.weight[1, 1] = 1.0
    x = torch.zeros(4, DIM)
    x[:, 0] = torch.tensor([40.0, 60.0, 50.0, 30.0])
    x[:, 1] = torch.tensor([1.0, -1.0, 2.0, 3.0])
    ctx = context(torch.arange(4))
    routing = layer.route(x, ctx)
    assert torch.sigmoid(x[:, 0]).eq(1).all(), "sigmoids alone are ties"
    pairs = dict(
        zip(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True), routing.weight_N, strict=True)
    )
    assert set(pairs) == {(1, 0), (2, 0), (2, 1), (3, 1)}
    assert float((pairs[2, 0] + pairs[2, 1]).detach()) == pytest.approx(1 + 1 / (1 + math.exp(-2)))


def test_padding_neither_takes_places_nor_changes_outputs() -> None:
    layer, ids = build(), mixed(6, 5)
    x = torch.randn(11, DIM)
    y, routing = run(layer, x, context(ids))
    wide = torch.cat([x, 9 * torch.randn(4, DIM)])
    ctx = context(torch.cat([ids, torch.tensor([0, 0, 90, 90])]), valid=[True] * 11 + [False] * 4)
    padded, more = run(layer, wide, ctx)
    torch.testing.assert_close(padded[:11], y, atol=1e-6, rtol=0)
    assert torch.equal(more.counts_C(), routing.counts_C())
    assert not padded[11:].any()


# -- noise --------------------------------------------------------------------------------------------------------


def test_the_noise_is_logistic_moves_rank_and_weight_alike_and_is_off_in_evaluation() -> None:
    layer = build(groups={"text": 1, "image": 1}, noise="gumbel_sigmoid", post_norm=False)
    x, ids = torch.zeros(40_000, DIM), torch.zeros(40_000, dtype=torch.int64)
    torch.manual_seed(0)
    ctx = context(ids)
    scores = layer.router.score(x, layer.bank, ctx)
    noise = scores.select_TC[:, 0]
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 3, rel=0.03)
    assert float((noise < 1).float().mean()) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)
    torch.testing.assert_close(scores.gate_TC[:, 0], noise.sigmoid())
    assert not scores.logits_TC[:, 0].any(), "losses read logits without noise"
    quiet = layer.router.score(x, layer.bank, context(ids, values={"router_noise": 0.0}))
    assert not quiet.select_TC[:, 0].any()
    layer.eval()
    assert not layer.router.score(x, layer.bank, context(ids)).select_TC[:, 0].any()


# -- auxiliary routers --------------------------------------------------------------------------------------------


def test_the_selection_loss_is_cross_entropy_over_the_open_choices_by_hand() -> None:
    shut = float("-inf")
    logits = torch.tensor([[0.0, 2.0, shut], [shut, shut, -1.0], [shut, shut, shut]], requires_grad=True)
    chosen = torch.tensor([[True, False, False], [False, False, True], [False, False, False]])
    total = selection_loss(logits, chosen)
    expected = (math.log(2) + math.log(1 + math.exp(2))) / 2 + math.log(1 + math.exp(1))
    assert float(total.detach()) == pytest.approx(expected)
    total.backward()
    slope = torch.tensor(
        [[-0.25, torch.tensor(2.0).sigmoid() / 2, 0], [0, 0, torch.tensor(-1.0).sigmoid() - 1], [0, 0, 0]]
    )
    torch.testing.assert_close(logits.grad, slope)


def test_the_auxiliary_loss_is_about_the_true_selection_and_reaches_nothing_else() -> None:
    layer, ids = build(), mixed(6, 4)
    x = torch.randn(10, DIM, requires_grad=True)
    ctx = context(ids)
    routing = layer.route(x, ctx)
    term = ctx.losses["block.mlp", "auxiliary"]
    assert float(term.total.detach()) == pytest.approx(10 * math.log(2)), "answers are 1/2 before training"
    assert term.unit == "token"
    teach(layer)
    ctx = context(ids)
    routing = layer.route(x, ctx)
    total = torch.zeros(())
    for t, image in enumerate((ids >= FIRST).tolist()):
        router, mine = layer.router.auxiliary, slice(2 * int(image), 2 * int(image) + 2)
        answer = torch.sigmoid(router.out[mine] @ nn.functional.silu(router.narrow[int(image)] @ x[t]))
        for e in range(2):
            took = bool(((routing.token_N == t) & (routing.expert_N == e + 2 * image)).any())
            total = total - torch.log(answer[e] if took else 1 - answer[e]) / 2
    torch.testing.assert_close(ctx.losses["block.mlp", "auxiliary"].total, total)
    ctx.losses["block.mlp", "auxiliary"].total.backward()
    assert x.grad is None
    touched = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {name for name, _ in layer.named_parameters() if "auxiliary" in name}
    off = context(ids, values={"auxiliary": 0.0})
    layer.route(x, off)
    assert off.losses["block.mlp", "auxiliary"].total.tolist() == 0


def test_trained_routers_select_in_evaluation_without_limit_and_the_main_router_weighs() -> None:
    layer, ids = build(threshold=0.7), mixed(20, 20)
    teach(layer)
    layer.eval()
    x = torch.randn(40, DIM)
    routing = layer.route(x, context(ids))
    assert routing.causal
    expected = {}
    for t, image in enumerate((ids >= FIRST).tolist()):
        router, mine = layer.router.auxiliary, slice(2 * int(image), 2 * int(image) + 2)
        answer = torch.sigmoid(router.out[mine] @ nn.functional.silu(router.narrow[int(image)] @ x[t]))
        for e in range(2):
            if answer[e] > 0.7:
                number = e + 2 * int(image)
                expected[t, number] = torch.sigmoid(layer.router.weight[number] @ x[t]).tolist()
    pairs = zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N.tolist(), strict=True)
    assert {(t, e): pytest.approx(w, abs=1e-6) for t, e, w in pairs} == expected
    assert len({int(count) for count in routing.counts_C()}) > 1, "no equal shares"


def test_later_tokens_matter_to_expert_choice_but_not_to_trained_auxiliary_routers() -> None:
    layer, ids = build(), mixed(10, 10)
    layer.eval()
    x = torch.randn(20, DIM)
    later = torch.cat([x[:10], 3 * torch.randn(10, DIM)])
    before, after = (run(layer, rows, context(ids))[0][:10] for rows in (x, later))
    assert float((before - after).detach().abs().max()) > 0.1
    teach(layer)
    before, after = (run(layer, rows, context(ids))[0][:10] for rows in (x, later))
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    whole, _ = run(layer, x, context(ids, values={"batch_selection": 1.0}))
    layer.train()
    torch.testing.assert_close(run(layer, x, context(ids))[0], whole)


def test_a_calibrated_threshold_parts_as_many_tokens_as_were_chosen() -> None:
    logits = torch.tensor([[3.0, 0.0], [1.0, -1.0], [2.0, float("-inf")], [0.0, float("-inf")]])
    chosen = torch.tensor([[False, True], [True, True], [True, False], [False, False]])
    level, known = parting_level(logits, chosen)
    assert level.tolist() == [1.5, -2.0], "between second and third; under all"
    assert known.tolist() == [True, True]
    assert parting_level(logits, torch.zeros_like(chosen))[1].tolist() == [False, False]
    layer, ids = build(threshold="calibrated"), mixed(60, 60)
    teach(layer)
    x = torch.randn(120, DIM)
    for _ in range(80):
        layer.route(x, context(ids))
    wanted = layer.route(x, context(ids)).counts_C()
    layer.eval()
    assert (layer.route(x, context(ids)).counts_C() - wanted).abs().max() <= 1
    assert not build(threshold="calibrated").router.auxiliary.threshold.any()
    fixed = build(threshold=0.5)
    fixed.route(x, context(ids))
    assert not fixed.router.auxiliary.threshold.any(), "a fixed threshold stays"


# -- whole models -------------------------------------------------------------------------------------------------

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def whole(taught: bool = True, **config: object) -> nn.Module:
    model = adopt(tiny_model("llama"))
    swap(model, "train.moma", {"groups": {"text": 2, "image": 3}, "modality": MODALITY, **config})
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".bank." in name or name.endswith("router.weight"):
            nn.init.normal_(parameter, std=0.4, generator=draw)
    if taught:
        teach(model)
    return model


def logits(model: nn.Module, ids: Tensor = IDS, **call: object) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **call).logits


def test_generating_is_refused_until_the_auxiliary_routers_are_trained() -> None:
    ask = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(ContextError, match=r"cannot generate.*not trained"):
        whole(taught=False).generate(IDS, **ask)
    prompt = whole(taught=False, allow_noncausal=True)
    assert prompt.generate(IDS, **{**ask, "max_new_tokens": 1}).shape == (2, 10), "a prompt alone"
    with pytest.raises(ContextError, match="cannot generate"):
        prompt.generate(IDS, **ask)
    model = whole()
    with session(values={"batch_selection": 1.0}), pytest.raises(ContextError, match="batch_selection=1"):
        model.generate(IDS, **ask)
    half = whole()
    with torch.no_grad():
        half.model.layers[1].mlp.router.auxiliary.out[2:].zero_()
    with pytest.raises(ContextError, match=r"model\.layers\.1\.mlp"):
        half.generate(IDS, **ask)
    seen = half.generate(IDS[:, :3] % FIRST, **{**ask, "max_new_tokens": 1})
    assert seen.shape == (2, 4), "text has routers to ask"


def test_generation_with_a_cache_is_generation_without_and_survives_the_disk(tmp_path: Path) -> None:
    model = whole(threshold="calibrated")
    with torch.no_grad():
        model.model.layers[0].mlp.router.auxiliary.threshold.fill_(0.3)
    ask = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = model.generate(IDS, **ask)
    assert torch.equal(found, model.generate(IDS, use_cache=False, **ask))
    moestro.save(model, tmp_path)
    again = moestro.load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.generate(IDS, **ask), found)
    untaught = whole(taught=False)
    moestro.save(untaught, tmp_path / "untaught")
    with pytest.raises(ContextError, match="not trained"):
        moestro.load(tmp_path / "untaught").generate(IDS, **ask)


@pytest.mark.parametrize("taught", [True, False])
def test_a_padded_batch_gives_the_logits_of_the_plain_one(taught: bool) -> None:
    model = whole(taught)
    pad, ones = torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(IDS)
    mask = torch.cat([pad, ones], 1)
    wide = logits(model, torch.cat([pad, IDS], 1), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    torch.testing.assert_close(wide[:, 3:], logits(model), atol=1e-5, rtol=0)


def test_a_checkpointed_backward_is_the_plain_one_and_calibrates_once() -> None:
    found = []
    for replayed in (False, True):
        model = whole(noise="none", threshold="calibrated").train()
        if replayed:
            moestro.checkpoint(model)
        with session(collect=True) as opened:
            loss = model(IDS, labels=IDS, use_cache=False).loss
        total = loss + sum(term.total for ctx in opened.take() for term in ctx.losses.values())
        total.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        found.append((grads, model.model.layers[1].mlp.router.auxiliary.threshold.clone()))
    for name, grad in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], grad, atol=0, rtol=0, msg=name)
    assert float(found[0][0]["model.layers.1.mlp.router.weight"].abs().max()) > 0
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].any()


def test_the_compiled_base_model_computes_the_same() -> None:
    model = whole()
    plain = logits(model)
    model.model.forward = torch.compile(model.model.forward, backend="aot_eager")
    torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_modalities_may_be_a_tag_by_name_or_place() -> None:
    by_ids = whole(modality={"image": [(0, 96)], "text": [(97, 99)]})
    by_tag = whole(modality="kind")
    for value in ("image", torch.tensor([1, 1]), torch.ones(2, 9)):
        with session(tags={"kind": value}):
            torch.testing.assert_close(logits(by_tag), logits(by_ids), atol=1e-6, rtol=0)
    with session(tags={"kind": "text"}):
        assert float((logits(by_tag) - logits(by_ids)).abs().max()) > 0.01
    with session(tags={"kind": torch.tensor([0, 2])}), pytest.raises(ContextError, match="none of the modalities"):
        logits(by_tag)


def test_ids_are_sorted_by_hand_and_one_without_modality_is_refused() -> None:
    ranges = {"a": [(3, 5), (9, 9)], "b": [(6, 8)]}
    ids = torch.tensor([2, 3, 5, 6, 8, 9, 10])
    assert modality_of(ids, ranges, ("a", "b")).tolist() == [-1, 0, 0, 1, 1, 0, -1]
    assert modality_of(ids, {"b": [(6, 8)]}, ("a", "b")).tolist() == [0, 0, 0, 1, 1, 0, 0]
    model = whole(modality={"text": [(0, 40)], "image": [(FIRST, 96)]})
    with pytest.raises(ContextError, match=r"token 1 \(id 45\) is of none"):
        logits(model, torch.tensor([[3, 45, 60]]))
    with pytest.raises(ContextError, match="embeddings"), torch.no_grad():
        whole().model(inputs_embeds=torch.randn(1, 3, 32))


def test_the_objective_splits_the_loss_by_modality_and_says_whether_it_was_causal() -> None:
    use, model = method("train.moma"), whole()
    entry, config = use.entry("objective"), use.configure({"modality": MODALITY})
    batch = {"input_ids": IDS, "labels": IDS.clone()}
    batch["labels"][0, :4] = -100
    found = entry(model, batch, {}, config)
    assert list(found) == ["causal_text", "causal_image"]
    plain = nn.functional.cross_entropy(
        logits(model)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
    )
    image = batch["labels"][:, 1:].flatten() >= FIRST
    torch.testing.assert_close(found["causal_image"].total, plain[image].sum())
    torch.testing.assert_close(found["causal_text"].total, plain[~image].sum())
    assert list(entry(model.train(), batch, {}, config)) == ["noncausal_text", "noncausal_image"]
    assert list(entry(whole(taught=False), batch, {}, config)) == ["noncausal_text", "noncausal_image"]
    with pytest.raises(ConfigError, match="tag"):
        entry(model, batch, {}, use.configure({"modality": "kind"}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"modality": {"sound": [[0, 1]]}}, "sound"),
        ({"modality": {"image": [[5, 3]]}}, "from 5 to 3"),
        ({"modality": {"image": [[5, 9]], "text": [[0, 5]]}}, "id 5 belongs"),
        ({"groups": {"a": 1, "b": 1, "c": 1}, "modality": {"a": [[0, 1]]}}, "b and c have no ids"),
        ({"modality": MODALITY, "groups": {"text": 0, "image": 1}}, "text"),
        ({"modality": MODALITY, "groups": {}}, "groups"),
        ({"modality": MODALITY, "capacity_factor": 1.5}, "capacity_factor"),
        ({"modality": MODALITY, "threshold": 1.0}, "threshold"),
        ({"modality": MODALITY, "noise": "normal"}, "noise"),
        ({"modality": {"image": [[-1, 3]]}}, "modality"),
        ({"modality": ""}, "modality is an empty name"),
        ({}, "modality is missing"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_built(config: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(**config)
