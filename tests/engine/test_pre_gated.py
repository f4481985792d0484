"""Routers that read an earlier layer's input: dialect, packing, kernels, and experts read because they are known."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moestro
from moestro import surgery
from moestro.core.errors import ConfigError
from moestro.core.registry import method
from moestro.engine.describe import describe
from moestro.engine.dialect import ModelSpec
from moestro.engine.kernels import choose
from moestro.engine.native_forward import NativeForward
from moestro.engine.pack import pack_model
from moestro.engine.packed import Packed as Folder
from moestro.engine.slabs import load_all
from moestro.engine.store import ExpertStore
from moestro.methods.planning import make_plan
from moestro.models.load import load
from moestro.models.swap import swap
from moestro.testing.tiny import VOCAB, tiny_folder
from tests.engine.models import Packed, build
from tests.engine.slab_files import Disk, policy
from tests.engine.test_forward import close, forward, prompt, rows
from tests.engine.test_forward_store import kernels_of, on_disk, session
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
    plain = forward(build(layers=LAYERS, **KINDS[kind]), kernels=every_isa()[0]).step(rows(tokens))
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


# -- reading ahead ---------------------------------------------------------------------------------------------------


def told() -> Any:
    return method("serve.pre_gated").entry("forecast")(method("serve.pre_gated").configure({}))


def test_wishes_by_hand() -> None:
    (wish,) = told().settled(3, np.array([[4, 1], [1, 0], [-1, 4]], np.int32))
    assert (wish.layer, wish.experts, wish.priority) == (3, (1, 4, 0), 1)
    assert told().settled(3, np.full((2, 2), -1, np.int32)) == []
    assert told().routed(0, np.zeros((1, 1), np.int32), lambda later: np.zeros((1, 4), np.float32)) == []


@pytest.mark.parametrize("distance", [1, 2])
@pytest.mark.parametrize("kind", ["native", "twin"])
def test_all_that_is_read_ahead_is_needed_and_only_the_first_mixtures_wait(
    kind: str, distance: int, tmp_path: Path
) -> None:
    """Room for the experts of d + 1 layers and no more: nothing is left from an earlier token but by chance."""
    packed = ahead(build(layout="q4", layers=3, top_k=2), distance)
    folder, tokens = on_disk(packed, tmp_path), prompt(20)
    expected = session_of_tokens(forward(packed, kernels=kernels_of(kind)), tokens)
    stride = folder.experts[0].stride
    with ExpertStore(folder, (distance + 1) * 2 * stride, policy("lru"), readers=1) as store:
        one = forward(packed, kernels=kernels_of(kind), store=store, forecast=told())
        needed: list[tuple[int, set[int]]] = []
        one.on_route = lambda layer, ids, weights: needed.append((layer, set(ids.ravel().tolist())))
        assert same_bits(session_of_tokens(one, tokens), expected)
        seen = dataclasses.asdict(store.counters)
    assert seen["wasted"] == 0
    assert seen["cancelled"] == 0 or seen["joined"] > 0  # dropped requests were needed before a thread came to them
    own = sum(len(experts) for layer, experts in needed if layer < distance)
    demanded = seen["misses"] - seen["joined"]
    assert seen["prefetched"] + demanded == seen["bytes"] // stride
    assert seen["hits"] + seen["misses"] == sum(len(experts) for _, experts in needed)
    assert seen["prefetched"] > 0.5 * (seen["hits"] + seen["misses"] - own)


def session_of_tokens(one: Any, tokens: np.ndarray) -> np.ndarray:
    return np.concatenate([one.step(rows(tokens[i : i + 1], i)) for i in range(len(tokens))])


def test_with_time_to_read_only_the_first_mixture_is_waited_for(tmp_path: Path) -> None:
    """When every read ahead is over before it is needed, later mixtures find all their experts."""
    packed = ahead(build(layout="q4", layers=4, top_k=2), 1)
    folder, tokens = on_disk(packed, tmp_path), prompt(12)
    stride = folder.experts[0].stride
    with ExpertStore(folder, 4 * stride, policy("lru"), readers=1, read=Disk()) as store:
        one = forward(packed, kernels=kernels_of("twin"), store=store, forecast=told())
        misses: dict[int, int] = dict.fromkeys(range(4), 0)
        last = [0]

        def routed(layer: int, ids: Any, weights: Any) -> None:
            while store._reads.of(None) or store._running:  # the time that other layers take
                time.sleep(0.001)
            misses[(layer - 1) % 4] += store.counters.misses - last[0]
            last[0] = store.counters.misses

        one.on_route = routed
        session_of_tokens(one, tokens)
    assert misses[0] > 0
    assert [misses[layer] for layer in (1, 2, 3)] == [0, 0, 0]


def test_requests_that_override_their_routing_get_their_own_experts(tmp_path: Path) -> None:
    """What was decided ahead is wrong for such rows; they wait, and get the same bits as without a store."""
    packed = model("softmax", 1)
    folder, tokens = on_disk(packed, tmp_path), prompt(10)

    def other(layer: int, scores: Any, ids: Any, weights: Any) -> Any:
        return (ids + 1) % 8, weights

    asked = rows(tokens, routes=np.arange(10, dtype=np.int32) % 2)
    plain = forward(packed, kernels=every_isa()[0])
    plain.overrides.append(other)
    with ExpertStore(folder, 9 * folder.experts[0].stride, policy("lru")) as store:
        one = forward(packed, kernels=every_isa()[0], store=store, forecast=told())
        one.overrides.append(other)
        assert same_bits(one.step(asked), plain.step(asked))


def test_a_prompt_in_chunks_then_tokens_keeps_its_bits(tmp_path: Path) -> None:
    packed = model("chosen", 2)
    folder, tokens = on_disk(packed, tmp_path), prompt(36)
    expected = session(forward(packed, kernels=every_isa()[0]), tokens)
    for slots in (3, 9, 20):
        with ExpertStore(folder, slots * folder.experts[0].stride, policy("lru")) as store:
            one = forward(packed, kernels=every_isa()[0], store=store, forecast=told(), threads=2)
            assert same_bits(session(one, tokens), expected), f"{slots} slots"
