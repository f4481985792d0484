"""UNCURL: what the router treats alike becomes one expert."""

import copy
from typing import Any

import pytest
import torch

from moestro import surgery
from moestro.methods.planning import make_plan
from tests.methods.compress.helpers import applied, batches, layers_of, planned, routings
from tests.surgery.helpers import logits, mixture


UNCURL = "compress.uncurl"


def with_twin(top_k: int = 2) -> Any:
    """A model of six experts whose last one is expert 1 with its inner units in another order, row and all."""
    model = mixture("llama", experts=6, top_k=top_k)
    for number, layer in enumerate(layers_of(model)):
        bank = layer.bank
        pi = torch.randperm(bank.inner, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            bank.gate_up_proj[5] = bank.gate_up_proj[1][torch.cat([pi, bank.inner + pi])]
            bank.down_proj[5] = bank.down_proj[1][:, pi]
            layer.router.weight[5] = layer.router.weight[1]
    return model


@pytest.mark.parametrize("grouping", ["spectral", "agglomerative"])
@pytest.mark.parametrize("align", ["weights", "activations"])
def test_a_twin_is_found_aligned_and_merged_away(grouping: str, align: str) -> None:
    model = with_twin()
    before = logits(model)
    plan = planned(UNCURL, model, keep=5, grouping=grouping, align=align, allow_starved=True)
    for entry in plan.layers:
        assert sorted([s.expert for s in sources] for sources in entry.experts if len(sources) > 1) in (
            [[1, 5]],
            [[5, 1]],
        )
    old = [layer.bank.weight(1, "down").clone() for layer in layers_of(model)]
    surgery.apply(model, plan)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    for entry, layer, down in zip(plan.layers, layers_of(model), old, strict=True):
        index = next(i for i, sources in enumerate(entry.experts) if len(sources) > 1)
        merged = layer.bank.weight(index, "down")
        gap = torch.cdist(merged.T, down.T, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max()
        assert gap <= 1e-5, "every unit of the merged expert is one of the twins'"


def test_without_alignment_the_twin_is_lost() -> None:
    model = with_twin()
    before = logits(model)
    applied(UNCURL, model, keep=5, align="none", weighting="equal", allow_starved=True)
    assert (logits(model) - before).abs().max() > 1e-3


def test_as_many_experts_as_before_change_no_bit() -> None:
    for keep in (6, 1.0):
        model = mixture("llama", experts=6)
        before = logits(model)
        receipt = applied(UNCURL, model, keep=keep, allow_starved=True)
        assert torch.equal(logits(model), before)
        assert receipt["notes"]["keeps"] == "as_routed"


def test_the_order_of_inner_units_never_matters() -> None:
    model, other = mixture("llama", experts=5), mixture("llama", experts=5)
    bank = layers_of(other)[0].bank
    pi = torch.randperm(bank.inner, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        bank.gate_up_proj[3] = bank.gate_up_proj[3][torch.cat([pi, bank.inner + pi])]
        bank.down_proj[3] = bank.down_proj[3][:, pi]
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-5)
    for subject in (model, other):
        applied(UNCURL, subject, keep=3, allow_starved=True)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-4)


def test_the_best_expert_leads_to_its_group() -> None:
    model = mixture("llama", experts=6, top_k=1, seed=1)
    before = routings(model, batches()[0])[0]
    plan = planned(UNCURL, model, keep=3, allow_starved=True)
    surgery.apply(model, plan)
    after = routings(model, batches()[0])[0]
    new_of = torch.empty(6, dtype=torch.int64)
    for index, sources in enumerate(plan.layers[0].experts):
        for source in sources:
            new_of[source.expert or 0] = index
    order = torch.argsort(after.token_N)
    assert torch.equal(after.expert_N[order], new_of[before.expert_TK[:, 0]])


def test_another_task_gives_another_small_model() -> None:
    model = mixture("llama", experts=6)
    tasks = [[torch.full((1, 40), 5) + torch.arange(40) % 3], [torch.full((1, 40), 60) + torch.arange(40) % 17]]
    plans = [make_plan(UNCURL, model, {"keep": 3, "allow_starved": True}, batches=task) for task in tasks]
    groups = [plan.notes["groups"] for plan in plans]
    assert groups[0] != groups[1]
    assert all(sum(len(members) for members in layer) == 6 and all(layer) for g in groups for layer in g.values())
    assert plans[0].notes["calibration"]["data"] != plans[1].notes["calibration"]["data"]


def test_sequential_statistics_are_those_behind_merged_layers() -> None:
    """Layer 1 is grouped by what it sees once layer 0 is merged; layer 0 and all weights are as before."""
    model = mixture("llama", experts=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    once = planned(UNCURL, model, keep=3, allow_starved=True)
    plan = planned(UNCURL, model, keep=3, sequential=True, allow_starved=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert plan.layers[0] == once.layers[0]
    assert plan.model_hash == once.model_hash
    # By hand: merge the first layer, measure anew, plan the second.
    behind = copy.deepcopy(model)
    first = once.model_copy(update={"layers": once.layers[:1]})
    surgery.apply(behind, first)
    by_hand = planned(UNCURL, behind, keep=3, layers=[1], allow_starved=True)
    assert plan.layers[1] == by_hand.layers[0]
    assert plan.layers[1] != once.layers[1], "what the second layer sees has changed"
    surgery.apply(model, plan)
    assert [layer.bank.num_experts for layer in layers_of(model)] == [3, 3]
