"""Routers that read an earlier layer's input: dialect, packing, kernels, and experts read because they are known."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moestro
from moestro import surgery
from moestro.core.errors import ConfigError
from moestro.engine.describe import describe
from moestro.engine.dialect import ModelSpec
from moestro.engine.kernels import choose
from moestro.engine.native_forward import NativeForward
from moestro.engine.pack import pack_model
from moestro.engine.packed import Packed as Folder
from moestro.engine.slabs import load_all
from moestro.methods.planning import make_plan
from moestro.models.load import load
from moestro.models.swap import swap
from moestro.testing.tiny import VOCAB, tiny_folder
from tests.engine.models import Packed, build
from tests.engine.test_forward import close, forward, prompt, rows
from tests.engine.test_forward_store import kernels_of
from tests.engine.test_kernels import every_isa, same_bits


LAYERS = 5
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"router": {"kind": "softmax_topk"}},
    "chosen": {"router": {"kind": "topk_softmax"}, "shared": 32, "shared_gate": True},
    "sigmoid in groups": {"router": {"kind": "sigmoid_bias", "groups": 4, "top_groups": 2}, "layout": "q4"},
    "float32": {"layout": "f32"},
    "with a dense layer": {"dense_layers": (2,), "layout": "f32"},
}


def ahead(packed: Packed, distance: int) -> Packed:
    """The same model whose routers read ``distance`` mixtures back, where there are so many."""
    layers = list(packed.description.layers)
    mixtures = [index for index, layer in enumerate(layers) if layer.router is not None]
    for place, index in enumerate(mixtures):
        if place >= distance:
            router = dataclasses.replace(layers[index].router, ahead=index - mixtures[place - distance])
            layers[index] = dataclasses.replace(layers[index], router=router)
    return dataclasses.replace(packed, description=dataclasses.replace(packed.description, layers=layers))


def model(kind: str, distance: int = 1) -> Packed:
    return ahead(build(layers=LAYERS, **KINDS[kind]), distance)


# -- kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_native_equals_the_twin_whatever_the_chunks(kind: str, distance: int) -> None:
    packed, tokens = model(kind, distance), prompt()
    twin = forward(packed, kernels=choose("twin")).step(rows(tokens))
    for index, kernels in enumerate(every_isa()[:3]):
        whole = forward(packed, kernels=kernels, threads=1 + index % 2).step(rows(tokens))
        parts = forward(packed, kernels=kernels, threads=2)
        cut = [parts.step(rows(tokens[a:b], a)) for a, b in ((0, 1), (1, 20), (20, 22), (22, 40))]
        assert same_bits(whole, np.concatenate(cut))
        assert close(whole, twin)
    usual = build(layers=LAYERS, **KINDS[kind])  # kept: the forward knows only addresses of its experts
    plain = forward(usual, kernels=every_isa()[0]).step(rows(tokens))
    assert np.abs(plain - whole).max() > 1e-2 * np.abs(plain).max()


@pytest.mark.parametrize("kind", ["native", "twin"])
def test_choices_are_those_of_the_later_gate_on_the_earlier_input_and_known_then(kind: str) -> None:
    packed = model("softmax", 2)
    one = forward(packed, kernels=kernels_of(kind))
    batch = rows(prompt(9))
    one.steps.begin(batch.tokens, batch.positions, batch.rows_of, batch.tables)
    early: dict[int, Any] = {}
    for layer in range(LAYERS):
        one.steps.attention(layer)
        for later in one.description.routed_at(layer):
            early[later] = (one.steps.chosen(later), one.steps.scores(later), one.steps.peek(layer, later))
        ids, weights = one.steps.chosen(layer)
        (before, gates), scores, peeked = early[layer]
        assert same_bits(ids, before)
        assert same_bits(weights, gates)
        assert same_bits(one.steps.scores(layer), scores)
        assert same_bits(scores, peeked)
        assert (np.argsort(-peeked, 1, kind="stable")[:, :3] == ids).all()
        one.steps.routes(layer, ids, weights)
        needed = np.unique(ids).astype(np.int32)
        one.steps.experts(layer, needed, packed.addresses[layer][needed])
        one.steps.finish(layer)
    assert sorted(early) == list(range(LAYERS))


def test_what_is_not_routed_yet_is_not_given_out() -> None:
    one = forward(model("softmax", 1), kernels=every_isa()[0])
    for _ in range(2):  # what a step left is not taken for the next one's
        batch = rows(prompt(4))
        one.steps.begin(batch.tokens, batch.positions, batch.rows_of, batch.tables)
        one.steps.attention(0)
        assert one.steps.chosen(1)[0].shape == (4, 3)
        for ask in (one.steps.chosen, one.steps.scores):
            with pytest.raises(ValueError, match="not routed yet"):
                ask(2)
        one.steps.attention(1)
        one.steps.chosen(2)


@pytest.mark.parametrize("kind", ["native", "twin"])
def test_routers_cannot_read_before_the_first_layer(kind: str) -> None:
    packed = build(layers=2)
    first = packed.description.layers[0]
    wrong = dataclasses.replace(first, router=dataclasses.replace(first.router, ahead=1))
    with pytest.raises(ConfigError, match="layer 0: its router reads ahead=1"):
        dataclasses.replace(packed.description, layers=[wrong, packed.description.layers[1]])


# -- packed models --------------------------------------------------------------------------------------------------


def folders(folder: Path, *, bits: int = 32, dense: list[int] | None = None, **config: Any) -> tuple[Any, Folder]:
    """A converted mixture of five layers, and its packed form."""
    tiny_folder("qwen3_moe", folder / "parent", head_dim=16, num_hidden_layers=LAYERS, mlp_only_layers=dense or [])
    parent = load(folder / "parent", dtype="float32")
    surgery.apply(parent, make_plan("convert.pre_gated", parent, config))
    moestro.save(parent, folder / "model")
    pack_model(folder / "model", folder / "packed", bits=bits)
    return parent, Folder.open(folder / "packed")


IDS = np.random.default_rng(2).integers(3, VOCAB, 24).astype(np.int32)


def resident(packed: Folder, kind: str = "native", **more: Any) -> tuple[NativeForward, Any]:
    kept, slabs = load_all(packed)
    made = NativeForward(describe(packed, packed.resident()), pages=8, slabs=slabs, kernels=kernels_of(kind), threads=1)
    return made, kept


@pytest.mark.parametrize(
    ("config", "dense", "distances"),
    [
        ({"distance": 1}, [], [0, 1, 1, 1, 1]),
        ({"distance": 2}, [], [0, 0, 2, 2, 2]),
        ({"distance": 1}, [1, 2], [0, 0, 0, 3, 1]),
        ({"distance": 1, "from_layer": 2}, [], [0, 0, 0, 1, 1]),
        ({"distance": 0}, [], [0, 0, 0, 0, 0]),
    ],
)
def test_a_packed_model_is_its_transformers_modules(
    tmp_path: Path, config: dict[str, Any], dense: list[int], distances: list[int]
) -> None:
    modules, packed = folders(tmp_path, dense=dense, **config)
    assert packed.model.dialect == "native", packed.model.why
    assert [0 if layer.router is None else layer.router.ahead for layer in packed.model.layers] == distances
    with torch.no_grad():
        expected = modules(torch.tensor(IDS.astype(np.int64))[None]).logits[0].numpy()
        parent = load(tmp_path / "parent", dtype="float32")(torch.tensor(IDS.astype(np.int64))[None]).logits[0].numpy()
    for kind in ("native", "twin"):
        one, kept = resident(packed, kind)
        got = np.concatenate([one.step(rows(IDS[:15])), one.step(rows(IDS[15:16], 15)), one.step(rows(IDS[16:], 16))])
        del kept
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
        assert (np.abs(got - parent).max() > 1e-2) == any(distances)


def test_a_gate_no_native_router_is_run_by_its_modules(tmp_path: Path) -> None:
    tiny_folder("qwen3_moe", tmp_path / "parent", head_dim=16, mlp_only_layers=[])
    model = load(tmp_path / "parent", dtype="float32")
    swap(model, "train.pre_gated", {"num_experts": 5, "gate": {"method": "train.noisy_topk"}})
    moestro.save(model, tmp_path / "model")
    receipt = pack_model(tmp_path / "model", tmp_path / "packed", bits=8)
    assert receipt["dialect"] == "modules"
    assert "NoisyTopK" in receipt["why"]


def test_the_dialect_refuses_a_source_that_is_no_mixture(tmp_path: Path) -> None:
    _, packed = folders(tmp_path, dense=[1])
    values = packed.model.model_dump(mode="json")
    for wrong in (1, 3):
        values["layers"][2]["router"]["ahead"] = wrong
        with pytest.raises(ConfigError, match=f"layer 2: ahead={wrong}"):
            ModelSpec.parse(values)
    values["layers"][2]["router"]["ahead"] = 2
    assert ModelSpec.parse(values).layers[2].router.ahead == 2
