"""Plans about bits, applied: every family, in memory and on disk, complete ledgers, honest bytes, and refusals."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moestro
from moestro import surgery
from moestro.core.errors import ConfigError, LedgerError, PlanError, SaveError
from moestro.core.layer import mixture_layers
from moestro.core.packed import PackedFFN
from moestro.core.plan import BitPlan
from moestro.models.source import SafetensorsSource
from moestro.ops import formats
from moestro.surgery import bits, bits_disk
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_folder, tiny_model
from tests.surgery.helpers import assert_untouched, ids, layers_of, logits, mixture, snapshot


MIXTURES = ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe")
MIXED = ("int8", "int4:g16", "uint3:g8:f16", "uint2:g20", "sign1", "wide:row:f32")


def plan_for(model: nn.Module, spelled: tuple[str, ...] = MIXED, **more: Any) -> BitPlan:
    """Packings dealt out in turn over all matrices, so that a layer has several."""
    keys = [
        f"{layer}/{expert}/{name}"
        for layer, there in OpenModel(model).shape.layers.items() if there.num_experts is not None
        for expert in range(there.num_experts) for name in there.projections
    ]  # fmt: skip
    packings = {key: spelled[(index + index // 7) % len(spelled)] for index, key in enumerate(keys)}
    widths = {key: formats.format_named(word.split(":")[0]).bits for key, word in packings.items()}
    return BitPlan(method="test", bits=widths, formats=packings, **more)


def loaded(family: str, tmp_path: Path) -> Any:
    tiny_folder(family, tmp_path / "in")
    return moestro.load(tmp_path / "in")


def by_hand(model: nn.Module, plan: BitPlan) -> Any:
    """The float model with every matrix replaced by what its codes stand for."""
    for layer, place in OpenModel(model).places.items():
        for expert in range(place.shape.num_experts or 0):
            for name in place.shape.projections:
                parameter, index = place.slot(expert, name)
                used = formats.packing(plan.packing(layer, expert, name) or "")
                matrix = parameter.detach()[index]
                parts, _ = formats.quantise(matrix[None], used)
                matrix.copy_(formats.dequantise(parts, tuple(matrix.shape), used)[0])
    return model


@pytest.mark.parametrize("family", MIXTURES)
def test_packed_experts_compute_what_their_codes_stand_for(family: str, tmp_path: Path) -> None:
    """Module lists, fused and transposed-interleaved tensors; biases, shared branches, selection biases stay."""
    model = loaded(family, tmp_path)
    plan = plan_for(model)
    expected = logits(by_hand(moestro.load(tmp_path / "in"), plan))
    around = {
        k: v.clone() for k, v in model.state_dict().items() if ".bank.gate_up_proj" not in k and "down_proj" not in k
    }
    receipt = surgery.apply(model, plan, calib=[ids()])
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert receipt["ledger"]["rows_touched"] == receipt["ledger"]["rows_expected"] == len(plan.bits)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in around.items())
    assert receipt["parity"]["as_routed"]["max_abs_diff"] > 0
    assert receipt["parameters"]["before"] == receipt["parameters"]["after"]


@pytest.mark.parametrize("family", MIXTURES)
def test_on_disk_is_in_memory(family: str, tmp_path: Path) -> None:
    model = loaded(family, tmp_path)
    plan = plan_for(model)
    written = surgery.apply(tmp_path / "in", plan, tmp_path / "out", calib=[ids()])
    receipt = surgery.apply(model, plan, calib=[ids()])
    again = moestro.load(tmp_path / "out")
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(
        torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype for name, tensor in mine.items()
    )
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)
    for key in ("ledger", "layers", "bytes", "bits_per_weight", "parameters", "notes"):
        assert written[key] == receipt[key], key
    assert json.loads((tmp_path / "out" / "receipt.json").read_text())["surgery"] == [json.loads(json.dumps(written))]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_converted_models_are_packed_and_reopened(family: str, tmp_path: Path) -> None:
    model = mixture(family, experts=3)
    surgery.apply(model, plan_for(model))
    moestro.save(model, tmp_path / "out")
    again = moestro.load(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)
    assert all(isinstance(layer.bank, PackedFFN) for layer in layers_of(again))


def test_encoder_decoders_too(tmp_path: Path) -> None:
    tiny_folder("switch_transformers", tmp_path / "in")
    model = moestro.load(tmp_path / "in")
    plan = plan_for(model)
    surgery.apply(tmp_path / "in", plan, tmp_path / "out")
    surgery.apply(model, plan)
    again = moestro.load(tmp_path / "out")
    batch = {"input_ids": ids(), "decoder_input_ids": ids()}
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)
    assert [type(layer.bank).__name__ for layer in layers_of(again)] == ["PackedFFN"] * 2


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_stock_models_come_back_through_auto_classes_and_generate(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = loaded(family, tmp_path)
    surgery.apply(tmp_path / "in", plan_for(model, ("int8",)), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = ids(1, 5)
    made = again.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(made, moestro.load(tmp_path / "out").generate(prompt, max_new_tokens=6, do_sample=False))
    assert (logits(again) - logits(model)).abs().max() < 0.05 * logits(model).abs().max()


def test_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    model = loaded("qwen3_moe", tmp_path)
    receipt = surgery.apply(tmp_path / "in", plan_for(model, ("int4:g16",)), tmp_path / "out")
    source = SafetensorsSource(tmp_path / "out")
    packed = sum(source.nbytes(key) for key in source.keys() if ".bank." in key)  # noqa: SIM118
    everything = sum(source.nbytes(key) for key in source.keys())  # noqa: SIM118
    assert receipt["bytes"]["experts"]["after"] == packed
    assert sum(entry["after"] for entry in receipt["bytes"].values()) == everything
    again = moestro.load(tmp_path / "out")
    banks = [layer.bank for layer in layers_of(again)]
    assert sum(bank.nbytes(expert) for bank in banks for expert in range(bank.num_experts)) == packed
    # gate and up: rows of 32 in 2 groups; down: rows of 20 in groups of 16 and 4; 4 bits and 4 bytes a group.
    weights = 2 * 5 * 3 * 20 * 32
    by_hand = 2 * 5 * (2 * 20 * (16 + 8) + 32 * (10 + 8))
    assert packed == by_hand
    assert receipt["bits_per_weight"]["after"] == pytest.approx(8 * by_hand / weights)
    assert receipt["bits_per_weight"]["before"] == 32
    for what in ("router", "attention", "embedding", "norm", "head"):
        assert receipt["bytes"][what]["before"] == receipt["bytes"][what]["after"] > 0


def test_no_float_bank_is_made_on_the_way_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("qwen3_moe", tmp_path)
    surgery.apply(model, plan_for(model, ("int4:g16",)))
    moestro.save(model, tmp_path / "out")
    filled: list[int] = []
    plain = nn.init.normal_
    monkeypatch.setattr(nn.init, "normal_", lambda tensor, **k: filled.append(tensor.numel()) or plain(tensor, **k))
    again = moestro.load(tmp_path / "out")
    assert max(filled, default=0) < 5 * 32 * 20
    assert all(p.ndim < 3 for p in again.parameters())


def test_types_of_scales_survive_a_change_of_the_models_type(tmp_path: Path) -> None:
    model = loaded("qwen3_moe", tmp_path)
    surgery.apply(model, plan_for(model, ("uint3:g8:f16", "int4:g16")))
    before = {name: buffer.clone() for name, buffer in layers_of(model)[0].bank.named_buffers()}
    model.to(torch.bfloat16)
    assert all(torch.equal(dict(layers_of(model)[0].bank.named_buffers())[name], b) for name, b in before.items())
    assert logits(model).dtype == torch.bfloat16
    moestro.save(model, tmp_path / "out")
    again = moestro.load(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert {b.dtype for n, b in layers_of(again)[0].bank.named_buffers() if n.endswith("scale")} == {
        torch.float16,
        torch.float32,
    }


def test_changed_choices_are_counted_and_warned_of(tmp_path: Path) -> None:
    coarse = surgery.apply(
        loaded("qwen3_moe", tmp_path), plan_for(loaded("qwen3_moe", tmp_path), ("sign1",)), calib=[ids()]
    )
    fine = surgery.apply(
        moestro.load(tmp_path / "in"), plan_for(moestro.load(tmp_path / "in"), ("int8",)), calib=[ids()]
    )
    sites = list(coarse["changed_choices"]["by_site"])
    assert sites == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert coarse["changed_choices"]["by_site"][sites[0]] == 0  # nothing before the first mixture changed
    assert coarse["changed_choices"]["by_site"][sites[1]] > 0.02
    assert "of the choices at model.layers.2.mlp are others than before" in coarse["warnings"][0]
    assert fine["changed_choices"]["mean"] < coarse["changed_choices"]["mean"]


def test_layers_stay_wide_only_when_asked(tmp_path: Path) -> None:
    model = loaded("qwen3_moe", tmp_path)
    plan = plan_for(model, ("int8",))
    some = {key: value for key, value in plan.bits.items() if key.startswith("1/")}
    packs = {key: plan.formats[key] for key in some}
    before = snapshot(model)
    with pytest.raises(
        PlanError, match="layer 2 expert 0 projection gate is not in the plan and would stay wide unasked"
    ):
        surgery.apply(model, BitPlan(method="test", bits=some, formats=packs))
    assert_untouched(model, before)
    receipt = surgery.apply(model, BitPlan(method="test", bits=some, formats=packs, wide=[2]))
    assert receipt["wide"] == [2]
    assert [type(layer.bank).__name__ for layer in layers_of(model)] == ["PackedFFN", "StackedFFN"]
    moestro.save(model, tmp_path / "out")
    torch.testing.assert_close(logits(moestro.load(tmp_path / "out")), logits(model), atol=1e-6, rtol=0)


def test_a_matrix_that_is_not_packed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger is filled from what stands in the layer, not from what was meant to."""
    model = loaded("qwen3_moe", tmp_path)
    plan = plan_for(model, ("int8",))
    honest = bits.pack_layer

    def forgetful(*args: Any) -> Any:
        layer = honest(*args)
        layer.bank.packings["up"][3] = formats.Packing("wide")
        return layer

    monkeypatch.setattr("moestro.surgery.bits_memory.pack_layer", forgetful)
    with pytest.raises(LedgerError, match="layer 1 expert 3 projection up was not touched"):
        surgery.apply(model, plan)


def test_what_is_packed_is_not_packed_again(tmp_path: Path) -> None:
    model = loaded("qwen3_moe", tmp_path)
    plan = plan_for(model, ("int4:g16",))
    surgery.apply(tmp_path / "in", plan, tmp_path / "out")
    for source in (moestro.load(tmp_path / "out"), tmp_path / "out"):
        with pytest.raises(PlanError, match=r"layer 1: its experts are packed already \(int4\)"):
            surgery.apply(source, plan, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_weights_that_are_not_finite_are_refused_before_anything_happens(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    bank = model.model.layers[2].mlp.experts
    with torch.no_grad():
        bank.down_proj[3, 1, 2] = float("nan")
    model.save_pretrained(tmp_path / "in")
    opened = moestro.load(tmp_path / "in")
    before = snapshot(opened)
    for source in (opened, tmp_path / "in"):
        with pytest.raises(PlanError, match="layer 2 expert 3 projection down: 1 of 640 weights are NaN or infinite"):
            surgery.apply(source, plan_for(opened), tmp_path / "out")
    with torch.no_grad():
        layers_of(opened)[1].bank.down_proj[3, 1, 2] = 0
    before[0]["model.layers.2.mlp.bank.down_proj"][3, 1, 2] = 0
    assert_untouched(opened, before)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("qwen3_moe", tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 1000))
    monkeypatch.setattr(bits_disk, "check_finite", lambda *a: pytest.fail("read weights first"))
    with pytest.raises(SaveError, match=r"the model takes \d[\d,]+ bytes, 1,000 are free"):
        surgery.apply(tmp_path / "in", plan_for(model), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": {"1/0/router": 4}}, "routers, norms, embeddings and attention are never packed"),
        ({"bits": {"0/0/up": 8}}, "layer 0 is dense"),
        ({"bits": {"9/0/up": 8}}, "no feed-forward site in layer 9"),
        ({"bits": {"1/7/up": 8}}, "the plan has bits for 1/7/up, which the model does not have"),
        ({"formats": {"1/0/up": "int4:g16"}}, "layer 1 expert 0 projection up has 8 bits, but int4:g16"),
        ({"formats": {"1/0/up": "int8:g64"}}, "layer 1 expert 0 projection up: groups of 64 do not fit rows of 32"),
        ({"wide": [1, 2]}, "layer 1 is in `wide`, and 1/0/gate has bits"),
        ({"model_hash": "0" * 64}, "for a model of hash 000000000000"),
    ],
)
def test_plans_that_do_not_fit(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = loaded("qwen3_moe", tmp_path)
    plan = plan_for(model, ("int8",))
    before = snapshot(model)
    values = {**plan.model_dump(), **change}
    for name in ("bits", "formats"):
        values[name] = {**getattr(plan, name), **change.get(name, {})}
    if "bits" in change:
        values["formats"] = plan.formats
    with pytest.raises((PlanError, ConfigError), match=words):
        surgery.apply(model, BitPlan(**values))
    assert_untouched(model, before)


def test_a_plan_with_bits_alone(tmp_path: Path) -> None:
    model = loaded("qwen3_moe", tmp_path)
    plan = plan_for(model, ("int8",))
    widths = [8.0, 4.0, 3.0, 2.0, 1.0, 16.0]
    bits_only = {key: widths[index % 6] for index, key in enumerate(plan.bits)}
    surgery.apply(model, BitPlan(method="test", bits=bits_only, group_size=10))
    used = {str(one) for layer in layers_of(model) for each in layer.bank.packings.values() for one in each}
    assert used == {f"{name}:g10:f32" for name in ("int8", "int4", "int3", "int2", "sign1", "wide")}


def test_models_of_transformers_must_be_opened_first() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(PlanError, match=r"must be opened with moestro\.load"):
        surgery.apply(model, BitPlan(method="test", bits={"1/0/up": 8}))


def test_donors_and_optimisers_have_no_part_in_it(tmp_path: Path) -> None:
    model = loaded("qwen3_moe", tmp_path)
    plan = plan_for(model)
    with pytest.raises(PlanError, match="takes nothing from donors"):
        surgery.apply(model, plan, donors={"b": model})
    with pytest.raises(PlanError, match="packed experts are not trained"):
        surgery.apply(model, plan, optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(PlanError, match="say with `out`"):
        surgery.apply(tmp_path / "in", plan)
    assert len(mixture_layers(model)) == 2
