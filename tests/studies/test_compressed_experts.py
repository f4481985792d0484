"""What the study of compressed experts measures: its arms differ in vectors alone, and its rule can refuse."""

import math

import numpy as np
import pytest
import torch

from moestro.core.layer import mixture_layers
from moestro.studies import compressed_experts as study
from moestro.studies._framework import BUDGETS, Measured
from moestro.studies._mixture import fresh, task_of
from moestro.studies.compressed_experts import ARMS, STUDY, Recovers, change, scale, times, touched


CI = scale(BUDGETS["ci"])
RULE = Recovers(method="a", cut="b", whole="c", share=0.25)


def judged(method: list[float], cut: list[float], whole: list[float]) -> str:
    values = {"a": method, "b": cut, "c": whole}
    return RULE(Measured({n: {"loss": dict(enumerate(v))} for n, v in values.items()}), "loss").verdict


def test_recovery_needs_a_loss_a_gain_and_certainty() -> None:
    cut, whole = [3.0, 3.1, 3.2], [2.0, 2.1, 2.2]
    assert judged([2.5, 2.6, 2.69], cut, whole) == "shown"
    assert judged([2.9, 3.0, 3.09], cut, whole) == "partly"  # a tenth
    assert judged([2.5, 3.6, 2.69], cut, whole) == "not_shown"  # one seed against it
    assert judged([2.0, 2.1, 2.2], cut, cut) == "not_shown"  # nothing was lost
    assert judged([2.0, 2.1, 2.2], cut, [3.4, 2.1, 2.9]) == "not_shown"  # nor surely lost
    assert judged([2.5], [3.0], [2.0]) == "partly"  # one seed shows nothing fully
    assert judged([2.9], [3.0], [2.0]) == "not_shown"


def test_noise_does_not_pass_the_rule() -> None:
    draw = np.random.default_rng(0)
    passed = sum(judged(*draw.normal(3.0, 0.01, (3, 3)).tolist()) != "not_shown" for _ in range(300))
    assert passed / 300 < 0.03


@pytest.mark.parametrize("arm", [arm.name for arm in STUDY.arms])
def test_arms_start_with_the_same_tensors_and_differ_as_they_say(arm: str) -> None:
    plain, model = fresh(CI, 0), change(fresh(CI, 0), arm, 3)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert (arm in ARMS) == (arm != "full")
    for layer in mixture_layers(model).values():
        if arm == "full":
            assert not hasattr(layer.bank, "deltas")
            continue
        assert layer.bank.deltas.requires_grad == (
            arm in {n for n, (_, v) in ARMS.items() if v in ("learned", "unrouted")}
        )
        assert bool(layer.bank.deltas.any()) == (arm == "frozen")
        assert layer.bank.n_main == {"one": 1, "three": 3}.get(arm.partition("_")[0], 2)
        assert layer.router.renormalise_main == ("renormalised" in arm)


def test_unrouted_vectors_are_the_same_for_every_token_and_learn() -> None:
    batch = next(iter(study.rows_of(task_of(CI).train, CI, 0)))
    models = {name: change(fresh(CI, 0), name, 0) for name in ("compressed", "unrouted")}
    for name, model in models.items():
        bank = next(iter(mixture_layers(model).values())).bank
        with torch.no_grad():
            bank.deltas.normal_(generator=torch.Generator().manual_seed(1))
        pair = torch.tensor([[0, 1], [2, 3], [4, 5]])
        theta = bank.theta(pair, torch.ones(3, 2))
        assert torch.equal(theta[0], theta[1]) == (name == "unrouted")
        wanted = 1 + (bank.deltas.mean(0) if name == "unrouted" else bank.deltas[pair].mean(1))
        torch.testing.assert_close(theta, wanted.expand(3, -1))
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert bank.deltas.grad is not None
        assert bank.deltas.grad.any()


@pytest.mark.parametrize(("arm", "count"), [("full", 4), ("half", 2), ("compressed", 2), ("one_compressed", 1)])
def test_touched_counts_experts_that_compute_and_the_vectors_beside_them(arm: str, count: int) -> None:
    model = change(fresh(CI, 0), arm, 0)
    layers = list(mixture_layers(model).values())
    if arm.endswith("compressed"):
        for layer in layers:
            torch.nn.init.normal_(layer.bank.deltas)
    found = touched(model, task_of(CI).heldout, CI)
    dim, inner = CI.dim, CI.inner
    vectors = (4 - count) * (2 * dim + inner) if arm.endswith("compressed") else 0
    assert found["experts_a_token"] == count
    assert found["expert_bytes_a_token"] == 4 * (count * 3 * dim * inner + vectors)
    assert count <= found["experts_a_row"] <= CI.experts


def test_times_are_positive_and_of_every_model() -> None:
    models = {name: change(fresh(CI, 0), name, 0).eval() for name in ("full", "half")}
    found = times(models, CI.vocabulary, 64, 2)
    assert found.keys() == models.keys()
    assert all(0 < seconds < math.inf for seconds in found.values())
