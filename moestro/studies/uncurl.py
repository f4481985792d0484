"""UNCURL: a large mixture cut down for a task against a small one from scratch, and how far one can cut.

Mixtures of 16 and of 4 experts with the same active compute are trained inside the job on source files and
documentation of the standard library in turns (``_mixture.py``). The task is documentation: each arm is cut down (or
not) on its statistics, then fine-tuned on it with the same steps, rate, rows and seed. Source files tell what a cut
costs off the task.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from moestro import surgery
from moestro.core.layer import mixture_layers
from moestro.data.dataset import Dataset
from moestro.methods.planning import make_plan
from moestro.observe.calibrate import Calibration, calibrate
from moestro.studies._framework import (
    Arm,
    Beats,
    Budget,
    Claim,
    Judgement,
    Measured,
    NotWorse,
    Study,
    Verdict,
    interval,
)
from moestro.studies._language import loads
from moestro.studies._mixture import Mixture, corpus_of, loss_of, rows_of, size_of, task_of, trained, tune


LARGE, SMALL = 16, 4
TUNE_LR = 0.3


@dataclass(frozen=True, kw_only=True)
class Grows:
    """The gap to ``whole`` at ``far`` is more than ``times`` the gap at ``near`` (0 where ``near`` is better).

    Shown: the mean of far gap - times * near gap is above zero, with its whole 95 % interval. Partly: only the mean.
    """

    near: str
    far: str
    whole: str
    times: float

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.near, self.far, self.whole)

    @property
    def rule(self) -> str:
        return f"{self.far} further from {self.whole} than {self.times:g} times {self.near}, 95 % interval above zero"

    def __call__(self, measured: Measured, metric: str) -> Judgement:
        near, whole = measured.paired(self.near, self.whole, metric)
        far, _ = measured.paired(self.far, self.whole, metric)
        effect = (far - whole) - self.times * np.maximum(near - whole, 0.0)
        mean, between = float(effect.mean()), interval(effect)
        if mean > 0 and between is not None and between[0] > 0:
            verdict: Verdict = "shown"
        else:
            verdict = "partly" if mean > 0 else "not_shown"
        note = (
            f"mean gaps {float((near - whole).mean()):.4g} and {float((far - whole).mean()):.4g} over {far.size} seeds"
        )
        return Judgement(verdict=verdict, measured=mean, interval=between, note=note)


# Arm -> (method, settings beside `keep`); the number at the end of an arm's name is what is kept.
CUTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "uncurl": ("compress.uncurl", {}),
    "unaligned": ("compress.uncurl", {"align": "none"}),
    "random": ("compress.merge_experts", {"grouping": "random"}),
    "dominant": ("compress.merge_experts", {"grouping": "dominant"}),
    "frequency": ("compress.prune_experts", {"criterion": "frequency"}),
    "dropped": ("compress.prune_experts", {"criterion": "random"}),
    "reap": ("compress.prune_experts", {"criterion": "reap"}),
}


def sizes(budget: Budget, experts: int) -> Mixture:
    """The mixture with so many experts, two of them a token."""
    steps = budget.pick(ci={}, micro={"steps": 50}, full={})
    return size_of(budget, experts=experts, **steps)


def tuning(budget: Budget) -> int:
    """Steps of fine-tuning on the task."""
    return budget.pick(ci=1, micro=10, full=80)


def similarity(measured: Calibration) -> float:
    """Mean cosine of two experts' outputs on the same tokens: near 1, merging would be free."""
    found = []
    for stats in measured.values():
        assert stats.output_gram_EE is not None
        length_E = stats.output_gram_EE.diagonal().clamp(min=1e-30).sqrt()
        cosine_EE = stats.output_gram_EE / length_E[:, None] / length_E
        experts = len(length_E)
        found.append(float(cosine_EE.sum() - cosine_EE.diagonal().sum()) / (experts * (experts - 1)))
    return float(np.mean(found))


def measures(model: nn.Module, task: Dataset, other: Dataset, size: Mixture) -> dict[str, float]:
    """Losses on and off the task, bytes of all experts, and distinct experts that held-out rows use in a layer."""
    layers = list(mixture_layers(model).values())
    used = [
        int((counts_C > 0).sum()) for counts_C in loads(model, task, size.model_copy(update={"heldout": 1})).values()
    ]
    return {
        "task_loss": loss_of(model, task, size),
        "off_task_loss": loss_of(model, other, size),
        "expert_bytes": float(sum(layer.bank.nbytes(e) for layer in layers for e in range(layer.bank.num_experts))),
        "experts_used": float(np.mean(used)),
    }


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Cut down one way, fine-tune, measure on and off the task."""
    size = sizes(budget, SMALL if arm == "scratch_4" else LARGE)
    model = trained(size, seed, mixed=True)
    task, other = task_of(size), corpus_of(size)
    found: dict[str, float] = {}
    name, _, kept = arm.rpartition("_")
    found["task_tokens"] = float(tuning(budget) * size.batch * size.length)
    if name in CUTS:
        method, settings = CUTS[name]
        rows = rows_of(task.train, size, seed, limit=size.heldout)
        measured = calibrate(model, rows, outputs=True, output_gram=name == "uncurl", allow_starved=True)
        found["task_tokens"] += measured.stats.num_tokens
        if name == "uncurl":
            found["output_cosine"] = similarity(measured)
        config = {"keep": int(kept), **settings}
        surgery.apply(model, make_plan(method, model, config, statistics={"experts": measured}, seed=seed))
    found["task_loss_before"] = loss_of(model, task.heldout, size)
    tune(model, task.train, size, seed + 1, tuning(budget), lr=TUNE_LR, first=size.steps)
    return {**found, **measures(model, task.heldout, other.heldout, size)}


TELLS = (
    "task loss after fine-tuning (before): all 16 {whole} ({whole.task_loss_before}); 8 by UNCURL {uncurl_8} "
    "({uncurl_8.task_loss_before}), by frequency {frequency_8} ({frequency_8.task_loss_before}); 4 by UNCURL "
    "{uncurl_4} ({uncurl_4.task_loss_before}), from scratch {scratch_4} ({scratch_4.task_loss_before}), by frequency "
    "{frequency_4} ({frequency_4.task_loss_before}), random clusters {random_4}, not aligned {unaligned_4}, dominant "
    "experts {dominant_4}, pruned by REAP {reap_4}, pruned at random {dropped_4}. Outputs of two experts have a "
    "mean cosine of {uncurl_4.output_cosine}. Off the task: {whole.off_task_loss} whole, {uncurl_8.off_task_loss} and "
    "{uncurl_4.off_task_loss} by UNCURL. Experts that one held-out row uses in a layer: {whole.experts_used}, "
    "{uncurl_8.experts_used}, {uncurl_4.experts_used}. Tokens of the task, its statistics included: "
    "{uncurl_8.task_tokens}, without a cut {whole.task_tokens}."
)

STUDY = Study(
    paper="uncurl",
    title="Cut down for a task",
    setting=(
        "Decoders of 3 layers, width 96, 16 or 4 experts of width 96 with 2 a token, trained for 450 steps of 768 "
        "tokens of the standard library's source files and documentation in turns; cut down on 64 rows of "
        "documentation and fine-tuned on it for 80 steps. The paper trains 8 to 128 experts at 354M dense parameters "
        "and tunes on SuperGLUE; none of its accuracies could be read, so none is quoted."
    ),
    claims=(
        Claim(
            key="factor_two",
            text="Cut by a factor of 2 and tuned, the mixture is as good at its task as the whole one, within 1 %.",
            where="summaries of the paper: factor 2 is usually safe",
            claimed="no loss at factor 2",
            metric="task_loss",
            judge=NotWorse(method="uncurl_8", control="whole", tolerance=0.01, relative=True),
            tells=TELLS,
        ),
        Claim(
            key="beats_frequency",
            text="At factor 2 merging is better than leaving out the experts that are used least.",
            where="summaries of the paper: one-shot pruning by frequency loses accuracy",
            claimed="better than pruning by activation frequency",
            metric="task_loss",
            judge=Beats(method="uncurl_8", control="frequency_8"),
            tells=TELLS,
        ),
        Claim(
            key="beats_scratch",
            text="Cut by a factor of 4, the large mixture is no worse than one of 4 experts trained from scratch.",
            where="abstract; summaries of the paper: factor 4 in some cases",
            claimed="matches or beats the smaller mixture from scratch",
            metric="task_loss",
            judge=NotWorse(method="uncurl_4", control="scratch_4", tolerance=0.0),
            tells=TELLS,
        ),
        Claim(
            key="threshold",
            text="Beyond some factor pruning hurts: from 2 to 4 the gap to the whole mixture more than doubles.",
            where="abstract",
            claimed="a threshold pruning factor",
            metric="task_loss",
            judge=Grows(near="uncurl_8", far="uncurl_4", whole="whole", times=2.0),
            tells=TELLS,
        ),
        Claim(
            key="clusters_matter",
            text="Clusters of what the router treats alike are better than clusters at random.",
            where="the method: spectral clustering of router logits",
            claimed="not compared",
            metric="task_loss",
            judge=Beats(method="uncurl_4", control="random_4"),
            tells=TELLS,
        ),
        Claim(
            key="alignment_matters",
            text="Aligning inner units before the mean is better than leaving them as they stand.",
            where="the method: alignment by permutation",
            claimed="not compared",
            metric="task_loss",
            judge=Beats(method="uncurl_4", control="unaligned_4"),
            tells=TELLS,
        ),
    ),
    arms=(
        Arm(name="whole", text="all 16 experts, fine-tuned", role="control"),
        Arm(name="uncurl_8", text="16 merged to 8 by UNCURL"),
        Arm(name="frequency_8", text="the 8 most used of 16", role="control"),
        Arm(name="uncurl_4", text="16 merged to 4 by UNCURL"),
        Arm(name="frequency_4", text="the 4 most used of 16", role="reference"),
        Arm(name="random_4", text="16 merged to 4 in random clusters, aligned", role="control"),
        Arm(name="unaligned_4", text="16 merged to 4 by UNCURL without alignment", role="control"),
        Arm(name="dominant_4", text="16 merged to 4 around the most used experts (MC-SMoE)", role="reference"),
        Arm(name="reap_4", text="the 4 of 16 with the largest mean weighted output", role="reference"),
        Arm(name="dropped_4", text="4 of 16 at random, the others left out", role="reference"),
        Arm(name="scratch_4", text="4 experts trained from scratch on the same tokens", role="control"),
    ),
    run=run,
    methods=("compress.uncurl", "compress.merge_experts", "compress.prune_experts", "train.softmax_topk"),
    units={
        "task_loss": "nats a token",
        "task_loss_before": "nats a token",
        "off_task_loss": "nats a token",
        "expert_bytes": "bytes",
        "task_tokens": "tokens",
        "experts_used": "experts a layer",
        "output_cosine": "cosine",
    },
)
