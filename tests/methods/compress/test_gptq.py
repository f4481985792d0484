"""Batched GPTQ against the plain procedure that inverts anew for every column, and against rounding to the nearest."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moestro
from moestro import surgery
from moestro.core.errors import ConfigError, PlanError
from moestro.core.plan import BitPlan, MethodUse
from moestro.methods.compress._parts.gptq import batched_gptq
from moestro.ops.formats import Packing, dequantise, format_named, nearest
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_folder
from tests.surgery.helpers import ids, layers_of


FORMATS = ("int8", "int4", "int3", "uint4", "uint3", "uint2", "sign1")


def case(experts: int = 3, out: int = 10, width: int = 24, tokens: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and second moments of inputs that depend on each other."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, out, width, generator=draw)
    mix = torch.randn(experts, width, width, generator=draw)
    x = torch.randn(experts, tokens, width, generator=draw) @ mix
    return weight, x.transpose(1, 2) @ x


def values(codes: Tensor, params: dict[str, Tensor], used: Packing) -> Tensor:
    form = format_named(used.format)
    parts, final = form.pack(codes, params, used)
    return dequantise(parts, tuple(codes.shape[1:]), final)


def plain(weight: Tensor, gram: Tensor, used: Packing, percdamp: float) -> Tensor:
    """One matrix, float64: after each column the inverse of what is left is computed anew. Returns the values."""
    form = format_named(used.format)
    left = weight.double().clone()
    width = left.shape[1]
    hessian = gram.double() + percdamp * gram.double().diagonal().mean() * torch.eye(width, dtype=torch.float64)
    found = torch.empty_like(left)
    group = used.group or width
    for column in range(width):
        if column % group == 0:
            params = form.fit(left[:, column : column + group].float(), used)
        now = left[:, column : column + 1]
        found[:, column : column + 1] = form.values(form.round(now.float(), params), params)
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = (now - found[:, column : column + 1]) / inverse[0, 0]
        left[:, column + 1 :] -= error * inverse[0, 1:]
    return found.float()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("group", "blocksize"), [(None, 128), (None, 5), (6, 128), (6, 13), (8, 4), (10, 4), (12, 5)])
def test_blocks_change_nothing(name: str, group: int | None, blocksize: int) -> None:
    """Errors are made up for within a block and beyond it, at all widths, also where groups and blocks do not align."""
    weight, gram = case()
    used = Packing(name, group)
    codes, params, stats = batched_gptq(weight, gram, used, percdamp=0.05, blocksize=blocksize)
    found = values(codes, params, used)
    for expert in range(3):
        torch.testing.assert_close(found[expert], plain(weight[expert], gram[expert], used, 0.05), atol=1e-4, rtol=1e-4)
    assert stats.failed == stats.unseen == []


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group", [None, 8])
def test_without_dependence_it_is_rounding_to_the_nearest_bit_for_bit(name: str, group: int | None) -> None:
    weight, _ = case()
    used = Packing(name, group)
    codes, params, _ = batched_gptq(weight, torch.eye(24).expand(3, -1, -1) * 7, used, blocksize=5)
    expected, theirs = nearest(weight, used)
    assert torch.equal(codes, expected)
    assert all(torch.equal(params[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("name", ["uint2", "sign1", "int4"])
def test_it_moves_the_outputs_less_than_rounding_to_the_nearest(name: str) -> None:
    weight, gram = case(out=32)
    used = Packing(name, 8)
    codes, params, _ = batched_gptq(weight, gram, used)

    def moved(found: Tensor) -> Tensor:
        gap = weight - found
        return (gap @ gram @ gap.transpose(1, 2)).diagonal(dim1=1, dim2=2).sum(1)

    assert bool((moved(values(codes, params, used)) < 0.8 * moved(values(*nearest(weight, used), used))).all())


def test_many_at_once_are_each_alone() -> None:
    weight, gram = case(experts=5)
    used = Packing("uint3", 8)
    together = values(*batched_gptq(weight, gram, used)[:2], used)
    for expert in range(5):
        alone = values(*batched_gptq(weight[expert : expert + 1], gram[expert : expert + 1], used)[:2], used)
        torch.testing.assert_close(together[expert : expert + 1], alone, atol=1e-5, rtol=0)


def test_what_cannot_be_made_up_for() -> None:
    """No tokens, no factor, dead inputs: the matrix (or the input) is rounded to the nearest and listed."""
    weight, gram = case(experts=4)
    gram[1] = 0
    gram[2, :2, :2] = torch.tensor([[1.0, 50.0], [50.0, 1.0]])  # no second moment of anything
    gram[3, 5], gram[3, :, 5] = 0, 0
    used = Packing("uint3", 8)
    codes, params, stats = batched_gptq(weight, gram, used)
    expected, theirs = nearest(weight, used)
    assert (stats.unseen, stats.failed, stats.dead) == ([1], [2], [0, 24, 0, 1])
    for expert in (1, 2):
        assert torch.equal(codes[expert], expected[expert])
        assert torch.equal(params["scale"][expert], theirs["scale"][expert])
    form = format_named("uint3")
    mine = {key: value[3, :, :1] for key, value in params.items()}
    assert torch.equal(codes[3, :, 5:6], form.round(weight[3, :, 5:6], mine))  # its own weights, made up for nothing
    without = [i for i in range(24) if i != 5]
    assert not torch.equal(codes[3][:, without], expected[3][:, without])
    assert not torch.equal(codes[0], expected[0])


def test_a_dead_input_leaves_the_others_as_they_are() -> None:
    weight, gram = case(experts=1, width=9)
    gram[0, 8], gram[0, :, 8] = 0, 0
    used = Packing("int4", 8)
    codes, _, _ = batched_gptq(weight, gram, used)
    alone, _, _ = batched_gptq(weight[..., :8], gram[..., :8, :8], used)
    assert torch.equal(codes[..., :8], alone)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gram": torch.zeros(3, 5, 5)}, "3 matrices of 24 inputs with second moments"),
        ({"percdamp": 0.0}, "percdamp=0.0; must be above 0"),
        ({"nan": "weight"}, "weights are NaN or infinite"),
        ({"nan": "gram"}, "second moments are NaN or infinite"),
    ],
)
def test_bad_input(change: dict[str, Any], words: str) -> None:
    weight, gram = case()
    if "nan" in change:
        (weight if change["nan"] == "weight" else gram)[0, 0, 0] = float("nan")
    with pytest.raises(ConfigError, match=words):
        batched_gptq(weight, change.get("gram", gram), Packing("int4"), percdamp=change.get("percdamp", 0.01))


def plan_of(model: Any, **config: Any) -> BitPlan:
    keys = [
        f"{layer}/{expert}/{name}"
        for layer, there in OpenModel(model).shape.layers.items() if there.num_experts is not None
        for expert in range(there.num_experts) for name in there.projections
    ]  # fmt: skip
    rounding = MethodUse(method="compress.mc_moe", config=config)
    return BitPlan(
        method="test", bits=dict.fromkeys(keys, 2.0), formats=dict.fromkeys(keys, "uint2:g16"), rounding=rounding
    )


def test_layers_are_calibrated_on_what_packed_ones_return(tmp_path: Path) -> None:
    """In memory and block by block from disk; with the second layer's inputs coming from the first one's codes."""
    tiny_folder("qwen3_moe", tmp_path / "in")
    batches = [ids(4, 16, seed) for seed in range(3)]
    model = moestro.load(tmp_path / "in")
    plan = plan_of(model)
    with pytest.raises(PlanError, match="looks at data; give calib"):
        surgery.apply(model, plan)
    receipt = surgery.apply(model, plan, calib=batches)
    written = surgery.apply(tmp_path / "in", plan, tmp_path / "out", calib=batches)
    again = moestro.load(tmp_path / "out")
    assert written["layers"] == receipt["layers"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    from moestro.observe import statistics

    half = moestro.load(tmp_path / "in")
    bits = {key: value for key, value in plan.bits.items() if key.startswith("1/")}
    packs = dict.fromkeys(bits, "uint2:g16")
    surgery.apply(half, plan.model_copy(update={"bits": bits, "formats": packs, "wide": [2]}), calib=batches)
    with statistics(half.model.layers[2], gram=True, hidden_gram=True) as stats, torch.no_grad():
        for batch in batches:
            half(input_ids=batch)
    layer = stats["model.layers.2.mlp"]
    bank, packed = layers_of(half)[1].bank, layers_of(model)[1].bank
    for name, grams in (("up", layer.input_gram), ("down", layer.hidden_gram)):
        weight = torch.stack([bank.weight(expert, name) for expert in range(5)]).detach()
        gram = torch.stack([grams.of(expert) for expert in range(5)])
        used = Packing("uint2", 16)
        expected = values(*batched_gptq(weight, gram, used)[:2], used)
        found = torch.stack([packed.weight(expert, name) for expert in range(5)])
        assert (found - expected).abs().gt(1e-4).float().mean() < 0.01


def test_experts_without_tokens_are_listed(tmp_path: Path) -> None:
    tiny_folder("qwen3_moe", tmp_path / "in")
    model = moestro.load(tmp_path / "in")
    with torch.no_grad():
        for layer in layers_of(model):
            layer.router.weight[3] = 0
            layer.router.weight[4] = 0
    loads = [layer.bank.weight(3, "up").detach().clone() for layer in layers_of(model)]
    receipt = surgery.apply(model, plan_of(model), calib=[ids(1, 1)])
    starved = {entry["layer"]: entry["starved"] for entry in receipt["layers"]}
    assert all(len(each) == 3 for each in starved.values())  # one token, 2 of 5 experts
    assert receipt["warnings"][0].startswith("6 experts saw no calibration token and were rounded to the nearest: 1/")
    for layer, float_weight, number in zip(layers_of(model), loads, (1, 2), strict=True):
        if 3 in starved[number]:
            used = Packing("uint2", 16)
            expected = values(*nearest(float_weight[None], used), used)[0]
            assert torch.equal(layer.bank.weight(3, "up"), expected)
