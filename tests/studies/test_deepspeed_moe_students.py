"""Mixture-of-Students: arms differ in what they are told and nothing else."""

from typing import Any

import pytest
import torch

from moestro.core.layer import mixture_layers
from moestro.studies import deepspeed_moe_students as study
from moestro.studies._framework import BUDGETS


CI = BUDGETS["ci"]
SIZE = study.scale(CI)


def test_a_student_lacks_one_block_and_the_mixture_that_would_stand_there() -> None:
    teacher, student = (study.build(SIZE, study.DEPTH[who], 0) for who in ("teacher", "student"))
    assert (len(teacher.model.layers), len(student.model.layers)) == (8, 7)
    assert [len(mixture_layers(model)) for model in (teacher, student)] == [4, 3]
    assert study.operations(student, SIZE) < study.operations(teacher, SIZE) < 8 / 7 * study.operations(student, SIZE)


def test_every_student_starts_alike_and_one_teacher_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[torch.Tensor] = []
    taught: list[Any] = []
    told: list[tuple[int, int]] = []
    study.teacher_of(SIZE, 0, CI)

    def watch(model: Any, teachers: Any, *rest: Any, steps: int, stop: int) -> None:
        begun.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        taught.extend(teachers.values())
        told.append((steps, stop))

    monkeypatch.setattr(study, "fit", watch)
    for arm in ("staged", "full", "alone", "alone_longer"):
        study.run(arm, 0, CI)
    assert all(torch.equal(weights, begun[0]) for weights in begun)
    assert taught[0] is taught[1] is study.teacher_of(SIZE, 0, CI)
    assert len(taught) == 2
    assert told == [(3, 2), (3, 3), (3, 0), (study.steps_alone(SIZE, 1000), 0)]


def test_the_teacher_is_asked_while_its_stage_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = study.teacher_of(SIZE, 0, CI)
    calls = []
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    model = study.build(SIZE, 7, 1)
    study.fit(model, {"teacher": teacher}, SIZE, CI, 1, steps=5, stop=3)
    handle.remove()
    assert len(calls) == 3


def test_steps_alone_cost_what_the_teacher_and_the_student_cost() -> None:
    student, teacher = (study.operations(study.build(SIZE, depth, 0), SIZE) for depth in (7, 8))
    steps = 1000
    longer = study.steps_alone(SIZE.model_copy(update={"steps": steps}), 0)
    assert longer * 3 * student == pytest.approx(steps * 3 * student + 0.7 * steps * teacher, rel=1e-3)
