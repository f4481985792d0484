"""Aggregation of experts: what is joined, what it trains on, and a rule that looks at a whole curve."""

from typing import Any

import pytest
import torch

from moestro.core.layer import mixture_layers
from moestro.studies import zcode_m3_aggregation as study
from moestro.studies._framework import BUDGETS, Measured


CI = BUDGETS["ci"]
SIZE = study.scale(CI)


def experts(model: Any) -> torch.Tensor:
    return next(iter(mixture_layers(model).values())).bank.down_proj.detach()


def test_joined_mixtures_hold_the_experts_of_both() -> None:
    first, sibling, stranger = (study.part(SIZE, 0, which) for which in ("first", "sibling", "stranger"))
    for other, name in ((sibling, "sibling"), (stranger, "stranger")):
        model = study.joined(SIZE, 0, name, "auto")
        assert torch.equal(experts(model), torch.cat([experts(first), experts(other)]))
    assert not torch.equal(experts(sibling), experts(stranger))


def test_siblings_share_the_mean_and_strangers_the_first_ones_rest() -> None:
    first, sibling = (study.part(SIZE, 0, which).get_input_embeddings().weight for which in ("first", "sibling"))
    mean = study.joined(SIZE, 0, "sibling", "auto").get_input_embeddings().weight
    torch.testing.assert_close(mean, (first + sibling) / 2)
    assert torch.equal(study.joined(SIZE, 0, "stranger", "auto").get_input_embeddings().weight, first)


def test_further_steps_read_rows_that_no_part_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}

    def watch(model: Any, size: Any, seed: int, steps: int, first: int, points: tuple[int, ...]) -> list[float]:
        told[len(told)] = (first, steps)
        return [0.0] * len(points)

    study.part(SIZE, 0, "first"), study.part(SIZE, 0, "sibling")
    monkeypatch.setattr(study, "fit", watch)
    for arm in ("siblings", "small", "scratch_short", "scratch_long"):
        study.run(arm, 0, CI)
    both = 2 * SIZE.steps
    assert list(told.values()) == [(both, 4), (both, 4), (both, 4), (0, both + 4)]


def test_a_curve_must_lie_below_at_every_point() -> None:
    rule = study.BelowThroughout(method="a", control="b", points=("p", "q"))

    def judge(q: float) -> str:
        values = {
            "a": {"p": {0: 1.0, 1: 1.1, 2: 1.05}, "q": {0: q, 1: q + 0.1, 2: q + 0.05}},
            "b": {"p": {0: 2.0, 1: 2.1, 2: 2.04}, "q": {0: 1.0, 1: 1.1, 2: 1.04}},
        }
        return rule(Measured(values), "q").verdict

    assert judge(0.5) == "shown"
    assert judge(0.996) == "partly"
    assert judge(1.5) == "not_shown"
