"""Planners by id: what they ask for is measured, what they lack is named."""

from typing import Any

import pytest
import torch

from moestro.core.errors import ConfigError, PlanError, RegistryError
from moestro.core.plan import ExpertPlan
from moestro.methods.planning import make_plan
from moestro.observe import calibrate
from moestro.observe.neurons import coactivation
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import mixture


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


def test_what_a_plan_rests_on_stands_in_its_notes() -> None:
    model = mixture("llama", experts=4)
    config = {"criterion": "frequency", "keep": 3, "policy": "raised", "raise_to": 3}
    plan = make_plan("compress.prune_experts", model, config, batches=[batch()])
    given = calibrate(model, [batch()], policy="raised", raise_to=3)
    assert plan.notes["calibration"] == given.note()
    assert plan == make_plan("compress.prune_experts", model, config, statistics={"experts": given})
    assert sum(plan.notes["calibration"]["layers"][0]["tokens"]) == 3 * 12
    with pytest.raises(PlanError, match="reap needs the lengths of expert outputs; calibrate with outputs=true"):
        make_plan("compress.prune_experts", model, {**config, "criterion": "reap"}, statistics={"experts": given})


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
