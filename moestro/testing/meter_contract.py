"""Checks of the entry `measure`: each measures a tiny mixture of several families."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.core.inputs import MeterInputs
from moestro.core.registry import Method
from moestro.core.report import Report
from moestro.core.trace import trace
from moestro.models.load import load
from moestro.testing.contracts import example_config
from moestro.testing.contracts import settings_round_trip as settings_round_trip
from moestro.testing.tiny import VOCAB, tiny_folder


FAMILIES = ("mixtral", "qwen3_moe")


def batches() -> list[dict[str, Tensor]]:
    """Two batches of token ids [2, 9]; the second has padding on the left."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCAB, (2, 9), generator=draw) for _ in range(2)]
    mask = torch.ones(2, 9, dtype=torch.int64)
    padded = mask.clone()
    padded[0, :4] = 0
    return [{"input_ids": ids[0], "attention_mask": mask}, {"input_ids": ids[1], "attention_mask": padded}]


def subjects(method: Method) -> Iterator[MeterInputs]:
    """A tiny model of several families with what the method's card asks for."""
    needs = method.card.needs
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            tiny_folder(family, Path(folder) / family)
            model = load(Path(folder) / family)
        recorded: Any = None
        if "trace" in needs:
            with torch.no_grad(), trace(model) as recorded:
                for batch in batches():
                    model(**batch)
        yield MeterInputs(
            name=family,
            model=model if "model" in needs else None,
            batches=batches() if "data" in needs else (),
            trace=recorded,
            seed=3,
        )


def measured(method: Method, subject: MeterInputs) -> Report:
    """The method's report with its example settings."""
    report: Report = method.entry("measure")(subject, example_config(method))
    return report


def report_round_trips(method: Method) -> None:
    """See the contract."""
    for subject in subjects(method):
        report = measured(method, subject)
        assert report.method == method.id, f"the report says it is by {report.method!r}"
        assert report.numbers or report.tables, "the report holds neither a number nor a table"
        with tempfile.TemporaryDirectory() as folder:
            assert Report.load(report.save(Path(folder) / "report.json")) == report


def report_is_repeatable(method: Method) -> None:
    """See the contract."""
    for subject in subjects(method):
        torch.manual_seed(1)
        first = measured(method, subject)
        torch.manual_seed(2)
        state = torch.random.get_rng_state()
        assert measured(method, subject) == first, "two measurements of one model differ"
        assert torch.equal(torch.random.get_rng_state(), state), "measuring drew from the global generator"


def model_is_left_alone(method: Method) -> None:
    """See the contract."""
    for subject in subjects(method):
        if subject.model is None:
            continue
        before, logits = _state(subject.model), _logits(subject.model)
        measured(method, subject)
        after = _state(subject.model)
        assert before.keys() == after.keys(), "measuring changed what the model holds"
        for name, value in before.items():
            same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
            assert same, f"measuring changed {name}"
        for mine, theirs in zip(logits, _logits(subject.model), strict=True):
            assert torch.equal(mine, theirs), "measuring changed the model's outputs"


def _state(model: Any) -> dict[str, Any]:
    """Tensors, modes and hooks by name."""
    found: dict[str, Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        found[f"mode and hooks of {name}"] = (module.training, hooks)
    for name, parameter in model.named_parameters():
        found[f"requires_grad of {name}"] = (parameter.requires_grad, parameter.grad is None)
    return found


def _logits(model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model(**batch).logits for batch in batches()]
