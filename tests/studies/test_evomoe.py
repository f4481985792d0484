"""The study of EvoMoE: its arms are equal in training operations, so those are counted by hand."""

from typing import Any

import pytest

from moestro.core.layer import mixture_layers
from moestro.core.session import session
from moestro.studies import evomoe as study
from moestro.studies._framework import BUDGETS
from moestro.studies._language import batches, llama, text
from moestro.training.objectives import Causal
from moestro.training.optimizer import make_optimizer
from moestro.training.recipe import OptimizerConfig
from moestro.training.step import Stepper


SIZE = study.scale(BUDGETS["ci"])
TOKENS = SIZE.batch * SIZE.length
ROW = 2 * 3 * SIZE.dim * SIZE.inner  # gate, up and down, two operations a weight


def spent(arm: str, **values: float) -> tuple[int, int]:
    """(operations of a training step, mixture layers) of an arm; no arm for the dense model of the first phase."""
    model = llama(SIZE, 0, watch=False)
    if arm:
        study.spawn(model, study.SETUPS[arm], 0)
    data = text(SIZE.vocabulary, SIZE.length, SIZE.heldout, limit=6)
    stepper: Any = Stepper(model, Causal(), make_optimizer(model, OptimizerConfig(lr=1e-6)))
    edit = study.SETUPS[arm].edit if arm else None
    losses = {"balance": 0.01} if arm else {}
    with session(edits=[edit] if edit else []):
        report = stepper.run(0, [batches(data.train, SIZE, 0)(0)], weights={"causal": 1.0, **losses}, values=values)
    assert report.tokens == TOKENS
    return study.step_flops(model, report, SIZE.length), len(mixture_layers(model))


def test_every_expert_that_runs_is_paid_for() -> None:
    """Forward and backward are three forwards; a router of 8 experts costs 2 * 8 * D operations a token."""
    dense, _ = spent("")
    one, layers = spent("switch")
    assert layers == 1
    assert one - dense == 3 * TOKENS * 2 * study.EXPERTS * SIZE.dim
    for arm, experts, values in (
        ("evomoe", 8, {"dts_stage": 1.0, "dts_progress": 0.0}),
        ("evomoe", 1, {"dts_stage": 2.0, "dts_progress": 1.0}),
        ("quiet", 8, {"dts_stage": 1.0, "dts_progress": 0.0}),
        ("anneal", 5, {"experts": 5.0}),
        ("top2", 2, {}),
    ):
        extra = spent(arm, **values)[0] - one
        assert extra == pytest.approx(3 * TOKENS * (experts - 1) * ROW, rel=0.01), arm  # soft: one or two may be off


def test_the_budget_is_that_of_top_1_steps() -> None:
    assert study.budget_flops(SIZE) == SIZE.steps * spent("switch")[0]


def test_the_schedule_ends_where_the_hard_stage_begins() -> None:
    run = study.Run(llama(SIZE, 0), study.SETUPS["evomoe"], None, SIZE, 0, 100)  # type: ignore[arg-type]
    assert run.values(0.15) == {"dts_stage": 1.0, "dts_progress": 0.0}
    assert run.values(0.375)["dts_progress"] == pytest.approx(0.5)
    assert run.values(0.6) == {"dts_stage": 2.0, "dts_progress": 1.0}
    anneal = study.Run(llama(SIZE, 0), study.SETUPS["anneal"], None, SIZE, 0, 100)  # type: ignore[arg-type]
    assert [anneal.values(done)["experts"] for done in (0.0, 0.3, 0.599, 0.9)] == [8.0, 4.0, 1.0, 1.0]
