"""Z-code M3, aggregation of experts: do two trained mixtures make a better start for a large one than none?

Two mixtures of four experts are trained on different rows (``_mixture.py``), their experts are put side by side under
one router, and the mixture of eight trains on. They start from one initialisation, or from two. Beside them stand
mixtures of eight from scratch, for as many further steps and for as many steps in all, one small mixture that simply
trains on, and one joined with itself, which has the places but no second model's experts.
"""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from moestro import surgery
from moestro.methods.planning import make_plan
from moestro.studies._framework import (
    Arm,
    Beats,
    Budget,
    Claim,
    Judgement,
    Measured,
    Study,
    Verdict,
    interval,
)
from moestro.studies._mixture import Mixture, corpus_of, fresh, loss_of, size_of, tune


FEW, MANY = 4, 8
OTHER_SEED = 500
POINTS = ("loss_1", "loss_2", "loss_3", "loss_4")
"""Held-out losses after each quarter of the further steps."""


def scale(budget: Budget) -> Mixture:
    """The small mixtures; ``steps`` is how long each is trained."""
    return size_of(budget, experts=FEW, **budget.pick(ci={}, micro={"steps": 40}, full={"steps": 240}))


def further(budget: Budget) -> int:
    """Steps after joining."""
    return budget.pick(ci=4, micro=16, full=160)


def fit(model: nn.Module, size: Mixture, seed: int, steps: int, first: int, points: tuple[int, ...]) -> list[float]:
    """Train in place from the data's step ``first`` on; the held-out losses after these numbers of steps."""
    data, found = corpus_of(size), []

    def look(done: int) -> None:
        if done in points:
            found.append(loss_of(model, data.heldout, size))

    tune(model, data.train, size, seed, steps, first=first, after=look)
    return found


@functools.lru_cache(maxsize=4)
def _part(size: Mixture, seed: int, which: str) -> nn.Module:
    model = fresh(size, seed + (OTHER_SEED if which == "stranger" else 0))
    fit(model, size, seed, size.steps, 0 if which == "first" else size.steps, ())
    return model.eval()


def part(size: Mixture, seed: int, which: str) -> nn.Module:
    """A small trained mixture: the ``first``, its ``sibling`` (same start, other rows) or a ``stranger`` (neither)."""
    return copy.deepcopy(_part(size, seed, which))


def joined(size: Mixture, seed: int, other: str, shared: str) -> nn.Module:
    """The first mixture with its own and the other one's experts."""
    model, donors = part(size, seed, "first"), {"donor1": part(size, seed, other)}
    plan = make_plan("convert.aggregate_experts", model, {"shared": shared}, donors=donors, seed=seed)
    surgery.apply(model, plan, donors=donors)
    return model


ARMS: Mapping[str, tuple[str, str]] = {
    "siblings": ("sibling", "auto"),
    "siblings_first": ("sibling", "first"),
    "strangers": ("stranger", "auto"),
    "itself": ("first", "first"),
}
"""Arm -> the other mixture, and what stands outside the experts."""


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Make the arm's mixture, train it on, and look at its held-out loss on the way."""
    size, more = scale(budget), further(budget)
    first, steps = 2 * size.steps, more
    if arm in ARMS:
        model = joined(size, seed, *ARMS[arm])
    elif arm == "small":
        model = part(size, seed, "first")
    else:
        model = fresh(size.model_copy(update={"experts": MANY}), seed)
        if arm == "scratch_long":
            first, steps = 0, 2 * size.steps + more
    before = loss_of(model, corpus_of(size).heldout, size)
    points = tuple(more * quarter // 4 for quarter in range(1, 5))
    found = fit(model, size, seed, steps, first, (*points, steps) if steps > more else points)
    return {"loss_before": before, **dict(zip(POINTS, found, strict=False)), "loss": found[-1]}


@dataclass(frozen=True, kw_only=True)
class BelowThroughout:
    """`method` is below `control` at every one of the points, in the mean over seeds, by the worst of them.

    Shown: at the point where the mean gap is worst its 95 % interval lies below zero. Partly: only the mean does.
    """

    method: str
    control: str
    points: tuple[str, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.method, self.control)

    @property
    def rule(self) -> str:
        return (
            f"{self.method} lower than {self.control} at each of {len(self.points)} points, 95 % interval of the worst"
        )

    def __call__(self, measured: Measured, metric: str) -> Judgement:
        gaps = [np.subtract(*measured.paired(self.method, self.control, point)) for point in self.points]
        worst = max(gaps, key=lambda gap: float(gap.mean()))
        mean, between = float(worst.mean()), interval(worst)
        shown = between is not None and between[1] < 0
        verdict: Verdict = "shown" if shown else "partly" if mean < 0 else "not_shown"
        return Judgement(verdict=verdict, measured=mean, interval=between, note=f"worst mean gap {mean:.4g}")


TELLS = (
    "loss before and after the further steps: siblings joined {siblings.loss_before} and {siblings.loss}, with the "
    "first one's attention {siblings_first.loss_before} and {siblings_first.loss}, strangers "
    "{strangers.loss_before} and {strangers.loss}, one with itself {itself.loss_before} and {itself.loss}, the small "
    "mixture alone {small.loss_before} and {small.loss}; from scratch {scratch_short.loss} for as many further steps "
    "and {scratch_long.loss} for as many in all."
)

STUDY = Study(
    paper="zcode-m3",
    part="aggregation",
    title="A large mixture from two trained ones",
    setting=(
        "Decoders of 3 layers and width 96, two mixtures of 4 experts of width 96 and 2 a token, each trained for 240 "
        "steps of 768 tokens of the standard library's source files, joined to one of 8 that trains on for 160 steps. "
        "The paper joins multilingual encoder-decoders of billions of parameters; what it keeps outside the experts "
        "and its figures could not be read, so none are quoted."
    ),
    claims=(
        Claim(
            key="better_start",
            text="Two joined mixtures are better than one of their size from scratch after as many further steps.",
            where="aggregation of experts",
            claimed="a given loss in fewer steps than from scratch",
            metric="loss",
            judge=Beats(method="siblings", control="scratch_short"),
            tells=TELLS,
        ),
        Claim(
            key="below_throughout",
            text="They stay below a mixture from scratch that is trained for long, step for step.",
            where="aggregation of experts, loss curves",
            claimed="the curve lies below",
            metric="loss_4",
            judge=BelowThroughout(method="siblings", control="scratch_long", points=POINTS),
            tells=TELLS,
        ),
        Claim(
            key="equal_tokens",
            text="They are as good as one from scratch on as many tokens in all, both parts' counted.",
            where="the refuting control",
            claimed="not compared as far as is known",
            metric="loss",
            judge=Beats(method="siblings", control="scratch_long"),
            tells=TELLS,
        ),
        Claim(
            key="more_than_one",
            text="They are better than one of them that trains on alone, at the same active compute.",
            where="the refuting control",
            claimed="not compared as far as is known",
            metric="loss",
            judge=Beats(method="siblings", control="small"),
            tells=TELLS,
        ),
        Claim(
            key="second_model",
            text="It is the second model's experts that help: one joined with itself has as many and gains less.",
            where="the refuting control",
            claimed="not compared as far as is known",
            metric="loss",
            judge=Beats(method="siblings", control="itself"),
            tells=TELLS,
        ),
        Claim(
            key="one_origin",
            text="Mixtures of one initialisation are better to join than independent ones.",
            where="the refuting control",
            claimed="not compared as far as is known",
            metric="loss",
            judge=Beats(method="siblings", control="strangers"),
            tells=TELLS,
        ),
    ),
    arms=(
        Arm(name="siblings", text="two of one initialisation, the mean outside the experts"),
        Arm(name="siblings_first", text="two of one initialisation, the first one's outside", role="reference"),
        Arm(name="strangers", text="two of independent initialisations, the first one's outside", role="control"),
        Arm(name="itself", text="one joined with itself: at first both choices are one expert", role="control"),
        Arm(name="small", text="one of 4 experts trains on alone", role="control"),
        Arm(name="scratch_short", text="8 experts from scratch, as many further steps", role="control"),
        Arm(name="scratch_long", text="8 experts from scratch, as many steps in all", role="control"),
    ),
    run=run,
    methods=("convert.aggregate_experts", "train.softmax_topk", "train.balance_loss"),
    units=dict.fromkeys(("loss", "loss_before", *POINTS), "nats a token"),
)
