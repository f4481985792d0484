"""The checks of compressions: a sound planner passes them, each kind of broken one fails the check meant for it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from moestro.core.card import MethodCard
from moestro.core.config import Config
from moestro.core.inputs import PlanInputs
from moestro.core.plan import BitPlan, ExpertPlan, ExpertSource, LayerExperts
from moestro.core.registry import Method
from moestro.surgery.choice import choose
from moestro.testing import planner_contract


class Settings(Config):
    """No settings."""


def planner(sources: Callable[[int, int], list[list[ExpertSource]]]) -> Method:
    """A method that makes each mixture of ``sources(layer, number of experts)`` and measures what it ignores."""

    def plan(inputs: PlanInputs, config: Settings) -> ExpertPlan:
        layers = [
            LayerExperts(layer=there.layer, experts=sources(there.layer, there.num_experts or 0))
            for there in choose(inputs.shape, "all", dense=False)
        ]
        return ExpertPlan(method="compress.stub", layers=layers, notes={"keeps": "nothing"})

    card = MethodCard(title="Stub", year=2025, summary="A stub.", taxonomy="inference", needs=("model",))
    module: Any = SimpleNamespace(
        Config=Settings, CARD=card, plan=plan, statistics=lambda config: {"experts": {"allow_starved": True}}
    )
    return Method("compress.stub", module)


def some(layer: int, count: int) -> list[list[ExpertSource]]:
    return [[ExpertSource(layer=layer, expert=expert)] for expert in range(count - 1)]


def every(layer: int, count: int) -> list[list[ExpertSource]]:
    return [[ExpertSource(layer=layer, expert=expert)] for expert in range(count)]


def broken(layer: int, count: int) -> list[list[ExpertSource]]:
    return [[ExpertSource(layer=layer, expert=expert, noise=1e38)] for expert in range(count - 1)]


@pytest.mark.parametrize("name", ["calibration_is_noted", "experts_shrink", "choices_exist"])
def test_a_sound_planner_passes(name: str) -> None:
    getattr(planner_contract, name)(planner(some))


def test_a_compression_that_leaves_all_experts_is_found() -> None:
    with pytest.raises(AssertionError, match="experts take"):
        planner_contract.experts_shrink(planner(every))


def test_answers_that_are_not_finite_are_found() -> None:
    with pytest.raises(AssertionError):
        planner_contract.choices_exist(planner(broken))


def test_a_plan_is_cut_to_one_layer_whatever_its_kind() -> None:
    bits = BitPlan(method="compress.stub", bits={"1/0/up": 2.0, "1/1/up": 3.0, "10/0/up": 4.0})
    assert planner_contract.layers_of(bits) == [1, 10]
    one = bits.model_copy(update={"bits": {"1/0/up": 2.0, "1/1/up": 3.0}, "wide": [10]})
    assert planner_contract.part_of(bits, 1) == one
    experts = ExpertPlan(method="compress.stub", layers=[LayerExperts(layer=n, experts=some(n, 3)) for n in (4, 2)])
    assert planner_contract.layers_of(experts) == [2, 4]
    assert planner_contract.layers_of(planner_contract.part_of(experts, 4)) == [4]
