"""A trained mixture whose gates move ahead: what stays, what the folded norms promise, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moestro
from moestro import surgery
from moestro.core.errors import MoestroError, PlanError
from moestro.core.inputs import PlanInputs
from moestro.core.plan import ExpertPlan, LayerExperts
from moestro.core.registry import method
from moestro.core.session import session
from moestro.methods.convert.pre_gated import gain, stack_of
from moestro.methods.planning import make_plan
from moestro.models.load import load
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_folder, tiny_model
from tests.surgery.helpers import ids, keep, layers_of, logits, mixture


METHOD = method("convert.pre_gated")
LAYERS = 4


@pytest.fixture
def parent(tmp_path: Path) -> Any:
    return opened(tmp_path)


def opened(folder: Path, family: str = "qwen3_moe", **changes: Any) -> Any:
    """A mixture of four layers, its first one dense unless told otherwise."""
    tiny_folder(family, folder / "parent", num_hidden_layers=LAYERS, **changes)
    return load(folder / "parent", dtype="float32")


def converted(model: Any, **config: Any) -> Any:
    surgery.apply(model, make_plan("convert.pre_gated", model, config, seed=1))
    return model


def still(model: Any) -> Any:
    """Blocks that leave the residual stream as it is, but for the experts of the last."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or ("down_proj" in name and f"layers.{LAYERS - 1}." not in name):
                parameter.zero_()
    return model


def routings(model: Any) -> dict[str, tuple[list[list[int]], Tensor]]:
    with torch.no_grad(), session(collect=True) as told:
        model(input_ids=ids())
    return {site: (r.expert_TK.tolist(), r.weight_TK) for site, r in told.take()[0].routings.items()}


@pytest.mark.parametrize("distance", [1, 2])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "granitemoe", "deepseek_v3", "gpt_oss"])
def test_where_the_stream_stands_still_folded_gates_choose_what_their_parents_chose(
    tmp_path: Path, family: str, distance: int
) -> None:
    model = still(opened(tmp_path, family))
    before, answers = routings(model), logits(model)
    converted(model, distance=distance)
    after = routings(model)
    assert before.keys() == after.keys()
    for site, (experts, weights) in before.items():
        assert after[site][0] == experts
        torch.testing.assert_close(after[site][1], weights, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(model), answers, atol=1e-4, rtol=1e-4)


def test_without_folding_they_do_not() -> None:
    model = mixture("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    before = routings(model)
    folded, plain = (routings(converted(surgery_copy(model), fold=fold)) for fold in (True, False))
    gaps = [max(float((after[s][1] - before[s][1]).abs().max()) for s in before) for after in (folded, plain)]
    assert gaps[0] < 1e-5
    assert gaps[1] > 1e-2


def surgery_copy(model: Any) -> Any:
    """The same model once more."""
    fresh = mixture("llama")
    fresh.load_state_dict(model.state_dict())
    return fresh


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "cohere", "bert"])
def test_the_gain_of_a_norm_is_found_whatever_its_class(family: str) -> None:
    model = tiny_model(family)
    for name, module in model.named_modules():
        if not type(module).__name__.lower().endswith("norm") or module.weight.shape != (32,):
            continue
        weight = module.weight.detach().double() + (1.0 if family == "gemma3_text" else 0.0)
        found = gain(module, 32)
        torch.testing.assert_close(found / found[0], weight / weight[0], atol=1e-3, rtol=1e-3, msg=name)


def test_gains_by_hand(parent: Any) -> None:
    with torch.no_grad():
        early, late = (parent.model.layers[i].post_attention_layernorm.weight for i in (2, 3))
        early.fill_(2.0)
        early[5] = 0.0
        late.fill_(3.0)
    plan = make_plan("convert.pre_gated", parent, {})
    assert isinstance(plan, ExpertPlan)
    assert [entry.router_scale is None for entry in plan.layers] == [True, False, False]
    assert plan.layers[2].router_scale == [0.0 if i == 5 else 1.5 for i in range(32)]
    row = layers_of(parent)[2].router.weight.detach().clone()
    surgery.apply(parent, plan)
    torch.testing.assert_close(layers_of(parent)[2].router.gate.weight.detach(),
                               row * torch.tensor(plan.layers[2].router_scale))  # fmt: skip


def test_experts_and_the_first_mixtures_keep_their_bits_and_outputs(parent: Any) -> None:
    banks = [layer.bank.state_dict() for layer in layers_of(parent)]
    first = layers_of(parent)[0]
    outputs: list[Tensor] = []
    first.register_forward_hook(lambda module, args, out: outputs.append(out.detach().clone()))
    logits(parent)
    converted(parent)
    new = layers_of(parent)[0]
    new.register_forward_hook(lambda module, args, out: outputs.append(out.detach().clone()))
    logits(parent)
    assert torch.equal(*outputs)
    for layer, before in zip(layers_of(parent), banks, strict=True):
        assert all(torch.equal(layer.bank.state_dict()[name], tensor) for name, tensor in before.items())


def test_distance_0_is_the_parent(parent: Any) -> None:
    before = logits(parent)
    plan = make_plan("convert.pre_gated", parent, {"distance": 0})
    assert plan.notes["keeps"] == "as_routed"
    surgery.apply(parent, plan)
    assert torch.equal(logits(parent), before)


def test_distances_and_starts_are_different_models(tmp_path: Path) -> None:
    models = [{"distance": 1}, {"distance": 2}, {"init": "random"}, {"fold": False}, {"from_layer": 2}]
    found = [logits(converted(opened(tmp_path / str(i)), **config)) for i, config in enumerate(models)]
    for index, one in enumerate(found):
        for other in found[index + 1 :]:
            assert float((one - other).abs().max()) > 1e-3


def test_dense_layers_are_not_counted_and_early_blocks_may_keep_their_gates(tmp_path: Path) -> None:
    model = opened(tmp_path, mlp_only_layers=[1])  # mixtures 0, 2, 3
    plan = make_plan("convert.pre_gated", model, {})
    own = {entry.layer: entry.module.config["router"]["config"]["own_gate"] for entry in plan.layers}
    assert own == {0: True, 2: False, 3: False}
    assert plan.notes["chosen_ahead"] == "2-3"
    late = make_plan("convert.pre_gated", model, {"from_layer": 1})
    assert {e.layer: e.module.config["router"]["config"]["own_gate"] for e in late.layers} == {
        0: True,
        2: True,
        3: False,
    }
    before = routings(model)
    surgery.apply(model, late)
    after = routings(model)
    same = [before[site][0] == after[site][0] for site in before]
    assert same[:2] == [True, True]


def test_an_encoder_stays_as_it_is(tmp_path: Path) -> None:
    tiny_folder("switch_transformers", tmp_path / "m", num_layers=4, num_decoder_layers=4,
                num_sparse_encoder_layers=2, num_sparse_decoder_layers=2)  # fmt: skip
    model = load(tmp_path / "m", dtype="float32")
    plan = make_plan("convert.pre_gated", model, {})
    assert isinstance(plan, ExpertPlan)
    names = {layer.site.partition(".")[0]: type(layer.router).__name__ for layer in layers_of(model)}
    assert set(names) == {"encoder", "decoder"}
    surgery.apply(model, plan)
    kinds = {(layer.site.partition(".")[0], type(layer.router).__name__) for layer in layers_of(model)}
    assert kinds == {("encoder", "Switch"), ("decoder", "PreGated")}


def test_it_cannot_be_opened_with_conventional_gates(parent: Any, tmp_path: Path) -> None:
    """The folder names its routers, so that it opens as what it is or not at all; no stock architecture holds it."""
    converted(parent)
    moestro.save(parent, tmp_path / "out")
    again = load(tmp_path / "out")
    assert {type(layer.router).__name__ for layer in layers_of(again)} == {"PreGated"}
    assert torch.equal(logits(again), logits(parent))
    names = [name for name in again.state_dict() if "router" in name]
    assert names
    assert all(name.endswith("router.gate.weight") for name in names)
    with pytest.raises(MoestroError, match=r"PreGated|pre_gated"):
        moestro.export(parent, tmp_path / "stock")


def test_experts_can_be_reordered_and_dropped_afterwards(parent: Any) -> None:
    """The gate stands with its experts: a permutation changes nothing, and dropped experts take their rows along."""
    converted(parent)
    before = logits(parent)
    order = [3, 1, 4, 0, 2]
    surgery.apply(parent, ExpertPlan(method="test", layers=[keep(3, order)]))
    torch.testing.assert_close(logits(parent), before, atol=1e-5, rtol=1e-5)
    gate = layers_of(parent)[2].router.gate.weight.detach().clone()
    surgery.apply(parent, ExpertPlan(method="test", layers=[keep(3, [0, 2, 4])]))
    assert torch.equal(layers_of(parent)[2].router.gate.weight, gate[[0, 2, 4]])


def test_on_disk_it_is_the_same(parent: Any, tmp_path: Path) -> None:
    plan = make_plan("convert.pre_gated", parent, {"init": "next_gate"}, seed=1)
    surgery.apply(tmp_path / "parent", plan, out=tmp_path / "out")
    surgery.apply(parent, plan)
    assert torch.equal(logits(load(tmp_path / "out", dtype="float32")), logits(parent))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"distance": 3}, "distance=3 with 3 mixtures.*at most 2"),
        ({"from_layer": 3}, "from_layer=3 leaves no mixture.*at most 2"),
    ],
)
def test_what_leaves_nothing_ahead_is_refused(parent: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan("convert.pre_gated", parent, config)


def test_models_that_cannot_be_converted_are_refused(tmp_path: Path, parent: Any) -> None:
    with pytest.raises(PlanError, match="mixture"):
        make_plan("convert.pre_gated", tiny_model("llama"))
    with pytest.raises(PlanError, match="has 1 mixtures"):
        make_plan("convert.pre_gated", opened(tmp_path / "one", mlp_only_layers=[0, 1, 2]))
    converted(parent)
    with pytest.raises(PlanError, match="layer 1 is pre-gated already"):
        make_plan("convert.pre_gated", parent)


def test_merged_choices_and_gains_that_nobody_can_see_are_refused(parent: Any) -> None:
    shape = OpenModel(parent)
    with pytest.raises(PlanError, match="needs the open model; use fold=False"):
        METHOD.plan(PlanInputs(subject=shape), METHOD.configure({}))
    METHOD.plan(PlanInputs(subject=shape), METHOD.configure({"fold": False}))
    surgery.apply(parent, make_plan("compress.merge_experts", parent, {"keep": 2, "router": "remap"}, batches=[ids()]))
    with pytest.raises(PlanError, match="layer 1 renames its choices; convert before experts are merged"):
        make_plan("convert.pre_gated", parent)


def test_a_gain_keeps_its_sign(parent: Any) -> None:
    with torch.no_grad():
        norm = parent.model.layers[1].post_attention_layernorm
        norm.weight.copy_(torch.linspace(-1.5, 2, 32))
    found = gain(norm, 32)
    torch.testing.assert_close(found / found[-1], norm.weight.double() / norm.weight[-1].double(), atol=1e-4, rtol=1e-4)
    assert 0 < int((found < 0).sum()) < 32


def test_factors_are_checked_before_anything_changes(parent: Any) -> None:
    with pytest.raises(MoestroError, match="router_scale is for router=rows, not router=new"):
        LayerExperts(layer=1, experts=[[{"layer": 1, "expert": 0}]], router="new", router_scale=[1.0])
    wrong = keep(1, [0, 1, 2, 3, 4]).model_copy(update={"router_scale": [1.0, 2.0]})
    with pytest.raises(PlanError, match=r"router_scale has 2 factors for a 32 inputs wide"):
        surgery.apply(parent, ExpertPlan(method="test", layers=[wrong]))


def test_stacks_by_path() -> None:
    assert stack_of("model.layers.3.mlp") == "model.layers"
    assert stack_of("decoder.block.0.layer.2.mlp") == "decoder.block"
    assert stack_of("mlp") == "mlp"


def test_planners_see_the_gate_inside(parent: Any, tmp_path: Path) -> None:
    """How many a token chooses and among which groups stands in the gate; what changes it changes it there."""
    converted(parent)
    shape = OpenModel(parent).shape
    assert {there.top_k for there in shape.layers.values() if there.num_experts} == {2}
    with pytest.raises(PlanError, match="keep at least 2"):
        make_plan("compress.prune_experts", parent, {"keep": 1}, batches=[ids()])
    before = logits(parent)
    surgery.apply(parent, make_plan("convert.segment", parent, {"segments": 2}))
    assert {layer.router.gate.top_k for layer in layers_of(parent)} == {4}
    torch.testing.assert_close(logits(parent), before, atol=1e-5, rtol=0)
    surgery.apply(parent, make_plan("compress.compressed_experts", parent, {"n_main": 2}))
    assert {type(layer.router).__name__ for layer in layers_of(parent)} == {"RankedPreGated"}
    assert float((logits(parent) - before).abs().max()) > 1e-3
    moestro.save(parent, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out", dtype="float32")), logits(parent))


def test_groups_of_the_gate_are_counted_when_models_are_joined(tmp_path: Path) -> None:
    models = []
    for name in "ab":
        (tmp_path / name).mkdir()
        models.append(converted(opened(tmp_path / name, "deepseek_v3", n_routed_experts=8, n_group=4, topk_group=2)))
    plan = make_plan("convert.aggregate_experts", models[0], donors={"b": models[1]})
    surgery.apply(models[0], plan, donors={"b": models[1]})
    gates = [layer.router.gate for layer in layers_of(models[0])]
    assert {(gate.num_experts, gate.config.num_groups) for gate in gates} == {(16, 8)}
