"""Splits of dense feed-forwards: every partition is the parent when all slices are on."""

from typing import Any

import pytest
import torch
from torch import Tensor

import moestro
from moestro import surgery
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import PlanInputs
from moestro.core.registry import method
from moestro.methods.convert._parts.slices import gram_of_activations, gram_of_weights
from moestro.surgery.opened import OpenModel
from moestro.surgery.parity import AllOn
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import ids, layers_of, logits


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "cohere", "bert")
SPLIT = method("convert.split")


def coactivation(model: Any, seed: int = 0) -> dict[int, Tensor]:
    """Made-up statistics: a Gram matrix of random activations for each layer."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for layer, there in OpenModel(model).shape.layers.items():
        rows = torch.rand(200, there.inner, generator=draw)
        found[layer] = rows.T @ rows
    return found


def planned(model: Any, seed: int = 0, **config: Any) -> Any:
    inputs = PlanInputs(subject=OpenModel(model), statistics={"coactivation": coactivation(model)}, seed=seed)
    return SPLIT.plan(inputs, SPLIT.configure(config))


def split(model: Any, seed: int = 0, **config: Any) -> dict[str, Any]:
    return surgery.apply(model, planned(model, seed, **config), calib=[ids()])


@pytest.mark.parametrize("partition", ["contiguous", "random", "weights", "coactivation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_slices_on_are_the_parent(family: str, partition: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    receipt = split(model, num_experts=4, top_k=4, partition=partition)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)  # as routed: the router starts at zero
    assert receipt["parity"]["as_routed"]["max_abs_diff"] <= 1e-5
    assert receipt["parity"]["all_on"]["max_abs_diff"] <= 1e-5
    shapes = OpenModel(model).shape.layers
    assert {(s.num_experts, s.inner) for s in shapes.values()} == {(4, 12)}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_with_fewer_slices_all_on_still_tells_that_the_cut_is_exact(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    receipt = split(model, num_experts=6, top_k=2)
    assert receipt["parity"]["all_on"]["max_abs_diff"] <= 1e-5
    assert receipt["parity"]["as_routed"]["max_abs_diff"] > 1e-2
    assert not torch.equal(logits(model), before)
    assert layers_of(model)[0].router.weight.abs().sum() > 0


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_shared_slices_serve_every_token(family: str, shared: int) -> None:
    model = tiny_model(family)
    before = logits(model)
    split(model, num_experts=6, shared=shared, top_k=6 - shared)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    layer = layers_of(model)[0]
    assert (layer.bank.num_experts, layer.shared.bank.inner) == (6 - shared, 8 * shared)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_slices_that_weigh_one_each(family: str, shared: int) -> None:
    model = tiny_model(family)
    before = logits(model)
    receipt = split(model, num_experts=4, shared=shared, top_k=4 - shared, weights="one")
    with moestro.session(edits=[AllOn([layer.site for layer in layers_of(model)], 1.0)]):
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    assert receipt["parity"]["all_on"]["max_abs_diff"] <= 1e-5


@pytest.mark.parametrize(("weights", "shared"), [("sum_to_one", 0), ("sum_to_one", 2), ("one", 0), ("one", 2)])
def test_the_bias_is_added_once_whoever_is_chosen(weights: str, shared: int) -> None:
    model = tiny_model("bert")
    dense = OpenModel(model)
    bias = dense.tensor(0, None, "down_bias").clone()
    down = dense.tensor(0, None, "down").clone()
    split(model, num_experts=6, shared=shared, top_k=2, weights=weights, partition="contiguous")
    layer = layers_of(model)[0]
    token_weight = 0.5 if weights == "sum_to_one" else 1.0
    always = 0.0 if layer.shared is None else layer.shared.bank.down_proj_bias[0]
    for pair in ((0, 1), (2, 3)):
        total = token_weight * layer.bank.down_proj_bias[list(pair)].sum(0) + always
        torch.testing.assert_close(total, bias)
    factor = (6 - shared) if weights == "sum_to_one" else 1
    torch.testing.assert_close(layer.bank.weight(0, "down"), factor * down[:, 8 * shared : 8 * shared + 8])


@pytest.mark.parametrize("partition", ["random", "weights", "coactivation"])
def test_slices_are_the_dense_rows_each_once(partition: str) -> None:
    model = tiny_model("llama")
    plan = planned(model, num_experts=4, partition=partition)
    dense = OpenModel(tiny_model("llama"))
    for entry in plan.layers:
        rows = [sources[0].rows for sources in entry.experts]
        assert all(r == sorted(r) and len(r) == 12 for r in rows)
        assert sorted(unit for r in rows for unit in r) == list(range(48))
    surgery.apply(model, plan)
    layer = layers_of(model)[1]
    for expert, sources in enumerate(plan.layers[1].experts):
        assert torch.equal(layer.bank.weight(expert, "gate"), dense.tensor(1, None, "gate")[sources[0].rows])


def test_random_cuts_differ_by_seed_and_layer() -> None:
    cuts = [
        [sources[0].rows for sources in entry.experts]
        for seed in (0, 1)
        for entry in planned(tiny_model("llama"), seed).layers
    ]
    assert all(cuts[i] != cuts[j] for i in range(4) for j in range(i))


def test_units_that_fire_together_stay_together() -> None:
    model = tiny_model("llama")
    inner = 48
    member = torch.randperm(inner) % 4  # the planted groups
    rows = torch.nn.functional.one_hot(torch.arange(400) % 4, 4).float()[:, member]
    rows = rows * (1 + torch.rand(rows.shape)) + 0.01 * torch.rand(rows.shape)
    inputs = PlanInputs(subject=OpenModel(model), statistics={"coactivation": {0: rows.T @ rows, 1: rows.T @ rows}})
    plan = SPLIT.plan(inputs, SPLIT.configure({"num_experts": 4, "partition": "coactivation"}))
    for entry in plan.layers:
        groups = [{int(member[unit]) for unit in sources[0].rows} for sources in entry.experts]
        assert all(len(group) == 1 for group in groups)
        assert len(set.union(*groups)) == 4


def test_units_with_like_rows_stay_together() -> None:
    model = tiny_model("llama")
    member = torch.randperm(48) % 4
    with torch.no_grad():
        for block in model.model.layers:
            for matrix in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight):
                matrix.copy_(torch.randn(4, 32)[member] + 0.05 * torch.randn(48, 32))
    for entry in planned(model, num_experts=4, partition="weights").layers:
        assert all(len({int(member[unit]) for unit in sources[0].rows}) == 1 for sources in entry.experts)


def test_gram_matrices_by_hand() -> None:
    gate, up = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 1.0], [1.0, 0.0]])
    assert gram_of_weights(gate, up).tolist() == [[11.0, 3.0], [3.0, 5.0]]
    assert gram_of_weights(None, up).tolist() == [[10.0, 3.0], [3.0, 1.0]]
    counts = torch.tensor([[4.0, 3.0, 0.0], [3.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    assert gram_of_activations(counts).tolist() == [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_plan_that_read_weights_belongs_to_its_model() -> None:
    first, second = tiny_model("llama"), tiny_model("llama", seed=1)
    plan = planned(first, num_experts=4, partition="weights")
    with pytest.raises(PlanError, match="make a new plan"):
        surgery.apply(second, plan)
    assert planned(first, num_experts=4).model_hash is None


def test_a_width_that_is_not_divided_is_refused_with_numbers() -> None:
    with pytest.raises(
        PlanError, match=r"layer 0: 48 inner units cannot be cut into 5 equal slices; num_experts may be"
    ):
        planned(tiny_model("llama"), num_experts=5)


def test_missing_statistics_are_named() -> None:
    model = tiny_model("llama")
    config = SPLIT.configure({"partition": "coactivation"})
    assert SPLIT.module.statistics(config) == ("coactivation",)
    assert SPLIT.module.statistics(SPLIT.configure()) == ()
    with pytest.raises(PlanError, match="'coactivation' was not measured"):
        SPLIT.plan(PlanInputs(subject=OpenModel(model)), config)
    with pytest.raises(PlanError, match="misses layer 1; it has 0"):
        SPLIT.plan(PlanInputs(subject=OpenModel(model), statistics={"coactivation": {0: torch.eye(48)}}), config)
    with pytest.raises(PlanError, match="co-activation of 3 units, the layer has 48"):
        SPLIT.plan(PlanInputs(subject=OpenModel(model), statistics={"coactivation": {0: torch.eye(3)}}), config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts": 4, "top_k": 5}, "top_k=5, but num_experts=4 less shared=0 leaves 4"),
        ({"num_experts": 4, "shared": 3}, "leaves 1"),
        ({"partition": "kmeans"}, "partition='kmeans'"),
    ],
)
def test_settings_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SPLIT.configure(config)
