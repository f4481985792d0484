"""The recurrent router in whole models: dense layers in between, disk, decoding, padding, replays, surgery."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import moestro
from moestro import surgery
from moestro.core.context import RoutingContext
from moestro.core.layer import mixture_layers
from moestro.core.routing import Routing
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.observe import layerwise
from moestro.surgery import plans
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_model


IDS = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))
SITES = ["model.layers.0.mlp", "model.layers.2.mlp"]
SIZE, EXPERTS = 8, 5


def whole(balance: str = "each", **config: object) -> nn.Module:
    """A tiny Llama: mixture, dense, mixture; the routers disagree."""
    model = adopt(tiny_model("llama", num_hidden_layers=3))
    router = {"method": "train.rmoe", "config": {"state_size": SIZE, **config}}
    losses = {"balance": {"method": "train.balance_loss", "config": {"layers": balance}}}
    settings = {"num_experts": EXPERTS, "expert_size": 20, "router": router, "losses": losses}
    swap(model, "train.moe", settings, layers=[0, 2])
    draw = torch.Generator().manual_seed(10)
    for name, parameter in model.named_parameters():
        if ".mlp.router" in name or ".mlp.bank" in name or name.startswith("moestro_shared"):
            nn.init.normal_(parameter, std=0.2 if ".bank" in name else 0.6, generator=draw)
    return model


def run(model: nn.Module, ids: Tensor = IDS, **call: object) -> tuple[Tensor, RoutingContext]:
    with torch.no_grad(), moestro.session(collect=True, keeps=["input"]) as opened:
        logits = model(ids, **call).logits
    (ctx,) = opened.take()
    return logits, ctx


def routings(ctx: RoutingContext) -> list[Routing]:
    return [ctx.routings[site] for site in SITES]


def gradients(model: nn.Module, ids: Tensor = IDS) -> dict[str, Tensor]:
    with moestro.session(collect=True) as opened:
        loss = model(ids, labels=ids).loss
    total = loss + sum(term.total for ctx in opened.take() for term in ctx.losses.values())
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_the_state_passes_the_dense_layer_untouched() -> None:
    model = whole()
    _, ctx = run(model)
    assert list(mixture_layers(model)) == SITES
    cell = nn.GRUCell(SIZE, SIZE)
    cell.load_state_dict(model.moestro_shared[f"rmoe_gru_{SIZE}"].cell.state_dict())
    h = None
    for site, routing in zip(SITES, routings(ctx), strict=True):
        router = model.get_submodule(site).router
        h = cell(ctx.kept[site, "input"] @ router.projector.weight.T, h)
        torch.testing.assert_close(routing.scores.logits_TC, h @ router.weight.T, atol=1e-5, rtol=0)


def test_router_parameters_of_a_model_are_counted_by_the_formula() -> None:
    plain = adopt(tiny_model("llama", num_hidden_layers=3))
    swap(plain, "train.moe", {"num_experts": EXPERTS, "expert_size": 20}, layers=[0, 2])
    added = sum(p.numel() for p in whole().parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == 2 * (32 * SIZE + EXPERTS * SIZE) + 6 * SIZE**2 + 6 * SIZE - 2 * 32 * EXPERTS


def test_the_cell_is_one_tensor_on_disk_and_one_module_after_loading(tmp_path: Path) -> None:
    model = whole(shared_projector=True)
    logits, ctx = run(model)
    moestro.save(model, tmp_path)
    names = sorted(name for name in load_file(tmp_path / "model.safetensors") if "layers" not in name)
    parts = [name.removeprefix("moestro_shared.") for name in names if name.startswith("moestro_shared.")]
    assert parts == [
        *(f"rmoe_gru_{SIZE}.cell.{name}" for name in ("bias_hh", "bias_ih", "weight_hh", "weight_ih")),
        f"rmoe_projector_32_{SIZE}.weight",
    ]
    own = [name for name in load_file(tmp_path / "model.safetensors") if ".router." in name]
    assert own == [f"{site}.router.weight" for site in SITES]
    again = moestro.load(tmp_path)
    assert len({id(layer.router.cell.module) for layer in mixture_layers(again).values()}) == 1
    assert again.get_submodule(SITES[0]).router.cell.module is again.moestro_shared[f"rmoe_gru_{SIZE}"]
    found, other = run(again)
    assert (found - logits).abs().max() <= 1e-6
    for one, two in zip(routings(ctx), routings(other), strict=True):
        assert torch.equal(one.expert_N, two.expert_N)


@pytest.mark.parametrize("config", [{"cell": "lstm"}, {"base": "cosine", "embedding_size": 4}])
def test_other_settings_are_saved_too(tmp_path: Path, config: dict[str, object]) -> None:
    model = whole(**config)
    logits, _ = run(model)
    moestro.save(model, tmp_path)
    assert (run(moestro.load(tmp_path))[0] - logits).abs().max() <= 1e-6


def test_generation_with_a_cache_is_generation_without() -> None:
    model = whole()
    ask = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(IDS, **ask), model.generate(IDS, use_cache=False, **ask))
    beams = {**ask, "num_beams": 3}
    assert torch.equal(model.generate(IDS, **beams), model.generate(IDS, use_cache=False, **beams))


def test_prefill_is_decoding_step_by_step_and_nothing_enters_the_cache() -> None:
    model = whole()
    logits, ctx = run(model, IDS[:1])
    cache, lines, steps = None, [], []
    for place in range(IDS.shape[1]):
        with torch.no_grad(), moestro.session(collect=True) as opened:
            out = model(IDS[:1, place : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        lines.append(out.logits)
        steps.append([routing.scores.logits_TC for routing in routings(opened.take()[0])])
    torch.testing.assert_close(torch.cat(lines, 1), logits, atol=1e-5, rtol=0)
    for layer, routing in enumerate(routings(ctx)):
        torch.testing.assert_close(
            torch.cat([step[layer] for step in steps]), routing.scores.logits_TC, atol=1e-5, rtol=0
        )
    assert "moestro_state" not in vars(cache)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_logits_nor_scores_nor_losses(side: str) -> None:
    model = whole()
    logits, ctx = run(model)
    pad, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones_like(IDS)
    order = slice(None, None, -1 if side == "left" else 1)
    ids, mask = torch.cat([IDS, pad][order], 1), torch.cat([ones, pad][order], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    wide, other = run(model, ids, attention_mask=mask, position_ids=position)
    real = mask.bool()
    torch.testing.assert_close(wide[real].view_as(logits), logits, atol=1e-5, rtol=0)
    for one, two in zip(routings(ctx), routings(other), strict=True):
        torch.testing.assert_close(two.scores.logits_TC[real.view(-1)], one.scores.logits_TC, atol=1e-5, rtol=0)
    for key, term in ctx.losses.items():
        torch.testing.assert_close(other.losses[key].total, term.total, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_checkpointed_backward_is_the_plain_one(cell: str) -> None:
    found = []
    for replayed in (False, True):
        model = whole(cell=cell).train()
        if replayed:
            moestro.checkpoint(model)
        found.append(gradients(model))
    plain, replay = found
    for name, grad in plain.items():
        torch.testing.assert_close(replay[name], grad, atol=0, rtol=0, msg=name)
        if "router" in name or "moestro_shared" in name:
            assert float(grad.abs().max()) > 0, name


def test_the_state_brings_gradient_down_through_the_replay() -> None:
    """The second router's own loss, with experts that say nothing: all that reaches P_1 came by the state."""
    found = {}
    for detach in (False, True):
        model = whole(detach_state=detach).train()
        moestro.checkpoint(model)
        first, second = (model.get_submodule(site) for site in SITES)
        nn.init.zeros_(first.bank.down_proj)
        with moestro.session(collect=True) as opened:
            model(IDS)
        (ctx,) = opened.take()
        ctx.routings[SITES[1]].scores.logits_TC.square().sum().backward()
        assert float(second.router.projector.weight.grad.abs().max()) > 1e-3
        found[detach] = first.router.projector.weight.grad
    assert float(found[False].abs().max()) > 1e-3
    assert found[True] is None or not found[True].any()


def test_the_compiled_base_model_computes_the_same() -> None:
    model = whole()
    logits, _ = run(model)
    model.model.forward = torch.compile(model.model.forward, backend="aot_eager")
    compiled, _ = run(model)
    torch.testing.assert_close(compiled, logits, atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_one_global_balance_over_all_layers_is_that_of_the_concatenated_logits() -> None:
    _, ctx = run(whole(balance="together"))
    scores = torch.cat([routing.scores.logits_TC for routing in routings(ctx)]).softmax(-1)
    chosen = scores.topk(2).indices
    share = torch.bincount(chosen.view(-1), minlength=EXPERTS) / chosen.numel()
    expected = EXPERTS * (share * scores.mean(0)).sum()
    torch.testing.assert_close(sum(term.total for term in ctx.losses.values()), expected)
    _, each = run(whole())
    assert abs(float(sum(term.total for term in each.losses.values()) / 2 - expected)) > 1e-3


def test_a_run_block_by_block_passes_the_state_on() -> None:
    model = whole()
    logits, _ = run(model)
    steps = layerwise(model, [{"input_ids": IDS}], blocks=model.model.layers)
    assert len(list(steps)) == 3
    (out,) = steps.outputs()
    steps.close()
    assert torch.equal(out.logits, logits)


def test_pruning_takes_rows_of_g_and_leaves_projection_and_cell() -> None:
    model = whole()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    surgery.apply(model, plans.prune(OpenModel(model).shape, {2: [4, 0, 1]}, method="test"))
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        moved = name.startswith(SITES[1]) and (name.endswith("router.weight") or ".bank." in name)
        assert torch.equal(tensor, before[name][[4, 0, 1]] if moved else before[name]), name
    routers = [layer.router for layer in mixture_layers(model).values()]
    assert routers[0].cell.module is routers[1].cell.module is model.moestro_shared[f"rmoe_gru_{SIZE}"]
    _, ctx = run(model)
    assert routings(ctx)[1].num_experts == 3


def test_new_parts_take_the_type_of_the_model_and_logits_stay_float32() -> None:
    model = whole().to(torch.bfloat16)
    _, ctx = run(model)
    assert {p.dtype for p in model.moestro_shared.parameters()} == {torch.bfloat16}
    assert {routing.scores.logits_TC.dtype for routing in routings(ctx)} == {torch.float32}
