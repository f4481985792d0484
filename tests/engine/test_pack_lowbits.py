"""Packing experts of 1, 2, 3, 4 and 8 bits and three values, mixed inside a layer: their codes arrive as they are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moestro import surgery
from moestro.core.errors import ConfigError, LoadError, StoreError
from moestro.core.plan import BitPlan
from moestro.engine.describe import describe
from moestro.engine.kernels import choose
from moestro.engine.open_native import Native
from moestro.engine.pack import pack_model
from moestro.engine.packed import EXPERTS, INDEX, Packed
from moestro.engine.slabs import load_all
from moestro.models.load import load
from moestro.models.save import save
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_folder
from tests.engine.test_open_native import IDS, alone, batch  # noqa: F401


BITS = {
    "sign1:g64:f16": 1, "uint2:g64:f16": 2, "uint3:g64:f16": 3, "int4:g64:f16": 4, "int8:row:f16": 8,
    "uint4:row:f16": 4, "ternary:row:bf16": 1.584962500721156, "trits:row:bf16": 1.584962500721156,
    "ternary14:row:bf16": 1.584962500721156, "int4:g32:f16": 4, "int4:g64:f32": 4, "trits:row:f32": 1.584962500721156,
}  # fmt: skip
MIXED = ("sign1:g64:f16", "uint2:g64:f16", "uint3:g64:f16", "int4:g64:f16", "int8:row:f16", "ternary:row:bf16",
         "trits:row:bf16", "uint4:row:f16")  # fmt: skip


def compressed(folder: Path, formats: Any, family: str = "qwen3_moe") -> Any:
    """A tiny model whose expert e of each layer is packed as ``formats(e)`` says; opened."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 128} if family == "qwen3_moe" else {}
    tiny_folder(family, folder / "plain", **sizes)
    model = load(folder / "plain")
    keys = {
        f"{layer}/{expert}/{name}": formats(expert)
        for layer, shape in OpenModel(model).shape.layers.items()
        for expert in range(shape.num_experts or 0)
        for name in shape.projections
    }
    plan = BitPlan(method="compress.mc_moe", bits={key: BITS[f] for key, f in keys.items()}, formats=keys)
    surgery.apply(model, plan)
    save(model, folder / "model")
    return load(folder / "model")


def weights(packed: Packed) -> Mapping[tuple[int, int, str], np.ndarray]:
    """Every matrix of every expert as its slab holds it."""
    data = np.fromfile(packed.path / EXPERTS, dtype=np.uint8)
    resident = packed.resident()
    table = resident["ternary_words"].view(np.uint64) if packed.model.ternary else None
    found = {}
    for layer, there in packed.experts.items():
        for expert in range(there.num):
            start, _ = packed.slab(layer, expert)
            for name, piece in there.parts_of(expert).items():
                found[layer, expert, name] = piece.array(data[start + piece.offset :][: piece.nbytes], table)
    return found


def logits(packed: Packed, kind: str) -> np.ndarray:
    kept, slabs = load_all(packed)
    description = describe(packed, packed.resident())
    steps = choose(kind).build(description, pages=8, threads=1, slabs=slabs)
    rows = batch(IDS)
    steps.begin(rows.tokens, rows.positions, rows.rows_of, rows.tables)
    steps.run(0, len(description.layers))
    found = steps.logits(rows.want)
    del steps
    for slot in kept:
        slot.free()
    return found


@pytest.mark.parametrize("shift", [0, 3])
def test_experts_of_any_width_arrive_bit_for_bit_and_answer_alike(shift: int, tmp_path: Path) -> None:
    model = compressed(tmp_path, lambda expert: MIXED[(expert + shift) % len(MIXED)])
    receipt = pack_model(tmp_path / "model", tmp_path / "packed", bits=32, exact=True)
    packed = Packed.open(tmp_path / "packed")
    assert receipt["rounded_again"] == []
    assert receipt["scales_changed_by"] == 0.0
    for (layer, expert, name), found in weights(packed).items():
        assert np.array_equal(found, model.model.layers[layer].mlp.bank.weight(expert, name).numpy()), (expert, name)
    strides = [packed.slab(1, expert)[1] for expert in range(packed.experts[1].num)]
    assert len(set(strides)) > 1
    assert packed.verify() == sum(receipt["bytes"].values())
    ids = torch.tensor([IDS])
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    twin, native = logits(packed, "twin"), logits(packed, "native")
    scale = np.abs(expected).max()
    assert np.abs(twin - native).max() <= 1e-3 * scale
    assert np.abs(twin - expected).max() <= 0.03 * scale  # activations have 8 bits here
    assert json.loads((tmp_path / "packed" / INDEX).read_text())["version"] == 2


def test_a_coded_slab_is_smaller_than_two_bits(tmp_path: Path) -> None:
    compressed(tmp_path, lambda expert: "ternary:row:bf16")
    pack_model(tmp_path / "model", tmp_path / "packed")
    packed = Packed.open(tmp_path / "packed")
    parts = packed.experts[1].parts_of(1)
    assert {piece.layout for piece in parts.values()} == {"t1"}
    assert 8 * parts["down"].nbytes < 2 * 64 * 128  # rows of 128 inputs: three eighths of a bit beside the words


def test_what_no_layout_holds_is_refused_or_rounded_again(tmp_path: Path) -> None:
    compressed(tmp_path, lambda expert: "int4:g32:f16" if expert == 2 else "uint2:g64:f16")
    with pytest.raises(LoadError, match="layer 1 expert 2 gate cannot keep its codes: groups of 32"):
        pack_model(tmp_path / "model", tmp_path / "packed", exact=True)
    assert not (tmp_path / "packed").exists()
    receipt = pack_model(tmp_path / "model", tmp_path / "packed", bits=16)
    assert receipt["expert_layouts"] == ["f16", "q2"]
    assert receipt["rounded_again"] == ["layer 1: gate, up, down", "layer 2: gate, up, down"]
    logits(Packed.open(tmp_path / "packed"), "native")  # floats and codes side by side


@pytest.mark.parametrize(("spelled", "words"), [
    ("int4:g64:f32", "scales of packed experts change by up to"), ("trits:row:f32", "ternary values of type f32"),
])  # fmt: skip
def test_values_that_would_be_rounded_are_refused_when_asked(spelled: str, words: str, tmp_path: Path) -> None:
    compressed(tmp_path, lambda expert: spelled)
    with pytest.raises(LoadError, match=words):
        pack_model(tmp_path / "model", tmp_path / "packed", exact=True)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("slots", [1.0, 2.2, 4.0])
def test_slabs_of_many_sizes_come_and_go_under_a_budget(slots: float, tmp_path: Path, alone: None) -> None:  # noqa: F811
    compressed(tmp_path, lambda expert: MIXED[expert % len(MIXED)])
    out = tmp_path / "packed"
    pack_model(tmp_path / "model", out, exact=True)
    packed = Packed.open(out)
    largest = max(there.stride for there in packed.experts.values())
    rest = sum(piece.nbytes for piece in packed.tensors.values())
    context = 64
    page = len(packed.model.layers) * 2 * 16 * packed.model.kv_heads * packed.model.head_dim * 4
    whole = Native(out, 1 << 30, context=context, threads=1)
    expected = whole.forward.step(batch(IDS))
    whole.close()
    if slots < 2:
        with pytest.raises(ConfigError, match="two experts"):
            Native(out, rest + 4 * page + int(slots * largest), context=context)
        return
    native = Native(out, rest + 4 * page + int(slots * largest), context=context, threads=1)
    assert native.store is not None
    for _ in range(3):
        assert np.array_equal(native.forward.step(batch(IDS)), expected)
        assert native.store.cache.used <= native.budget
        assert native.store._slots.allocated <= native.budget
    native.close()


def test_an_index_of_different_slabs_that_lies_is_refused(tmp_path: Path) -> None:
    compressed(tmp_path, lambda expert: MIXED[expert % 3])
    out = tmp_path / "packed"
    pack_model(tmp_path / "model", out)
    whole = json.loads((out / INDEX).read_text())
    entry = whole["experts"]["1"]
    for change, words in (
        ({"kind_of": [*entry["kind_of"][:-1], 9]}, "there is no kind 9"),
        ({"kind_of": [*entry["kind_of"][:-1], True]}, "there is no kind True"),
        ({"kind_of": entry["kind_of"][:-1]}, "for each of"),
        ({"kinds": []}, "no lists of forms"),
        ({"kinds": [{"stride": 4096}] * 3}, "has no parts"),
        ({"stride": 4096}, "unknown key 'stride'"),
        (
            {"kinds": [{**kind, "stride": kind["stride"] + (1 << 30)} for kind in entry["kinds"]]},
            "overlap|after the end",
        ),
    ):
        whole["experts"]["1"] = entry | change
        (out / INDEX).write_text(json.dumps(whole))
        with pytest.raises(LoadError, match=words):
            Packed.open(out)


def test_damaged_words_are_an_error_of_the_step_not_of_the_process(tmp_path: Path) -> None:
    compressed(tmp_path, lambda expert: "ternary:row:bf16")
    out = tmp_path / "packed"
    pack_model(tmp_path / "model", out)
    packed = Packed.open(out)
    with (out / EXPERTS).open("r+b") as file:
        for expert in range(packed.experts[1].num):
            start, _ = packed.slab(1, expert)
            file.seek(start)
            file.write(b"\xff" * 64)
    with pytest.raises((RuntimeError, StoreError), match="NaN"):
        logits(Packed.open(out), "native")
    with (out / "resident.bin").open("r+b") as file:
        file.seek(packed.tensors["ternary_words"].offset)
        file.write(bytes(8))
    with pytest.raises(LoadError, match="the entry 0 is damaged; pack the model again"):
        describe(Packed.open(out), packed.resident())
