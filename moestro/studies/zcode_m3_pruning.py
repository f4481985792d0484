"""Z-code M3, pruning: does it matter which experts go, before and after a short recovery?

A mixture is trained inside the job on the standard library's source files (``_mixture.py``), with a balance loss so
weak that use is uneven. Half of its experts, or a quarter, are left out by one criterion or another, calibrated on
training rows; what is left trains on for a few steps, and so does the whole mixture beside it. Random choices are
averaged over several draws, each of which trains on by itself. Arms of a seed share the trained mixture and what was
measured of it.
"""

import copy
import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from moestro import surgery
from moestro.methods.planning import make_plan
from moestro.observe.calibrate import Calibration, calibrate
from moestro.studies._framework import Arm, Beats, Budget, Claim, Judgement, Measured, NotWorse, Study, Verdict
from moestro.studies._mixture import Mixture, corpus_of, fresh, loss_of, rows_of, size_of, trained, tune


HALF, QUARTER = 0.5, 0.75  # share that stays when a half, or a quarter, is left out
RECOVERY_LR = 0.3
PATIENCE = 120.0  # seconds of recovery that count as short
QUARTERS = ("reconstruction_quarter", "reap_quarter", "utilisation_quarter")


def scale(budget: Budget) -> Mixture:
    """The mixture of the budget."""
    return size_of(budget, **budget.pick(ci={}, micro={"steps": 70}, full={"steps": 800}))


def recovery(budget: Budget) -> int:
    """Steps after pruning."""
    return budget.pick(ci=1, micro=12, full=100)


def draws(arm: str, budget: Budget) -> int:
    """How many random choices an arm is the mean of."""
    return budget.pick(ci=1, micro=2, full=5) if arm.startswith("random") else 1


def plan_of(arm: str, model: nn.Module, measured: Calibration, seed: int) -> Any:
    """The plan of an arm such as ``reap_quarter``."""
    criterion, _, part = arm.rpartition("_")
    budget = "global" if criterion.startswith("global") else "layer"
    config = {
        "criterion": {"utilisation": "frequency", "global": "frequency"}.get(criterion, criterion),
        "keep": HALF if part == "half" else QUARTER,
        "budget": budget,
    }
    return make_plan("compress.prune_experts", model, config, statistics={"experts": measured}, seed=seed)


def measures(model: nn.Module, size: Mixture, seed: int, budget: Budget) -> dict[str, float]:
    """Held-out loss now and after the recovery, as a loss and as a perplexity, and how long that took."""
    data = corpus_of(size)
    before = loss_of(model, data.heldout, size)
    started = time.perf_counter()
    tune(model, data.train, size, seed + 1, recovery(budget), lr=RECOVERY_LR, first=size.steps)
    seconds = time.perf_counter() - started
    after = loss_of(model, data.heldout, size)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".bank." in name)
    return {
        "loss_before": before,
        "loss_after": after,
        "ppl_before": math.exp(before),
        "ppl_after": math.exp(after),
        "expert_parameters": float(experts),
        "recovery_seconds": seconds,
    }


@functools.lru_cache(maxsize=1)
def use_of(size: Mixture, seed: int, sample: int) -> Calibration:
    """What calibration says of the trained mixture."""
    rows = rows_of(corpus_of(size).train, size, seed, limit=size.heldout)
    return calibrate(trained(size, seed), rows, outputs=True, sample=sample, allow_starved=True)


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Prune the trained mixture by one criterion, measure, train on, measure again."""
    size = scale(budget)
    if arm == "whole":
        return measures(trained(size, seed), size, seed, budget)
    if arm == "small":
        few = size.model_copy(update={"experts": size.experts // 2})
        model = fresh(few, seed)
        tune(model, corpus_of(few).train, few, seed, few.steps)
        return measures(model, few, seed, budget)
    model = trained(size, seed)
    measured = use_of(size, seed, budget.pick(ci=8, micro=128, full=512))
    found = []
    for draw in range(draws(arm, budget)):
        subject = copy.deepcopy(model)
        surgery.apply(subject, plan_of(arm, subject, measured, 1000 * draw + seed))
        found.append(measures(subject, size, seed, budget))
    use = np.concatenate(
        [stats.count_E.double().numpy() / stats.count_E.double().mean().item() for stats in measured.values()]
    )
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]} | {
        "uneven_use": float(use.std())
    }


@dataclass(frozen=True, kw_only=True)
class BestStaysClose:
    """The best of several methods, by its mean over seeds, is not worse than ``control`` (see NotWorse), and soon.

    Shown and partly as NotWorse says, of |control|; not shown where a seed recovered for more than ``seconds``.
    """

    methods: tuple[str, ...]
    control: str
    tolerance: float
    seconds: float

    @property
    def arms(self) -> tuple[str, ...]:
        return (*self.methods, self.control)

    @property
    def rule(self) -> str:
        return (
            f"the best of {', '.join(self.methods)} by its mean: at most {self.tolerance:.3g} of {self.control} worse "
            f"than {self.control} (lower is better), whole 95 % interval, after at most {self.seconds:g} s"
        )

    def __call__(self, measured: Measured, metric: str) -> Judgement:
        best = min(self.methods, key=lambda arm: float(np.mean(list(measured.of(arm, metric).values()))))
        rule = NotWorse(method=best, control=self.control, tolerance=self.tolerance, relative=True)
        found = rule(measured, metric)
        longest = max(measured.of(best, "recovery_seconds").values())
        verdict: Verdict = found.verdict if longest <= self.seconds else "not_shown"
        note = f"{best}: {found.note}; recovery took {longest:.3g} s at most"
        return Judgement(verdict=verdict, measured=found.measured, interval=found.interval, note=note)


TELLS_HALF = (
    "half left out, loss before and after the recovery: utilisation {utilisation_half.loss_before} and "
    "{utilisation_half.loss_after}, random {random_half.loss_before} and {random_half.loss_after}, router weight "
    "{router_weight_half.loss_before} and {router_weight_half.loss_after}, router norm "
    "{router_norm_half.loss_before} and {router_norm_half.loss_after}, reconstruction "
    "{reconstruction_half.loss_before} and {reconstruction_half.loss_after}; the whole mixture {whole.loss_after}, one "
    "of half as many experts trained from scratch {small.loss_after}. Use of an expert over its layer's mean spreads "
    "by {utilisation_half.uneven_use}."
)

STUDY = Study(
    paper="zcode-m3",
    part="pruning",
    title="Which experts go",
    setting=(
        "A decoder of 3 layers, width 96, 8 experts of width 96 and 2 a token, trained for 800 steps of 768 tokens of "
        "the standard library's source files under a balance loss of weight 0.001, pruned on 64 training rows, then "
        "trained on for 100 steps at 0.3 of the peak rate; the whole mixture trains on beside it. The paper prunes "
        "encoder-decoders of up to 10B parameters; no number of its pruning could be read, so none is quoted."
    ),
    claims=(
        Claim(
            key="before_recovery",
            text="Half of the experts left out by utilisation costs less than at random, before any training.",
            where="expert pruning (by utilisation)",
            claimed="utilisation better than random",
            metric="loss_before",
            judge=Beats(method="utilisation_half", control="random_half"),
            tells=TELLS_HALF,
        ),
        Claim(
            key="after_recovery",
            text="The same after a short fine-tuning.",
            where="expert pruning (fine-tuned briefly)",
            claimed="utilisation better than random",
            metric="loss_after",
            judge=Beats(method="utilisation_half", control="random_half"),
            tells=TELLS_HALF,
        ),
        Claim(
            key="small_from_scratch",
            text="A mixture pruned to a half is better than one of that size trained from scratch on as many tokens.",
            where="expert pruning",
            claimed="better than equally small models from scratch",
            metric="loss_after",
            judge=Beats(method="utilisation_half", control="small"),
            tells=TELLS_HALF,
        ),
        Claim(
            key="quarter_is_nearly_free",
            text=(
                "A quarter of the experts left out by the best criterion keeps perplexity within 3 % of the whole "
                "mixture's, trained on as long, after at most two minutes of recovery."
            ),
            where="not of the paper: what users of pruning tools ask for",
            claimed="within 3 %",
            metric="ppl_after",
            judge=BestStaysClose(methods=QUARTERS, control="whole", tolerance=0.03, seconds=PATIENCE),
            tells=(
                "perplexity after the recovery: whole {whole} ({whole.ppl_before} before it), a quarter left out by "
                "reconstruction {reconstruction_quarter}, by REAP {reap_quarter}, by utilisation "
                "{utilisation_quarter}, at random {random_quarter}."
            ),
        ),
        Claim(
            key="quarter_beats_random",
            text="It matters there, too, who goes: random choices end higher.",
            where="not of the paper",
            claimed="better than random",
            metric="ppl_after",
            judge=Beats(method="reconstruction_quarter", control="random_quarter"),
            tells=(
                "before the recovery the losses are {reconstruction_quarter.loss_before} by reconstruction and "
                "{random_quarter.loss_before} at random; after it {reconstruction_quarter.loss_after} and "
                "{random_quarter.loss_after}."
            ),
        ),
    ),
    arms=(
        Arm(name="whole", text="nothing left out, trained on as the others are", role="control"),
        Arm(name="utilisation_half", text="the half that fewest tokens choose left out"),
        Arm(name="random_half", text="a random half left out, mean over draws", role="control"),
        Arm(name="router_weight_half", text="the half with the least sum of gates left out", role="reference"),
        Arm(name="router_norm_half", text="the half with the shortest router rows left out", role="reference"),
        Arm(name="reap_half", text="the half with the least mean weighted output left out", role="reference"),
        Arm(name="reconstruction_half", text="the half that the block misses least left out", role="reference"),
        Arm(name="small", text="half as many experts, trained from scratch on as many tokens", role="control"),
        Arm(name="reconstruction_quarter", text="the quarter that the block misses least left out"),
        Arm(name="utilisation_quarter", text="the quarter that fewest tokens choose left out", role="reference"),
        Arm(name="reap_quarter", text="the quarter with the least mean weighted output left out", role="reference"),
        Arm(
            name="global_quarter", text="a quarter of all layers' experts by utilisation, one budget", role="reference"
        ),
        Arm(name="random_quarter", text="a random quarter left out, mean over draws", role="control"),
    ),
    run=run,
    methods=("compress.prune_experts", "train.softmax_topk", "train.balance_loss"),
    units={
        "loss_before": "nats a token",
        "loss_after": "nats a token",
        "ppl_before": "perplexity",
        "ppl_after": "perplexity",
        "recovery_seconds": "seconds",
        "expert_parameters": "parameters",
        "uneven_use": "standard deviation of use over its mean",
    },
)
