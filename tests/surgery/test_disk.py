"""Checkpoints changed on disk: the same tensors as in memory, without opening the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moestro
from moestro import surgery
from moestro.core.errors import PlanError, SaveError
from moestro.core.inputs import PlanInputs
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, ServingPlan
from moestro.core.registry import method
from moestro.models.source import SafetensorsSource
from moestro.surgery import plans
from moestro.surgery.disk import Folder
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_folder
from tests.surgery.helpers import ids, keep, layers_of, logits, moe_module


def subject(folder: Path) -> OpenModel:
    opened = Folder(folder)
    return OpenModel(opened.model, "the checkpoint", opened.read)


def twins(family: str, tmp_path: Path, plan: Any, **donors: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """The same plan applied in memory and on disk: both models and both receipts."""
    tiny_folder(family, tmp_path / "in")
    tiny_folder(family, tmp_path / "other", seed=1)
    made: ExpertPlan = plan(subject(tmp_path / "in")) if callable(plan) else plan
    refs = {name: tmp_path / where for name, where in donors.items()}
    written = surgery.apply(tmp_path / "in", made, tmp_path / "out", donors=refs, calib=[ids()])
    model = moestro.load(tmp_path / "in")
    opened = {name: moestro.load(ref) for name, ref in refs.items()}
    receipt = surgery.apply(model, made, donors=opened, calib=[ids()])
    return model, moestro.load(tmp_path / "out"), receipt, written


def assert_same(memory: Any, disk: Any) -> None:
    mine, theirs = memory.state_dict(), disk.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    torch.testing.assert_close(logits(disk), logits(memory), atol=1e-6, rtol=0)


def dense_plan(opened: OpenModel) -> ExpertPlan:
    use = method("convert.upcycle")
    found: ExpertPlan = use.plan(
        PlanInputs(subject=opened, seed=4),
        use.configure({"redraw": 0.5, "noise": 0.1, "num_experts": 3, "shared": 0.5}),
    )
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "cohere", "bert"])
def test_upcycling_on_disk_is_upcycling_in_memory(family: str, tmp_path: Path) -> None:
    memory, disk, receipt, written = twins(family, tmp_path, dense_plan)
    assert_same(memory, disk)
    assert written["ledger"] == receipt["ledger"]
    assert written["layers"] == receipt["layers"]
    assert written["parameters"] == receipt["parameters"]
    for name, figure in receipt["parity"]["as_routed"].items():
        assert written["parity"]["as_routed"][name] == pytest.approx(figure, abs=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_stock_mixtures_are_pruned_alike(family: str, tmp_path: Path) -> None:
    """Also families whose checkpoints pack experts otherwise, have biases, shared experts, selection biases."""

    def plan(opened: OpenModel) -> ExpertPlan:
        kept = {
            layer: [e for e in range(there.num_experts) if family == "deepseek_v3" or e != layer]
            for layer, there in opened.shape.layers.items()
            if there.num_experts is not None
        }
        order = {layer: experts[::-1] for layer, experts in kept.items()}
        return plans.prune(opened.shape, order if family != "deepseek_v3" else kept, method="test")

    memory, disk, receipt, written = twins(family, tmp_path, plan)
    assert_same(memory, disk)
    assert written["ledger"] == receipt["ledger"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # the second ties its embeddings
def test_a_split_that_reads_weights_plans_from_disk(family: str, tmp_path: Path) -> None:
    use = method("convert.split")

    def plan(opened: OpenModel) -> Any:
        return use.plan(
            PlanInputs(subject=opened), use.configure({"num_experts": 4, "top_k": 4, "partition": "weights"})
        )

    memory, disk, receipt, written = twins(family, tmp_path, plan)
    assert_same(memory, disk)
    assert written["parity"]["as_routed"]["max_abs_diff"] <= 1e-5
    assert receipt["parity"]["all_on"]["max_abs_diff"] <= 1e-5


def test_a_second_cut_follows_the_first(tmp_path: Path) -> None:
    memory, _, _, _ = twins("llama", tmp_path, dense_plan)
    plan = plans.merge(OpenModel(memory).shape, {1: [{0: 1.0, 2: 1.0}, {1: 1.0}]}, method="test", router="remap")
    surgery.apply(tmp_path / "out", plan, tmp_path / "again")
    surgery.apply(memory, plan)
    again = moestro.load(tmp_path / "again")
    assert_same(memory, again)
    assert [layer.bank.num_experts for layer in layers_of(again)] == [3, 2]
    assert len(json.loads((tmp_path / "again" / "config.json").read_text())["swaps"]) == 2


@pytest.mark.parametrize("rest", ["mean", "b"])
def test_donors_on_disk(rest: str, tmp_path: Path) -> None:
    experts = [[ExpertSource(layer=0)], [ExpertSource(donor="b", layer=0)]]
    entry = LayerExperts(layer=0, experts=experts, router="new", module=moe_module(2, 1))
    plan = ExpertPlan(method="test", layers=[entry], rest=rest)
    memory, disk, _, _ = twins("llama", tmp_path, plan, b="other")
    assert_same(memory, disk)
    other = moestro.load(tmp_path / "other")
    assert torch.equal(layers_of(disk)[0].bank.weight(1, "up"), other.model.layers[0].mlp.up_proj.weight)


def test_tied_weights_and_bfloat16_are_written_as_they_are(tmp_path: Path) -> None:
    model = tiny_folder("llama", tmp_path / "float", tie_word_embeddings=True)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "in")
    surgery.apply(tmp_path / "in", dense_plan(subject(tmp_path / "in")), tmp_path / "out")
    source = SafetensorsSource(tmp_path / "out")
    assert {source.dtype(key) for key in source.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert "lm_head.weight" not in source.keys()  # noqa: SIM118
    again = moestro.load(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.dtype == torch.bfloat16
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(again.state_dict()[name], model.state_dict()[name])


def test_the_receipt_and_the_tokenizer_land_in_the_folder(tmp_path: Path) -> None:
    tiny_folder("llama", tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    plan = dense_plan(subject(tmp_path / "in"))
    written = surgery.apply(tmp_path / "in", plan, tmp_path / "out", calib=[ids()])
    told = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert told["surgery"] == [json.loads(json.dumps(written))]
    assert told["mixtures"] == {"model.layers.0.mlp": 3, "model.layers.1.mlp": 3}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_nothing_is_written_when_a_plan_does_not_fit(tmp_path: Path) -> None:
    tiny_folder("llama", tmp_path / "in")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PlanError, match="no feed-forward site in layer 9"):
        surgery.apply(tmp_path / "in", ExpertPlan(method="test", layers=[keep(9, [0])]), tmp_path / "out")
    with pytest.raises(PlanError, match="is a checkpoint; say with `out`"):
        surgery.apply(tmp_path / "in", dense_plan(subject(tmp_path / "in")))
    with pytest.raises(PlanError, match="this one is about serving"):
        surgery.apply(tmp_path / "in", ServingPlan(method="test", budget_bytes=1, tiers={}), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_left_when_a_tensor_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder("llama", tmp_path / "in")
    before = sorted(tmp_path.iterdir())

    def broken(self: Folder, name: str) -> Tensor:
        raise OSError("disk gone")

    plan = dense_plan(subject(tmp_path / "in"))
    monkeypatch.setattr(Folder, "tensor", broken)
    with pytest.raises((OSError, SaveError), match="disk gone"):
        surgery.apply(tmp_path / "in", plan, tmp_path / "out")
    assert sorted(path for path in tmp_path.iterdir() if not path.name.startswith(".")) == before


def test_an_open_model_can_be_saved_in_the_same_call(tmp_path: Path) -> None:
    tiny_folder("llama", tmp_path / "in")
    model = moestro.load(tmp_path / "in")
    surgery.apply(model, dense_plan(OpenModel(model)), tmp_path / "out")
    assert_same(model, moestro.load(tmp_path / "out"))


def test_layers_are_let_go_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep model never has all its new layers in memory."""
    from moestro.surgery import disk

    tiny_folder("llama", tmp_path / "in", num_hidden_layers=9)
    held: list[int] = []
    make = disk.Changed._layer

    def watched(self: disk.Changed, site: str) -> dict[str, Tensor]:
        found = make(self, site)
        held.append(len(self._layers))
        return found

    monkeypatch.setattr(disk.Changed, "_layer", watched)
    surgery.apply(tmp_path / "in", dense_plan(subject(tmp_path / "in")), tmp_path / "out")
    assert max(held) <= disk.HELD
    assert len(layers_of(moestro.load(tmp_path / "out"))) == 9


def test_buffers_are_read_from_the_files_and_filled_parameters_stand_for_themselves(tmp_path: Path) -> None:
    model = tiny_folder("deepseek_v3", tmp_path / "in")
    folder = Folder(tmp_path / "in")
    router = layers_of(folder.model)[0].router
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(folder.read(router.selection_bias), bias)
    filled = torch.nn.Parameter(torch.ones(3))
    assert torch.equal(folder.read(filled), torch.ones(3))
