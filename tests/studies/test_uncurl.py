"""The study of UNCURL: its rule, and what its arms share with that of Z-code M3's pruning."""

import numpy as np
import torch

from moestro.core.layer import mixture_layers
from moestro.data.dataset import Dataset
from moestro.studies._framework import BUDGETS, Measured
from moestro.studies._language import spread
from moestro.studies._mixture import corpus_of, rows_of, size_of, task_of, trained, trained_mixture, tune
from moestro.studies.uncurl import CUTS, STUDY, Grows, sizes
from moestro.studies.zcode_m3_pruning import STUDY as PRUNING


def judged(near: list[float], far: list[float]) -> str:
    values = {
        "whole": {"loss": dict.fromkeys(range(len(near)), 1.0)},
        "near": {"loss": dict(enumerate(near))},
        "far": {"loss": dict(enumerate(far))},
    }
    return Grows(near="near", far="far", whole="whole", times=2.0)(Measured(values), "loss").verdict


def test_a_threshold_is_a_gap_that_more_than_doubles() -> None:
    assert judged([1.01, 1.02, 1.015], [1.05, 1.07, 1.06]) == "shown"
    assert judged([1.01, 1.02, 1.015], [1.015, 1.03, 1.02]) == "not_shown"
    assert judged([1.0, 1.05, 1.0], [1.0, 1.05, 1.3]) == "partly"
    assert judged([0.9, 0.95, 0.92], [1.01, 1.02, 1.015]) == "shown", "a gap below zero counts as none"
    assert judged([0.9], [1.1]) == "partly", "one seed shows nothing fully"


def test_arms_of_both_studies_are_known_cuts() -> None:
    cut = {arm.name.rpartition("_")[0] for arm in STUDY.arms}
    assert cut - {"", "scratch"} == set(CUTS)
    assert {arm.name.rpartition("_")[2] for arm in PRUNING.arms} == {"whole", "small", "half", "quarter"}


def test_a_trained_mixture_is_made_once_and_handed_out_as_copies() -> None:
    budget = BUDGETS["ci"]
    model, heldout, calibration = trained_mixture(3, budget, experts=4)
    again, _, _ = trained_mixture(3, budget, experts=4)
    other, _, _ = trained_mixture(4, budget, experts=4)
    assert model is not again
    first, second, third = (torch.cat([p.flatten() for p in m.parameters()]) for m in (model, again, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert [layer.bank.num_experts for layer in mixture_layers(model).values()] == [4, 4]
    size = size_of(budget, experts=4)
    with torch.no_grad():
        assert torch.isfinite(model(**heldout[0]).logits).all()
    tune(model, corpus_of(size).train, size, 0, 1)
    moved = torch.cat([p.flatten() for p in model.parameters()])
    assert not torch.equal(moved, first)
    assert torch.equal(torch.cat([p.flatten() for p in trained(size, 3).parameters()]), first), "the copy moved alone"
    assert sum(len(batch["input_ids"]) for batch in heldout) == size.heldout
    assert sum(len(batch["input_ids"]) for batch in calibration) == size.heldout


def test_heldout_rows_come_from_all_over() -> None:
    every = Dataset({"data": [{"row": place} for place in range(127)]})
    (taken,) = spread(every, 64).sources.values()
    places = [taken[index]["row"] for index in range(len(taken))]
    assert (len(places), places[0], places[-1]) == (64, 0, 126)
    assert set(np.diff(places)) == {2}
    (all_of_them,) = spread(every, 500).sources.values()
    assert len(all_of_them) == 127


def test_calibration_rows_are_training_rows_and_follow_the_seed() -> None:
    size = sizes(BUDGETS["ci"], 4)
    task = task_of(size)
    (rows,) = task.train.sources.values()
    known = {tuple(int(i) for i in rows[place]["input_ids"]) for place in range(len(rows))}
    one, two = (rows_of(task.train, size, seed) for seed in (0, 1))
    for batch in one:
        assert {tuple(row) for row in batch["input_ids"].tolist()} <= known
    assert not np.array_equal(one[0]["input_ids"], two[0]["input_ids"])
