"""Planners by id: what they ask for is measured, what they lack is named."""

from typing import Any

import pytest
import torch

from moestro.core.errors import ConfigError, PlanError, RegistryError
from moestro.core.plan import ExpertPlan
from moestro.methods.planning import make_plan
from moestro.observe.neurons import coactivation
from moestro.testing.tiny import tiny_model


def batch() -> torch.Tensor:
    return torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))


def test_statistics_are_measured_when_asked_for() -> None:
    model = tiny_model("llama")
    config = {"num_experts": 4, "partition": "coactivation"}
    plan = make_plan("convert.split", model, config, batches=[batch()], seed=5)
    given = {"coactivation": coactivation(model, [batch()])}
    assert isinstance(plan, ExpertPlan)
    assert plan == make_plan("convert.split", model, config, statistics=given, seed=5)
    assert plan.seed == 5
    assert plan.config["partition"] == "coactivation"


@pytest.mark.parametrize(
    ("method_id", "config", "error", "message"),
    [
        (
            "convert.split",
            {"partition": "coactivation"},
            PlanError,
            "measures coactivation on data .* give calibration",
        ),
        ("convert.split", {"num_expert": 4}, ConfigError, "did you mean 'num_experts'"),
        ("convert.splitt", {}, RegistryError, "did you mean convert.split"),
        ("train.switch", {}, RegistryError, "has no entry 'plan'"),
        ("convert.upcycle", {"layers": [3]}, PlanError, "no feed-forward site in layer 3"),
    ],
)
def test_what_is_wrong_is_said(method_id: str, config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_plan(method_id, tiny_model("llama"), config)
