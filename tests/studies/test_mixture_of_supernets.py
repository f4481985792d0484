"""What the verdicts of the supernet study rest on: equal compute, blind routers, an exact start, fair goals."""

import pytest
import torch

from moestro.core.registry import method
from moestro.core.session import session
from moestro.studies import mixture_of_supernets as study
from moestro.studies._framework import BUDGETS
from moestro.studies._language import heldout, llama, updates_until
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
    easy, never = (study.retraining(model, {arch: goal}, size, 0, "ci") for goal in (100.0, 0.0))
    assert (easy["extra_updates"], easy["reached"]) == (0, 1)
    assert (never["extra_updates"], never["reached"]) == (4, 0)
    assert 0 < never["gap_later"] < easy["gap_later"] + 100, "the updates helped"
    assert torch.equal(logits(model, arch), before), "the supernet itself is not trained on"


def test_updates_stop_at_the_first_look_that_finds_the_goal_reached() -> None:
    size, data = CI.model_copy(update={"lr": 1e-2}), study.data_of(CI, "ci")
    start = llama(size, 0, watch=False)
    first = heldout(start, data.heldout, size)
    done, loss = updates_until(start, first - 1e-6, data, size, 0, first=0, most=10)
    assert (done, loss < first) == (3, True), "ten updates in four parts of three at most"
    done, loss = updates_until(start, 0.0, data, size, 0, first=0, most=10)
    assert done == 10
    assert loss == heldout(start, data.heldout, size)


def test_a_share_is_of_a_gap_that_counts_and_a_win_is_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = {"plain": 0.1, "neuron": 0.07, "layer": 0.12, "plain_upcycled": 0.2, "neuron_upcycled": 0.15}
    arms = {arm: {"gap": gap, "loss_a": gap, "loss_b": 1.0, "loss_c": 1 - gap / 1000} for arm, gap in gaps.items()}
    monkeypatch.setattr(study, "outcome", lambda arm, seed, name: arms[arm])
    found = {arm: study.run(arm, 0, BUDGETS["ci"]) for arm in gaps}
    closed = {"plain": 0, "neuron": 0.3, "layer": -0.2, "plain_upcycled": 0, "neuron_upcycled": 0.25}
    assert {arm: round(one["closed"], 6) for arm, one in found.items()} == closed
    assert [found[arm]["improved"] for arm in gaps] == [0, 1, 0, 0, 1]
    arms["plain"]["gap"], arms["neuron"]["gap"] = 0.019, -0.5
    assert study.run("neuron", 0, BUDGETS["ci"])["closed"] == 0, "no gap that counts: nothing to close"


def test_the_hypernetwork_starts_as_the_plain_supernet_with_the_weights_of_a_second_copy() -> None:
    archs = study.measured_archs(CI)
    plain, model = (study.supernet(CI, study.SETUPS[arm], 0, "ci") for arm in ("plain", "hypernetwork"))
    for arch in (archs[0], archs[-1]):
        assert torch.equal(logits(model, arch), logits(plain, arch))
    for size in (CI, FULL):
        one, more = (
            sum(p.numel() for p in study.supernet(size, study.SETUPS[arm], 0, "ci").parameters())
            for arm in ("plain", "hypernetwork")
        )
        assert more - one == pytest.approx(3 * size.layers * size.dim * size.inner, rel=0.15)
    setup = study.SETUPS["hypernetwork"]
    study.train_supernet(model, study.settings(CI, setup), CI, 0, "ci", 4)
    for name, parameter in model.named_parameters():
        assert ".left." not in name or parameter.abs().max() > 0, f"{name} did not learn"
    assert study.spread(model, archs) == 0, "a hypernetwork has no shares"


def test_a_correction_is_of_the_architecture_and_of_its_rank() -> None:
    model = study.supernet(CI, study.SETUPS["hypernetwork"], 0, "ci")
    space = method(study.ID).module.Space(**study.space_of(CI))
    ffn = model.model.layers[0].mlp
    with torch.no_grad():
        for name, parameter in ffn.named_parameters():
            if ".base." not in name:
                parameter.normal_()
        deltas = {}
        for arch in (space.largest, space.smallest):
            found = ffn.dense(arch)["up_proj.weight"] - ffn.parts["up_proj"].base.weight[0, : arch.inner, : arch.hidden]
            part, code = ffn.parts["up_proj"], ffn.routers["inner"](ffn.space.module.encode(arch), arch.inner)
            left = (part.left.weight @ code + part.left.bias).view(part.out, part.rank)
            right = (part.right.weight @ code + part.right.bias).view(part.rank, part.inner)
            expected = torch.einsum("or,ri->oi", left[: arch.inner], right[:, : arch.hidden])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            deltas[arch] = found[: space.smallest.inner, : space.smallest.hidden]
        assert torch.linalg.matrix_rank(ffn.dense(space.largest)["up_proj.weight"] - part.base.weight[0]) <= part.rank
    assert (deltas[space.largest] - deltas[space.smallest]).abs().max() > 1e-2, "it does not read the architecture"


def test_mixed_arms_start_with_mixtures_as_large_as_the_plain_weights() -> None:
    size = {}
    for arm in ("plain", "neuron", "layer", "blind", "equal", "unscaled"):
        model = study.supernet(FULL, study.SETUPS[arm], 0, "ci")
        arch = method(study.ID).module.Space(**study.space_of(FULL)).largest
        with torch.no_grad():
            size[arm] = float(model.model.layers[0].mlp.dense(arch)["up_proj.weight"].std())
    for arm in ("neuron", "layer", "blind", "equal"):
        assert size[arm] == pytest.approx(size["plain"], rel=0.05), arm
    assert size["unscaled"] == pytest.approx(size["plain"] / 2**0.5, rel=0.05)


def test_arms_draw_the_same_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    module, drawn = method(study.ID).module, []
    draw = module.sandwich
    monkeypatch.setattr(module, "sandwich", lambda space, pop: drawn.append(draw(space, pop)) or drawn[-1])
    for arm in ("plain", "neuron", "hypernetwork"):
        model = study.supernet(CI, study.SETUPS[arm], 0, "ci")
        study.train_supernet(model, study.settings(CI, study.SETUPS[arm]), CI, 0, "ci", 3)
    assert len(drawn) == 9
    assert drawn[:3] == drawn[3:6] == drawn[6:]


def test_losses_of_a_supernet_are_those_of_its_plain_models() -> None:
    model = study.supernet(CI, study.SETUPS["neuron"], 0, "ci")
    archs = study.measured_archs(CI)
    found = study.losses_of(model, archs, CI, "ci")
    for arch in archs:
        plain = method(study.ID).module.collapse(model, arch)
        assert found[arch] == pytest.approx(heldout(plain, study.data_of(CI, "ci").heldout, CI), abs=1e-5)
    assert len(set(found.values())) == len(archs)


def test_arms_get_their_steps_and_gaps_are_against_the_networks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[list[int], int]] = []

    def trained(model: torch.nn.Module, config: dict, size: object, seed: int, name: str, steps: int) -> float:
        ran.append((config["space"]["layers"], steps))
        return 1.0

    monkeypatch.setattr(study, "scale", lambda budget: CI.model_copy(update={"steps": 20}))
    monkeypatch.setattr(study, "train_supernet", trained)
    monkeypatch.setattr(
        study, "losses_of", lambda model, archs, size, name: {arch: 3.0 + arch.layers for arch in archs}
    )
    monkeypatch.setattr(study, "alone", lambda arch, seed, name, steps=None: (None, 2.5 + arch.hidden / 100))
    outcome = study.outcome.__wrapped__
    found = {arm: outcome(arm, 0, "ci") for arm in ("layer", "plain_longer", "separate")}
    assert ran == [([1, 2], 20), ([1, 2], 26), ([1], 10), ([2], 10)]
    gaps = [0.5 + arch.layers - arch.hidden / 100 for arch in study.measured_archs(CI)]
    for one in found.values():
        assert one["gap"] == pytest.approx(sum(gaps) / 6)
        assert (one["gap_largest"], one["gap_smallest"]) == pytest.approx((gaps[0], gaps[-1]))
