"""Mixture-of-Students: what a teacher adds to the loss, and that it is gone, and not even run, after its stage."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.core.errors import ConfigError
from moestro.core.forward import logits_of
from moestro.core.registry import method
from moestro.core.session import session
from moestro.methods.train.mixture_of_students import divergence
from moestro.testing.objective_contract import batch, pupil, teachers
from moestro.testing.training import TinyMixture, packed
from moestro.training.loop import Trainer
from moestro.training.objectives import Causal, MethodObjective
from moestro.training.recipe import Recipe


STUDENTS = method("train.mixture_of_students")


def objective(**config: Any) -> MethodObjective:
    return MethodObjective(Causal(), STUDENTS.entry("objective"), STUDENTS.configure(config))


def means(found: Any, targets: int) -> dict[str, float]:
    return {name: float(loss.total.detach()) / targets for name, loss in found.items()}


class Counting(nn.Module):
    """A teacher that counts its forwards."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, input_ids: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.inner(input_ids)
        return out


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_the_formula_written_out(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 7, generator=draw), torch.randn(5, 7, generator=draw) * 2
    total = 0.0
    for q_row, p_row in zip(student.tolist(), teacher.tolist(), strict=True):
        q = [2.718281828459045 ** (value / temperature) for value in q_row]
        p = [2.718281828459045 ** (value / temperature) for value in p_row]
        q, p = [value / sum(q) for value in q], [value / sum(p) for value in p]
        logs = torch.tensor(p).log() - torch.tensor(q).log()
        total += temperature**2 * sum(a * float(b) for a, b in zip(p, logs, strict=True))
    assert float(divergence(student, teacher, temperature)) == pytest.approx(total, rel=1e-5)
    assert float(divergence(student, teacher, 1.0)) != pytest.approx(float(divergence(teacher, student, 1.0)), rel=1e-2)
    assert float(divergence(teacher, teacher, temperature)) == pytest.approx(0.0, abs=1e-5)


def test_temperature_squared_keeps_the_gradient_of_soft_targets_in_scale() -> None:
    """For logits near each other the gradient tends to (q - p) / V whatever T is (Hinton et al., section 2.1)."""
    draw = torch.Generator().manual_seed(1)
    teacher = torch.randn(3, 6, generator=draw) * 1e-2
    grads = []
    for temperature in (1.0, 10.0):
        student = (torch.randn(3, 6, generator=torch.Generator().manual_seed(2)) * 1e-2).requires_grad_()
        divergence(student, teacher, temperature).backward()
        grads.append(student.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=2e-5, rtol=0.05)


def test_both_terms_are_means_over_targets_and_mask_alike() -> None:
    model, taught, given = pupil(), teachers(), batch()
    found = means(objective()(model, given, taught), Causal().targets(given))
    live = given["labels"][:, 1:] != -100
    model.requires_grad_(False)
    logits, wanted = logits_of(model, given)[:, :-1][live], given["labels"][:, 1:][live]
    p = logits_of(taught["teacher"], given)[:, :-1][live].softmax(-1)
    assert found["causal"] == pytest.approx(float(F.cross_entropy(logits, wanted)), rel=1e-5)
    kl = (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()
    assert found["distillation"] == pytest.approx(float(kl), rel=1e-5)


def test_beta_scales_the_teacher_and_comes_from_the_phase_first() -> None:
    model, taught, given = pupil(), teachers(), batch()
    model.requires_grad_(False)
    plain = float(objective()(model, given, taught)["distillation"].total)
    assert float(objective(weight=0.5)(model, given, taught)["distillation"].total) == pytest.approx(plain / 2)
    with session(values={"distillation": 0.25}):
        assert float(objective(weight=3.0)(model, given, taught)["distillation"].total) == pytest.approx(plain / 4)


def test_without_weight_the_gradient_is_plain_and_the_teacher_does_not_run() -> None:
    given, teacher = batch(), Counting(teachers()["teacher"])
    first, second = pupil(), pupil()
    with session(values={"distillation": 0.0}):
        torch.stack([t.total for t in objective()(first, given, {"t": teacher}).values()]).sum().backward()
    assert teacher.calls == 0
    Causal()(second, given, {})["causal"].total.backward()
    for mine, plain in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, atol=1e-6, rtol=1e-5)


def test_in_a_run_the_teacher_answers_until_its_stage_ends(tmp_path: Any) -> None:
    teacher = Counting(teachers()["teacher"])
    recipe = Recipe.parse(
        {
            "model": {"config": {"model_type": "llama"}},
            "data": {"source": "builtin:stdlib-docs", "sequence_length": 6},
            "steps": 5,
            "batch_size": 2,
            "phases": [
                {"name": "distil", "steps": 3, "values": {"distillation": 1.0}},
                {"name": "alone", "values": {"distillation": 0.0}},
            ],
        }
    )
    taught: dict[str, nn.Module] = {"teacher": teacher}
    Trainer(TinyMixture(seed=1), recipe, packed(), objective(), tmp_path / "run", teachers=taught).run(silent=True)
    assert teacher.calls == 3
    assert not teacher.training


@pytest.mark.parametrize(
    ("taught", "words"),
    [({}, "given: none"), ({"a": pupil(), "b": pupil()}, "given: a, b")],
)
def test_a_student_has_one_teacher(taught: dict[str, nn.Module], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        objective()(pupil(), batch(), taught)


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    teacher = nn.Sequential(nn.Embedding(13, 4), nn.Linear(4, 17))
    teacher.forward = lambda input_ids: nn.Sequential.forward(teacher, input_ids)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="the teacher has 17 logits and the student 13"):
        objective()(pupil(), batch(), {"teacher": teacher})


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"temperature": -1.0}, {"weight": -0.1}])
def test_impossible_settings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        STUDENTS.configure(values)


def test_a_negative_value_of_a_phase_is_refused() -> None:
    with session(values={"distillation": -1.0}), pytest.raises(ConfigError, match="distillation=-1"):
        objective()(pupil(), batch(), teachers())
