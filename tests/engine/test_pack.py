"""Packing: what is written is what the model holds, for every family and for Moestro's own models."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moestro import surgery
from moestro.core.errors import LoadError, SaveError
from moestro.core.inputs import PlanInputs
from moestro.core.registry import method
from moestro.engine import pack as writing
from moestro.engine.describe import describe
from moestro.engine.kernels import choose
from moestro.engine.layout import aligned
from moestro.engine.pack import pack_model
from moestro.engine.pack_model import NATIVE
from moestro.engine.packed import EXPERTS, Packed
from moestro.models.load import load
from moestro.models.save import save
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import TINY, VOCAB, tiny_folder
from tests.engine.models import one_sequence


IDS = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(5))


def logits(packed: Packed) -> np.ndarray:
    """Of IDS, by the numpy twin, with every slab in memory."""
    description = describe(packed, packed.resident())
    whole = np.fromfile(packed.path / EXPERTS, dtype=np.uint8)
    memory = aligned(whole.size, 4096)
    memory[:] = whole
    slabs = {
        layer: memory.ctypes.data + there.offset + there.stride * np.arange(there.num, dtype=np.int64)
        for layer, there in packed.experts.items()
    }
    steps = choose("twin").build(description, pages=8, threads=1, slabs=slabs)
    tokens = IDS[0].numpy().astype(np.int32)
    steps.begin(tokens, **one_sequence(len(tokens)))
    steps.run(0, len(description.layers))
    return steps.logits(np.arange(len(tokens), dtype=np.int32))


@torch.no_grad()
def answers(model: Any) -> np.ndarray:
    found: np.ndarray = model(IDS).logits[0].float().numpy()
    return found


@pytest.mark.parametrize("family", NATIVE)
def test_native_models_answer_as_transformers_does(family: str, tmp_path: Path) -> None:
    model = tiny_folder(family, tmp_path / "model")
    receipt = pack_model(tmp_path / "model", tmp_path / "packed", bits=32)
    packed = Packed.open(tmp_path / "packed")
    assert receipt["dialect"] == packed.model.dialect == "native"
    assert receipt["relative_error"] == {"resident": 0.0, "experts": 0.0}
    expected = answers(model)
    assert np.abs(logits(packed) - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 8}}, 1e-5),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                              "original_max_position_embeddings": 16}}, 1e-5),
        ({"tie_word_embeddings": True}, 1e-5),
        ({"attention_bias": True}, 1e-5),
        ({"sliding_window": 5}, 1e-5),
    ],
)  # fmt: skip
def test_settings_of_a_decoder_arrive(changes: dict[str, Any], bound: float, tmp_path: Path) -> None:
    family = "mistral" if "sliding_window" in changes else "llama"
    model = tiny_folder(family, tmp_path / "model", **changes)
    pack_model(tmp_path / "model", tmp_path / "packed", bits=32)
    expected = answers(model)
    assert np.abs(logits(Packed.open(tmp_path / "packed")) - expected).max() <= bound * max(1, np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_rounded_matrices_are_the_model_s_within_their_step(bits: int, tmp_path: Path) -> None:
    tiny_folder("qwen3_moe", tmp_path / "model")
    receipt = pack_model(tmp_path / "model", tmp_path / "packed", bits=bits)
    packed, subject = Packed.open(tmp_path / "packed"), OpenModel(load(tmp_path / "model"))
    data = np.fromfile(packed.path / EXPERTS, dtype=np.uint8)
    for layer, there in packed.experts.items():
        for expert in range(there.num):
            start, _ = packed.slab(layer, expert)
            for name, piece in there.parts.items():
                found = piece.array(data[start + piece.offset :][: piece.nbytes])
                weight = subject.tensor(layer, expert, name).float().numpy()
                step = np.abs(weight).max() / {4: 8, 8: 127, 16: 1000}[bits]
                assert np.abs(found - weight).max() <= 1.01 * step
    assert receipt["relative_error"]["experts"] < {4: 0.12, 8: 0.01, 16: 1e-3}[bits]
    assert receipt["ledger"]["rows_touched"] == 2 * 5 * 3
    assert packed.verify() == sum(receipt["bytes"].values())


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "switch_transformers"])
def test_other_families_keep_their_parameters_beside_slabs(family: str, tmp_path: Path) -> None:
    tiny_folder(family, tmp_path / "model")
    receipt = pack_model(tmp_path / "model", tmp_path / "packed", bits=32)
    packed, model = Packed.open(tmp_path / "packed"), load(tmp_path / "model")
    assert receipt["dialect"] == "modules"
    assert family in receipt["why"]
    with pytest.raises(LoadError, match="cannot run it: the native forward does not know the family"):
        describe(packed, {})
    resident = packed.resident()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in packed.tensors}
    assert len(state) == len(packed.tensors)
    for name, tensor in state.items():
        assert resident[name].tobytes() == tensor.contiguous().numpy().tobytes()
    data = np.fromfile(packed.path / EXPERTS, dtype=np.uint8)
    subject = OpenModel(model)
    for layer, there in packed.experts.items():
        start, _ = packed.slab(layer, there.num - 1)
        for name, piece in there.parts.items():
            found = piece.array(data[start + piece.offset :][: piece.nbytes])
            assert np.array_equal(found, subject.tensor(layer, there.num - 1, name).numpy()), name
    assert {"gate_bias", "down_bias"} <= there.parts.keys() or family != "gpt_oss"


def compressed(family: str, formats: Any, folder: Path) -> None:
    """A model whose experts are packed, as a Moestro folder."""
    tiny_folder(family, folder / "plain", hidden_size=64, intermediate_size=128)
    used = method("compress.finequant")
    opened = load(folder / "plain")
    plan = used.plan(PlanInputs(subject=OpenModel(opened)), used.configure(formats))
    surgery.apply(opened, plan)
    save(opened, folder / "model")


@pytest.mark.parametrize(
    ("bits", "group", "layout"), [(4, 64, "q4"), (8, 64, "q8"), (3, None, "q3"), (2, 64, "q2"), (4, None, "q4")]
)
def test_codes_of_packed_experts_are_kept(bits: int, group: int | None, layout: str, tmp_path: Path) -> None:
    compressed("mixtral", {"bits": bits, "group_size": group}, tmp_path)
    receipt = pack_model(tmp_path / "model", tmp_path / "packed", bits=32)
    packed, model = Packed.open(tmp_path / "packed"), load(tmp_path / "model")
    assert receipt["expert_layouts"] == [layout]
    assert receipt["rounded_again"] == []
    data = np.fromfile(packed.path / EXPERTS, dtype=np.uint8)
    bank = model.model.layers[1].mlp.bank
    for name, piece in packed.experts[1].parts.items():
        start, _ = packed.slab(1, 3)
        found = piece.array(data[start + piece.offset :][: piece.nbytes])
        exact = bank.weight(3, name).numpy()
        assert np.abs(found - exact).max() <= 1e-3 * np.abs(exact).max()  # the scale's rounding to float16
        assert np.array_equal(np.sign(found), np.sign(exact))
    expected = answers(model)
    assert packed.model.dialect == "native"
    assert np.abs(logits(packed) - expected).max() < 0.05 * np.abs(expected).max()


def test_codes_in_other_groups_are_rounded_again_and_it_says_so(tmp_path: Path) -> None:
    compressed("mixtral", {"bits": 4, "group_size": 32}, tmp_path)
    receipt = pack_model(tmp_path / "model", tmp_path / "packed", bits=16)
    assert receipt["expert_layouts"] == ["f16"]
    assert receipt["rounded_again"] == ["layer 0: gate, up, down", "layer 1: gate, up, down"]


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    tiny_folder("mixtral", tmp_path / "model")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SaveError, match=r"takes [\d,]+ bytes, 1,000 are free"):
        pack_model(tmp_path / "model", tmp_path / "packed")
    monkeypatch.undo()
    with pytest.raises(LoadError, match="gemma3_text, and it has no mixture"):
        pack_model(tiny_at("gemma3_text", tmp_path), tmp_path / "packed")
    model = load(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.bank.down_proj[2, 3, 4] = float("nan")
    save(model, tmp_path / "broken")
    with pytest.raises(LoadError, match=r"layers\.1\.mlp\.bank expert 2 down: the weight \[3, 4\] is nan"):
        pack_model(tmp_path / "broken", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    assert not list(tmp_path.glob(".packed*"))
    pack_model(tmp_path / "model", tmp_path / "packed")
    with pytest.raises(SaveError, match="exists already"):
        pack_model(tmp_path / "model", tmp_path / "packed")
    pack_model(tmp_path / "model", tmp_path / "packed", bits=4, overwrite=True)
    assert json.loads((tmp_path / "packed" / "receipt.json").read_text())["bits"] == 4


def tiny_at(family: str, folder: Path) -> Path:
    tiny_folder(family, folder / family)
    return folder / family


def test_every_family_is_packed_or_refused_with_a_reason() -> None:
    assert set(NATIVE) <= set(TINY)
