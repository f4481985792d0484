"""What the verdicts of the supernet study rest on: equal compute, blind routers, an exact start, fair goals."""

import math

import pytest
import torch

from moestro.core.registry import method
from moestro.core.session import session
from moestro.studies import mixture_of_supernets as study
from moestro.studies._framework import BUDGETS
from moestro.training.size import size_of


CI = study.scale(BUDGETS["ci"])
FULL = study.scale(BUDGETS["full"])


def test_six_of_eighteen_sizes_are_compared_the_largest_and_the_smallest_among_them() -> None:
    space = method(study.ID).module.Space(**study.space_of(FULL))
    assert len(space.archs) == 18
    found = study.measured_archs(FULL)
    assert len(set(found)) == 6
    assert (found[0], found[-1]) == (space.largest, space.smallest)
    assert {arch.hidden for arch in found} == {32, 64, 96}
    assert {arch.layers for arch in found} == {2, 3}


def test_an_equal_part_of_the_compute_adds_up_to_the_supernets() -> None:
    space = method(study.ID).module.Space(**study.space_of(FULL))
    flops = {arch: study.step_flops(FULL, arch) for arch in space.archs}
    spent = sum(study.shared_steps(FULL, arch) * flops[arch] for arch in space.archs)
    mean = sum(flops.values()) / 18
    sandwiches = FULL.steps * (flops[space.largest] + flops[space.smallest] + mean)
    assert spent == pytest.approx(sandwiches, rel=0.01)
    plain = study.supernet(FULL, study.SETUPS["plain"], 0, "ci")
    assert size_of(plain, FULL.length).train_flops == flops[space.largest]


def logits(model: torch.nn.Module, arch: object) -> torch.Tensor:
    with torch.no_grad(), session(arch=arch):
        return model.eval()(input_ids=torch.arange(12).view(1, 12)).logits


def test_blind_routers_stay_blind_in_training_and_seeing_ones_do_not() -> None:
    archs = study.measured_archs(CI)
    for arm, sees in (("blind", False), ("neuron", True)):
        setup = study.SETUPS[arm]
        model = study.supernet(CI, setup, 0, "ci")
        before = {name: tensor.clone() for name, tensor in model.named_parameters() if "routers" in name}
        study.train_supernet(model, study.settings(CI, setup), CI, 0, "ci", 2)
        moved = [name for name, tensor in model.named_parameters() if name in before and (tensor != before[name]).any()]
        assert any(name.endswith("last.weight") for name in moved), "a blind router learns as well"
        assert (study.spread(model, archs) > 0) is sees


def test_an_upcycled_supernet_starts_as_the_trained_network() -> None:
    largest = study.measured_archs(CI)[0]
    parent, _ = study.alone(largest, 0, "ci")
    expected = logits(parent, None)
    for arm in ("plain_upcycled", "neuron_upcycled"):
        model = study.supernet(CI, study.SETUPS[arm], 0, "ci")
        torch.testing.assert_close(logits(model, largest), expected, atol=1e-5, rtol=1e-5)


def test_arms_start_from_the_same_weights_and_differ_in_their_copies() -> None:
    smallest = study.measured_archs(CI)[-1]
    plain, equal, neuron = (
        logits(study.supernet(CI, study.SETUPS[arm], 3, "ci"), smallest) for arm in ("plain", "equal", "neuron")
    )
    torch.testing.assert_close(equal, plain, atol=1e-6, rtol=1e-5)
    assert (neuron - plain).abs().max() > 1e-4


def test_updates_after_the_collapse_are_counted_until_the_goal_or_the_end() -> None:
    model = study.supernet(CI, study.SETUPS["neuron"], 0, "ci")
    size = CI.model_copy(update={"steps": 20})
    arch = study.measured_archs(CI)[-1]
    before = logits(model, arch)
    counts = [study.later_updates(model, arch, goal, size, 0, "ci") for goal in (math.inf, -math.inf)]
    assert counts == [0, 4]
    assert torch.equal(logits(model, arch), before), "the supernet itself is not trained on"


def test_a_share_of_the_gap_is_of_a_gap_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = {"plain": 0.1, "neuron": 0.07, "layer": 0.12}
    arms = {arm: {"gap": gap, "loss_a": gap, "loss_b": 1.0} for arm, gap in gaps.items()}
    monkeypatch.setattr(study, "outcome", lambda arm, seed, name: arms[arm])
    found = {arm: study.run(arm, 0, BUDGETS["ci"]) for arm in gaps}
    assert {arm: round(one["closed"], 6) for arm, one in found.items()} == {"plain": 0, "neuron": 0.3, "layer": -0.2}
    assert [found[arm]["improved"] for arm in gaps] == [0, 1, 0]
    arms["plain"]["gap"], arms["neuron"]["gap"] = 0.001, -0.001
    assert study.run("neuron", 0, BUDGETS["ci"])["closed"] == pytest.approx(0.1), "nothing to close is not closed twice"
