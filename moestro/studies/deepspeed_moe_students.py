"""DeepSpeed-MoE, Mixture-of-Students: does a shallower mixture learn more from a teacher that stops teaching in time?

A mixture of eight blocks is trained on the text and then teaches one of seven, which is also trained alone: for as many
tokens, and for as many operations as teacher forwards and its own steps come to. Distillation goes on to the end, or
stops after 0.7 of the run. Students of a seed share initial weights, order of data and teacher.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moestro.core.cost import Work, cost
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.studies._framework import Arm, Beats, Budget, Claim, NotWorse, Study
from moestro.studies._language import Scale, Text, heldout, llama, text, train
from moestro.training.objectives import Causal, MethodObjective


EXPERTS, AUX = 8, 0.01
STOP = 0.7
DEPTH = {"teacher": 8, "student": 7}
USE = method("train.mixture_of_students")


def scale(budget: Budget) -> Scale:
    """The teacher's size; a student has one block less."""
    return budget.pick(
        ci=Scale(layers=8, dim=16, inner=16, heads=2, vocabulary=259, length=24, batch=2, steps=3, heldout=4),
        micro=Scale(layers=8, dim=32, inner=32, heads=2, vocabulary=259, length=48, batch=8, steps=24, heldout=16),
        full=Scale(layers=8, dim=96, inner=96, heads=4, vocabulary=259, length=128, batch=12, steps=320, heldout=128),
    )


def corpus(size: Scale, budget: Budget) -> Text:
    """Bytes of the standard library's source files."""
    return text(size.vocabulary, size.length, size.heldout, limit=budget.pick(ci=4, micro=60, full=None))


def build(size: Scale, depth: int, seed: int) -> Any:
    """A model of ``depth`` blocks, every second one with 8 experts of which a token takes one, and random weights."""
    model = llama(size.model_copy(update={"layers": depth}), seed)
    use = method("train.moe")
    for number in range(1, depth, 2):
        block = model.model.layers[number]
        site = Site(path=f"model.layers.{number}.mlp", kind="mlp", module=block.mlp, dim=size.dim, layer=number)
        config = {
            "num_experts": EXPERTS, "expert_size": size.inner, "router": {"method": "train.switch"},
            "losses": {"balance": {"method": "train.balance_loss"}},
        }  # fmt: skip
        block.mlp = use.build(site, use.configure(config), Shared())
    return model


@functools.lru_cache(maxsize=1)
def teacher_of(size: Scale, seed: int, budget: Budget) -> nn.Module:
    """The trained teacher; trained once a process."""
    model: nn.Module = build(size, DEPTH["teacher"], seed)
    fit(model, {}, size, budget, seed, steps=size.steps, stop=0)
    return model.eval().requires_grad_(False)


def fit(
    model: nn.Module,
    teachers: Mapping[str, nn.Module],
    size: Scale,
    budget: Budget,
    seed: int,
    *,
    steps: int,
    stop: int,
) -> None:
    """Train in place with the objective of the method; the teacher is asked in the first ``stop`` steps."""
    objective = MethodObjective(Causal(), USE.entry("objective"), USE.configure({})) if teachers else None
    train(
        model,
        corpus(size, budget).train,
        size,
        seed,
        steps=steps,
        losses={"balance": AUX, "distillation": 1.0} if teachers else {"balance": AUX},
        objective=objective,
        teachers=teachers,
        values=lambda step: {USE.module.VALUE: 1.0 if step < stop else 0.0},
    )


def operations(model: Any, size: Scale) -> float:
    """Of one token's forward."""
    attention = {block.self_attn: lambda length: 4.0 * (length + 1) / 2 * size.dim for block in model.model.layers}
    return cost(model, Work(length=size.length, by_length=attention))


def steps_alone(size: Scale, seed: int) -> int:
    """Steps that cost a student alone what staged distillation costs: a step is three forwards, the teacher's one."""
    student, teacher = (operations(build(size, DEPTH[who], seed), size) for who in ("student", "teacher"))
    return round(size.steps * (1 + STOP * teacher / (3 * student)))


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train one arm, then measure its held-out loss."""
    size = scale(budget)
    data = corpus(size, budget)
    if arm == "teacher":
        model: Any = teacher_of(size, seed, budget)
    elif arm == "deep":
        model = build(size, DEPTH["teacher"], seed + 1000)
        fit(model, {}, size, budget, seed + 1000, steps=size.steps, stop=0)
    else:
        model = build(size, DEPTH["student"], seed + 1000)
        stop = {"staged": round(STOP * size.steps), "full": size.steps}.get(arm, 0)
        teachers = {"teacher": teacher_of(size, seed, budget)} if stop else {}
        steps = steps_alone(size, seed + 1000) if arm == "alone_longer" else size.steps
        fit(model, teachers, size, budget, seed + 1000, steps=steps, stop=stop)
    bank = [p.numel() for layer in mixture_layers(model).values() for p in layer.bank.parameters()]
    with torch.no_grad():
        loss = heldout(model, data.heldout, size)
    return {"heldout_loss": loss, "expert_parameters": float(sum(bank)), "operations": operations(model, size)}


TELLS = (
    "the teacher {teacher}, as deep a mixture trained as the students are {deep}; seven blocks alone {alone}, alone "
    "for the operations of staged distillation {alone_longer}, taught to the end {full}, taught for 0.7 of the run "
    "{staged}."
)

STUDY = Study(
    paper="deepspeed-moe",
    part="students",
    title="A mixture taught by a deeper one",
    setting=(
        "Byte-level Llama models of width 96 on the standard library's source files, 8 experts of width 96 in every "
        "second block, one a token; the teacher has 8 blocks, a student 7, both are trained for 320 steps of 1536 "
        "bytes. The paper's students have 21 of 24 blocks, learn from trained teachers of 350M and 1.3B parameters "
        "over hundreds of billions of tokens, and are compared on tasks."
    ),
    claims=(
        Claim(
            key="taught",
            text="A student that is taught for a part of its training is better than one that is not, at equal tokens.",
            where="section 4.2, staged distillation against none",
            claimed="LAMBADA 63.46 against 62.33, TriviaQA 13.69 against 8.81",
            metric="heldout_loss",
            judge=Beats(method="staged", control="alone"),
            tells=TELLS,
        ),
        Claim(
            key="staged",
            text="Teaching that stops after 0.7 of the run is better than teaching to its end.",
            where="section 4.2, staged against full distillation",
            claimed="LAMBADA 63.46 against 61.56; the loss curves cross late in training",
            metric="heldout_loss",
            judge=Beats(method="staged", control="full"),
            tells=TELLS,
        ),
        Claim(
            key="equal_operations",
            text="It is better too than a student that spends the teacher's operations on more steps of its own.",
            where="the refuting control",
            claimed="not compared in the paper",
            metric="heldout_loss",
            judge=Beats(method="staged", control="alone_longer"),
            tells=TELLS,
        ),
        Claim(
            key="teacher",
            text="It comes within 1 % of the teacher's loss.",
            where="section 4.2 (99.5 and 99.1 % of the teacher's scores)",
            claimed="average scores 42.87 of 43.08 and 47.96 of 48.37",
            metric="heldout_loss",
            judge=NotWorse(method="staged", control="teacher", tolerance=0.01, relative=True),
            tells=TELLS,
        ),
        Claim(
            key="depth",
            text="It is as good as a mixture of the teacher's depth that is trained alone for as many tokens.",
            where="the refuting control",
            claimed="not compared in the paper",
            metric="heldout_loss",
            judge=NotWorse(method="staged", control="deep", tolerance=0.01),
            tells=TELLS,
        ),
    ),
    arms=(
        Arm(name="teacher", text="8 blocks", role="control"),
        Arm(name="staged", text="7 blocks, taught for 0.7 of the run"),
        Arm(name="full", text="7 blocks, taught to the end", role="control"),
        Arm(name="alone", text="7 blocks, not taught", role="control"),
        Arm(name="alone_longer", text="7 blocks, not taught, steps for the operations of staged", role="control"),
        Arm(name="deep", text="8 blocks, not taught, another seed than the teacher's", role="control"),
    ),
    run=run,
    methods=("train.mixture_of_students", "train.moe", "train.switch", "train.balance_loss"),
    units={"heldout_loss": "nats a byte", "expert_parameters": "parameters", "operations": "operations a token"},
)
