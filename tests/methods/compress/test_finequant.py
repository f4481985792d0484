"""FineQuant: the choice of groups on matrices whose answer is known, scales by hand, plans from weights alone."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moestro
from moestro import surgery
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import PlanInputs
from moestro.core.plan import BitPlan
from moestro.core.registry import method
from moestro.methods.compress.finequant import Scaled, choose_group_size, group_range, normal_range
from moestro.ops.formats import Packing, dequantise, format_named, nearest
from moestro.surgery.disk import Folder
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_folder
from tests.surgery.helpers import layers_of


USE = method("compress.finequant")


def normal(seed: int = 0, out: int = 64, width: int = 1024) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, used: Packing, rule: str = "symmetric") -> Tensor:
    codes, params = Scaled(rule)(weight[None], used, None)
    parts, final = format_named(used.format).pack(codes, params, used)
    return (weight - dequantise(parts, tuple(weight.shape), final)[0]).abs()


def test_the_range_of_normal_draws() -> None:
    """Against a simulation, and the closed form for one draw, sqrt(2 / pi)."""
    assert normal_range(1) == pytest.approx((2 / torch.pi) ** 0.5, rel=1e-6)
    draws = torch.randn(4000, 256, generator=torch.Generator().manual_seed(1)).abs()
    for group in (64, 256):
        assert normal_range(group) == pytest.approx(float(draws[:, :group].amax(1).mean()), rel=0.01)
    assert group_range(torch.tensor([[1.0, -3, 2, 0.5, 4]]), 2) == 2 * (3 + 2 + 4) / 3


@pytest.mark.parametrize("rule", ["scan", "halving"])
def test_normal_matrices_keep_whole_rows(rule: Any) -> None:
    sizes = [choose_group_size(normal(seed), rule=rule).size for seed in range(100)]
    assert sizes.count(None) >= 95


@pytest.mark.parametrize("rule", ["scan", "halving"])
@pytest.mark.parametrize("place", [0, 500, 1023])
def test_one_outlying_input_asks_for_the_smallest_group(rule: Any, place: int) -> None:
    weight = normal()
    weight[:, place] *= 50
    choice = choose_group_size(weight, rule=rule)
    assert choice.size == 64
    assert [size for size, _ in choice.trace] == [1024, 512, 256, 128, 64]
    assert all(fine < coarse for (_, coarse), (_, fine) in pairwise(choice.trace))


def test_a_short_last_group_is_no_gain() -> None:
    """Its range is small because it is short."""
    sizes = [choose_group_size(normal(seed, width=96), sizes=(90, 64)).size for seed in range(20)]
    assert sizes == [None] * 20


def test_an_outlying_output_asks_for_nothing() -> None:
    weight = normal()
    weight[3] *= 50
    assert choose_group_size(weight).size is None


def test_several_equal_outliers_are_found_by_the_scan_and_missed_by_halving() -> None:
    """Every half still holds one, so the first halving shows no gain."""
    scanned, halved = [], []
    for seed in range(10):
        weight = normal(seed)
        places = torch.randperm(1024, generator=torch.Generator().manual_seed(seed))[:8]
        weight[:, places] = 50 * torch.where(
            torch.rand(64, 8, generator=torch.Generator().manual_seed(9)) < 0.5, -1.0, 1.0
        )
        scanned.append(choose_group_size(weight).size)
        halved.append(choose_group_size(weight, rule="halving").size)
    assert all(size is not None and size <= 128 for size in scanned)
    assert halved.count(None) >= 8


def test_a_cumulative_walk_goes_on_where_the_gain_slows() -> None:
    """Half the inputs are twice as large: one halving tells them apart, further ones gain what normal draws gain."""
    weight = normal()
    weight[:, 512:] *= 8
    step = choose_group_size(weight, rule="halving")
    total = choose_group_size(weight, rule="halving", compare="cumulative")
    assert step.size == 512
    assert total.size == 64


def test_finer_groups_err_less() -> None:
    weight = normal()
    weight[:, ::100] *= 5
    worst, mean = [], []
    for group in (None, 512, 256, 128, 64):
        used = Packing("int4", group)
        gap = error(weight, used)
        _, params = nearest(weight, used)
        step = params["scale"].repeat_interleave(1024 // params["scale"].shape[-1], -1)
        assert bool((gap <= step / 2 * (1 + 1e-5)).all())
        worst.append(float(params["scale"].max()) / 2)
        mean.append(float(gap.square().mean()))
    assert worst == sorted(worst, reverse=True)
    assert all(fine <= 1.01 * coarse for coarse, fine in pairwise(mean))


@pytest.mark.parametrize(("rule", "steps"), [("symmetric", 7.0), ("ft", 8.0), ("kim", 7.5)])
def test_scales_by_hand(rule: str, steps: float) -> None:
    weight = torch.tensor([[-2.0, 0.3, 4.0, 1.0], [0.0, 0, 0, 0]])
    codes, params = Scaled(rule)(weight[None], Packing("int4"), None)
    assert params["scale"][0].flatten().tolist() == pytest.approx([4.0 / steps, 1.0])
    assert codes[0, 1].tolist() == [8] * 4
    top = int(codes[0, 0, 2]) - 8
    assert top == 7
    clipped = 4.0 - 7 * 4.0 / steps
    assert float(error(weight, Packing("int4"), rule)[0, 2]) == pytest.approx(clipped, abs=1e-6)


def planned(subject: OpenModel, **config: Any) -> BitPlan:
    found: BitPlan = USE.plan(PlanInputs(subject=subject), USE.configure(config))
    return found


def outlying(tmp_path: Path) -> Any:
    """A tiny mixture, one projection of one expert of which has an outlying input."""
    tiny_folder("olmoe", tmp_path / "in")
    model = moestro.load(tmp_path / "in")
    with torch.no_grad():
        layers_of(model)[1].bank.weight(4, "down")[:, 7] *= 50
    moestro.save(model, tmp_path / "float")
    return model


def test_every_matrix_has_its_own_group(tmp_path: Path) -> None:
    """On disk as in memory; the table and the descents are in the notes; nothing is measured on data."""
    model = outlying(tmp_path)
    plan = planned(OpenModel(model), sizes=(24, 12, 8), margin=0.1)
    folder = Folder(tmp_path / "float")
    assert planned(OpenModel(folder.model, "x", folder.read), sizes=(24, 12, 8), margin=0.1) == plan
    assert plan.formats["1/4/down"] == "int4:g8:f32"
    assert sum(word == "int4:row:f32" for word in plan.formats.values()) >= 30
    assert [size for size, _ in plan.notes["ranges"]["1/4/down"]] == [48, 24, 12, 8]
    assert any(line.startswith("layer 1 down: 1 x int4:g8:f32") for line in plan.notes["lines"])
    receipt = surgery.apply(tmp_path / "float", plan, tmp_path / "out")
    surgery.apply(model, plan)
    again = moestro.load(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert f"experts: {receipt['bytes']['experts']['after']:,} bytes" in plan.notes["lines"][-1]


@pytest.mark.parametrize("scale", ["symmetric", "ft", "kim"])
def test_the_plan_is_rounded_by_its_own_scales(scale: str, tmp_path: Path) -> None:
    tiny_folder("olmoe", tmp_path / "in")
    model = moestro.load(tmp_path / "in")
    weight = layers_of(model)[0].bank.weight(2, "up").detach().clone()
    surgery.apply(model, planned(OpenModel(model), scale=scale, group_size=16))
    gap = (layers_of(model)[0].bank.weight(2, "up") - weight).abs()
    torch.testing.assert_close(gap, error(weight, Packing("int4", 16), scale))


def test_a_stack_is_each_matrix_alone() -> None:
    stack = torch.stack([normal(seed, 8, 64) for seed in range(3)])
    codes, params = Scaled("symmetric")(stack, Packing("int4", 16), None)
    for index, weight in enumerate(stack):
        alone, theirs = nearest(weight, Packing("int4", 16))
        assert torch.equal(codes[index], alone)
        assert torch.equal(params["scale"][index], theirs["scale"])


def test_a_group_as_wide_as_a_row_is_a_row() -> None:
    weight = normal(0, 4, 32)
    assert torch.equal(nearest(weight, Packing("int4", 32))[1]["scale"], nearest(weight, Packing("int4"))[1]["scale"])


def test_bad_wishes_are_refused(tmp_path: Path) -> None:
    tiny_folder("olmoe", tmp_path / "in")
    subject = OpenModel(moestro.load(tmp_path / "in"))
    with pytest.raises(PlanError, match="group_size=64 is wider than rows of 32 inputs"):
        planned(subject, group_size=64)
    for values, words in (
        ({"bits": 5}, "bits"),
        ({"sizes": [64, 128]}, "must fall"),
        ({"group_size": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            USE.configure(values)
    with pytest.raises(ConfigError, match="are no floats"):
        choose_group_size(torch.ones(2, 8, dtype=torch.int8))
    surgery.apply(subject.model, planned(subject))
    with pytest.raises(PlanError, match="packed ones are not packed again"):
        planned(OpenModel(subject.model))
