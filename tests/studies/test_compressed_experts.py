"""What the study of compressed experts measures: its arms differ in vectors alone, and its rule can refuse."""

import math

import pytest
import torch

from moestro.core.layer import mixture_layers
from moestro.studies import compressed_experts as study
from moestro.studies._framework import BUDGETS
from moestro.studies._mixture import fresh, task_of
from moestro.studies.compressed_experts import ARMS, STUDY, change, scale, times, touched


CI = scale(BUDGETS["ci"])


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
