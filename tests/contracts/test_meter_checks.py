"""The checks of meters: an honest one passes all of them, each kind of broken one fails the one meant for it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moestro.core.card import MethodCard
from moestro.core.config import Config
from moestro.core.errors import ConfigError, DataError
from moestro.core.inputs import MeterInputs
from moestro.core.registry import Method
from moestro.core.report import Report, Table
from moestro.methods.inspect._contract import KEEPS
from moestro.testing import meter_contract


class Settings(Config):
    scale: float = 1.0


def honest(subject: MeterInputs, config: Any) -> Report:
    with torch.no_grad():
        total = sum(float(subject.model(**batch).logits.abs().sum()) for batch in subject.batches)
    return Report(method="inspect.fake", numbers={"total": total})


def steps_weights(subject: MeterInputs, config: Any) -> Report:
    with torch.no_grad():
        subject.model.get_input_embeddings().weight[5] += 1e-3
    return honest(subject, config)


def leaves_a_hook(subject: MeterInputs, config: Any) -> Report:
    subject.model.get_input_embeddings().register_forward_hook(lambda module, args, output: None)
    return honest(subject, config)


def leaves_training(subject: MeterInputs, config: Any) -> Report:
    report = honest(subject, config)
    subject.model.train()
    return report


def leaves_gradients(subject: MeterInputs, config: Any) -> Report:
    subject.model(**next(iter(subject.batches))).logits.sum().backward()
    return honest(subject, config)


def draws(subject: MeterInputs, config: Any) -> Report:
    return Report(method="inspect.fake", numbers={"total": float(torch.rand(()))})


def says_nothing(subject: MeterInputs, config: Any) -> Report:
    return Report(method="inspect.fake")


def signs_wrongly(subject: MeterInputs, config: Any) -> Report:
    return Report(method="inspect.other", numbers={"total": 1.0})


def as_method(measure: Callable[..., Report]) -> Method:
    card = MethodCard(title="t", year=2024, summary="s", taxonomy="losses/load", needs=("model", "data"))
    module: Any = SimpleNamespace(Config=Settings, CARD=card, measure=measure)
    return Method("inspect.fake", module)


@pytest.mark.parametrize("name", KEEPS["measure"])
def test_an_honest_meter_keeps_every_invariant(name: str) -> None:
    getattr(meter_contract, name)(as_method(honest))


@pytest.mark.parametrize(
    ("measure", "name", "words"),
    [
        (steps_weights, "model_is_left_alone", "changed .*embed_tokens"),
        (leaves_a_hook, "model_is_left_alone", "mode and hooks of .*embed_tokens"),
        (leaves_training, "model_is_left_alone", "mode and hooks"),
        (leaves_gradients, "model_is_left_alone", "requires_grad of"),
        (draws, "report_is_repeatable", "two measurements of one model differ"),
        (says_nothing, "report_round_trips", "neither a number nor a table"),
        (signs_wrongly, "report_round_trips", "by 'inspect.other'"),
    ],
)
def test_each_fault_is_found(measure: Callable[..., Report], name: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        getattr(meter_contract, name)(as_method(measure))


def test_a_report_refuses_what_is_no_measurement(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="loss is nan; leave out what could not be measured"):
        Report(method="inspect.fake", numbers={"loss": float("nan")})
    with pytest.raises(ConfigError, match="a row of 1 cells in a table of 2 columns"):
        Table(columns=["a", "b"], rows=[[1, 2], [3]])
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(DataError, match=r"report\.json: not a readable report"):
        Report.load(tmp_path / "report.json")
