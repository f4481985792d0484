"""Pre-gated MoE: does a mixture keep its quality when every gate reads an earlier block, and does that hide the reads?

Quality: a mixture pretrained on source code is converted and tuned on documentation, each arm with the same steps, data
and seeds. System: the tuned conventional and pre-gated models are packed and run token by token through the engine's
own store, forecast and forward, with reading and computing paced (see ``_paced``).
"""

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from moestro.core.errors import StoreError
from moestro.engine.pack import pack_model
from moestro.engine.packed import Packed
from moestro.models.save import save
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, NotWorse, Recovers, Study, Within
from moestro.studies._mixture import loss_of, rows_of, task_of
from moestro.studies._paced import Pace, Ran, experts_of, play, reads_ahead, token_seconds
from moestro.studies._pre_gated import agreement, converted, parent, shape_of, tuned


RATES = {"02": 0.2e9, "05": 0.5e9, "10": 1.0e9}
"""Bytes a second of the tier, by the ending of its metrics."""

SYSTEM: Mapping[str, tuple[str, str | None, Mapping[str, Any], int | None]] = {
    "on_demand": ("conventional", None, {}, 2),
    "speculative": ("conventional", "serve.next_gate", {}, 2),
    "speculative_2": ("conventional", "serve.next_gate", {"factor": 2.0}, 3),
    "prefetch_all": ("conventional", "serve.next_gate", {"factor": 64.0}, None),
    "pre_gated": ("ahead_1", "serve.pre_gated", {}, 2),
    "pre_gated_3": ("ahead_1", "serve.pre_gated", {}, 3),
}
"""System arms: whose model, what reads ahead, its settings, slots in memory; None: two layers whole."""


def held_loss(model: nn.Module, name: str) -> float:
    """Held-out loss on the documentation."""
    size = shape_of(BUDGETS[name])
    return loss_of(model, task_of(size).heldout, size)


def quality(arm: str, seed: int, name: str) -> dict[str, float]:
    """Losses of a quality arm."""
    if arm == "ahead_1_untuned":
        found = agreement(seed, name)
        return {
            "loss": held_loss(converted("ahead_1", seed, name), name),
            "agreement": float(np.mean(found)),
            "agreement_first": found[0],
            "agreement_last": found[-1],
        }
    if arm == "conventional_untuned":
        return {"loss": held_loss(parent(seed, name), name)}
    return {"loss": held_loss(tuned(arm, seed, name), name)}


# -- system ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def packed(arm: str, seed: int, name: str) -> tuple[Packed, tempfile.TemporaryDirectory[str]]:
    """The tuned model as the engine reads it, and the folder that holds it."""
    folder = tempfile.TemporaryDirectory(prefix="moestro-study-")
    save(tuned(arm, seed, name), Path(folder.name) / "model")
    pack_model(Path(folder.name) / "model", Path(folder.name) / "packed", bits=32)
    return Packed.open(Path(folder.name) / "packed"), folder


def ids_of(seed: int, name: str) -> list[int]:
    """Held-out text, token by token: a row of the seed's own."""
    size = shape_of(BUDGETS[name])
    every = [row for batch in rows_of(task_of(size).heldout, size) for row in batch["input_ids"]]
    count = BUDGETS[name].pick(ci=2, micro=6, full=16)
    return [int(token) for token in every[seed % len(every)][:count]]


def pace_of(budget: Budget, *, busy: bool = False) -> Pace:
    """Experts of 8 MB and mixtures of 16 ms: a read takes 2.5, 1 and 0.5 of a mixture's time at the three rates."""
    scale = budget.pick(ci=0.0625, micro=0.375, full=1.0)
    return Pace(8e6 * scale, 16e-3 * scale, busy)


@functools.lru_cache(maxsize=8)
def resident(model: str, seed: int, name: str, busy: bool = False) -> Ran:
    """All experts in memory: what every other way must compute, and how fast it could."""
    return play(packed(model, seed, name)[0], ids_of(seed, name), pace_of(BUDGETS[name], busy=busy))


def ran(arm: str, seed: int, name: str, rate: str, *, slots: int | None = None, busy: bool = False) -> Ran:
    """One system arm at one rate, held against the resident run bit by bit.

    Raises:
        StoreError: its logits are others.
    """
    model, forecast, settings, given = SYSTEM[arm]
    whole = packed(model, seed, name)[0]
    layer = max(there.num for there in whole.experts.values())
    found = play(
        whole,
        ids_of(seed, name),
        pace_of(BUDGETS[name], busy=busy),
        rate=RATES[rate],
        slots=slots or given or 2 * layer,
        forecast=reads_ahead(forecast, **settings),
    )
    if not np.array_equal(found.logits, resident(model, seed, name, busy).logits):
        raise StoreError(f"{arm} at {rate}: logits differ from those of the resident run")
    return found


def system(arm: str, seed: int, name: str) -> dict[str, float]:
    """Speeds, waits and bytes of a system arm."""
    if arm == "resident":
        return {f"tokens_s_{rate}": resident("ahead_1", seed, name).tokens_s for rate in RATES} | {
            "busy_tokens_s": resident("ahead_1", seed, name, True).tokens_s
        }
    scores: dict[str, float] = {}
    errors = []
    for rate, value in RATES.items():
        found = ran(arm, seed, name, rate)
        scores |= {
            f"tokens_s_{rate}": found.tokens_s,
            f"wait_ms_{rate}": 1e3 * found.waited_s / len(found.logits),
            f"reads_{rate}": found.reads / len(found.logits),
            "wasted_share": max(scores.get("wasted_share", 0.0), found.wasted / max(found.reads, 1)),
            "peak_slots": max(scores.get("peak_slots", 0.0), float(found.peak)),
        }
        if arm in ("on_demand", "pre_gated"):
            errors.append(abs(formula(arm, seed, name, value) * found.tokens_s - 1))
    if errors:
        scores |= {"formula_error": max(errors), "busy_tokens_s": ran(arm, seed, name, "05", busy=True).tokens_s}
        scores["cache_gain"] = cached(arm, seed, name).tokens_s / scores["tokens_s_05"]
    return scores


def cached(arm: str, seed: int, name: str) -> Ran:
    """The arm at the middle rate with room for a fifth of all experts, least recently used ones go."""
    whole = packed(SYSTEM[arm][0], seed, name)[0]
    return ran(arm, seed, name, "05", slots=max(3, round(0.2 * experts_of(whole))))


def formula(arm: str, seed: int, name: str, rate: float) -> float:
    """Seconds a token by the paper's formulas, from the measured time of a resident block and the time of a read."""
    model = SYSTEM[arm][0]
    blocks = len(packed(model, seed, name)[0].experts)
    compute_s = 1 / resident(model, seed, name).tokens_s / blocks
    return token_seconds(arm, blocks, compute_s, pace_of(BUDGETS[name]).nominal / rate, shape_of(BUDGETS[name]).experts)


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Measure one arm."""
    if arm == "resident" or arm in SYSTEM:
        return system(arm, seed, budget.name)
    return quality(arm, seed, budget.name)


QUALITY = (
    "Loss after tuning: conventional {conventional.loss}, one ahead {ahead_1.loss}, two {ahead_2.loss}, three "
    "{ahead_3.loss}; from a random gate {ahead_1_random.loss}, without the norms' gains {ahead_1_unfolded.loss}, with "
    "a random gate that never learns {blind.loss}. Before tuning: {conventional_untuned.loss} and "
    "{ahead_1_untuned.loss}; the early gate picks the parent's expert for {ahead_1_untuned.agreement} of the tokens "
    "({ahead_1_untuned.agreement_first} in the first block that is chosen ahead, {ahead_1_untuned.agreement_last} in "
    "the last). Of mixtures that choose two experts: conventional {conventional_top2.loss}, one ahead "
    "{ahead_1_top2.loss}."
)
SPEEDS = (
    "Tokens/s at 0.2, 0.5 and 1 GB/s: on demand {on_demand.tokens_s_02}, {on_demand.tokens_s_05}, "
    "{on_demand.tokens_s_10}; speculative {speculative.tokens_s_02}, {speculative.tokens_s_05}, "
    "{speculative.tokens_s_10}, with twice as many {speculative_2.tokens_s_02}, {speculative_2.tokens_s_05}, "
    "{speculative_2.tokens_s_10}; the whole next layer {prefetch_all.tokens_s_02}, {prefetch_all.tokens_s_05}, "
    "{prefetch_all.tokens_s_10}; pre-gated {pre_gated.tokens_s_02}, {pre_gated.tokens_s_05}, {pre_gated.tokens_s_10}; "
    "resident {resident.tokens_s_05}. Reads a token at 0.5 GB/s: {on_demand.reads_05}, {speculative.reads_05}, "
    "{speculative_2.reads_05}, {prefetch_all.reads_05}, {pre_gated.reads_05}. With a processor that works and copies "
    "that are made, 0.5 GB/s: on demand {on_demand.busy_tokens_s}, pre-gated {pre_gated.busy_tokens_s}, resident "
    "{resident.busy_tokens_s}. The formulas are off by {on_demand.formula_error} and {pre_gated.formula_error} at most."
)
LOOK = "figure on look-ahead distance, Switch-Base-8 on SQuAD"


def _faster(key: str, metric: str, text: str, by: float, control: str, claimed: str) -> Claim:
    judge = Beats(method="pre_gated", control=control, better="higher", by=by, relative=True)
    return Claim(
        key=key, text=text, where="evaluation of performance", claimed=claimed, metric=metric, judge=judge, tells=SPEEDS
    )


STUDY = Study(
    paper="pre-gated-moe",
    title="Gates one block early: what it costs in loss, what it hides of the reads",
    setting=(
        "Quality: OLMoE-shaped mixture of 6 layers, width 64, 8 experts of 64, top-1 (and once top-2) weighed by its "
        "probability, "
        "pretrained on the standard library's source for 300 steps of 768 tokens, tuned on its documentation for 100; "
        "the paper tunes Switch-Base and -Large for 2,048 steps of 65,536 tokens. System: these models in float32, "
        "decoded token by token, batch 1, by the engine with its numpy kernels; an expert is read as if it had 8 MB, "
        "by one reader at 0.2, 0.5 or 1 GB/s, and a mixture takes 16 ms, so reading is 2.5, 1 and 0.5 of computing. "
        "Both pass asleep and do not compete, but in the busy measurements. There is room for 2 experts, 3 where twice "
        "as many are speculated on, and two layers where a whole one is read. The paper has an A100 behind PCIe."
    ),
    claims=(
        Claim(
            key="quality",
            text="Tuned pre-gated, the model is as good as tuned conventionally: within 1 % of its loss.",
            where="table of accuracies after fine-tuning",
            claimed="Base-8 XSum R1 34.7 against 34.6, SQuAD EM 78.2 against 77.4; Base-128 38.0 against 38.1",
            metric="loss",
            judge=NotWorse(method="ahead_1", control="conventional", tolerance=0.01, relative=True),
            tells=QUALITY,
        ),
        Claim(
            key="quality_top2",
            text="So is a mixture of which every token chooses two experts.",
            where="not in the paper, whose models choose one",
            claimed="not compared",
            metric="loss",
            judge=NotWorse(method="ahead_1_top2", control="conventional_top2", tolerance=0.01, relative=True),
            tells=QUALITY,
        ),
        Claim(
            key="gate_matters",
            text="The comparison can tell gates apart: an early gate that never learns is worse.",
            where="control of this study",
            claimed="not compared",
            metric="loss",
            judge=Beats(method="ahead_1", control="blind", by=0.0),
            tells=QUALITY,
        ),
        Claim(
            key="gate_kept",
            text="The early gate keeps four fifths of what a gate is worth, which may be less than 1 % of the loss.",
            where="control of this study",
            claimed="not compared",
            metric="loss",
            judge=Recovers(method="ahead_1", cut="blind", whole="conventional", share=0.8),
            tells=QUALITY,
        ),
        Claim(
            key="further_costs",
            text="Looking three blocks ahead is worse than looking one ahead.",
            where=LOOK,
            claimed="EM 77.4, 78.2, 77.8, 77.3 at 0 to 3 blocks",
            metric="loss",
            judge=Beats(method="ahead_1", control="ahead_3"),
            tells=QUALITY,
        ),
        Claim(
            key="start",
            text="Starting from the next block's gate is better than starting from a random one.",
            where="not in the paper; what the conversion here does",
            claimed="not compared",
            metric="loss",
            judge=Beats(method="ahead_1", control="ahead_1_random"),
            tells=QUALITY,
        ),
        _faster(
            "on_demand_equal",
            "tokens_s_05",
            "1.3 times on-demand speed where reading takes as long as computing.",
            0.3,
            "on_demand",
            "1.7x on average, up to 1.9x, a block",
        ),
        _faster(
            "on_demand_half",
            "tokens_s_10",
            "1.3 times on-demand speed where reading takes half of computing.",
            0.3,
            "on_demand",
            "111 tokens/s against 74, Switch-Base",
        ),
        _faster(
            "speculation",
            "tokens_s_05",
            "Faster than training-free speculation with as many slots.",
            0.0,
            "speculative",
            "not compared",
        ),
        _faster(
            "prefetch_all",
            "tokens_s_05",
            "Twice as fast as reading the whole next layer.",
            1.0,
            "prefetch_all",
            "42x on average, with up to 256 experts a layer",
        ),
        Claim(
            key="near_resident",
            text="At most 19 % slower than all experts resident where reading takes half of computing.",
            where="evaluation of performance",
            claimed="19 % overhead on average",
            metric="tokens_s_10",
            judge=NotWorse(method="pre_gated", control="resident", tolerance=0.19, better="higher", relative=True),
            tells=SPEEDS,
        ),
        Claim(
            key="memory",
            text="Never more in memory than the active experts of two blocks.",
            where="evaluation of peak memory",
            claimed="23 % of all resident, 0.2 % above on-demand",
            metric="peak_slots",
            judge=Within(arm="pre_gated", high=2.0),
        ),
        Claim(
            key="room",
            text="Room for the active experts of two blocks is enough: with a third it is no more than 5 % faster.",
            where="evaluation of peak memory; the limit above is kept by the store, this is what it costs",
            claimed="not compared",
            metric="tokens_s_05",
            judge=NotWorse(method="pre_gated", control="pre_gated_3", tolerance=0.05, better="higher", relative=True),
            tells="With room for two {pre_gated}, for three {pre_gated_3} tokens/s.",
        ),
        Claim(
            key="no_waste",
            text="Nothing is read that is not needed.",
            where="section 4: the routing of the next block is known, not predicted",
            claimed="not in numbers",
            metric="wasted_share",
            judge=Within(arm="pre_gated", high=0.0),
            tells="Evicted unused: pre-gated {pre_gated}, speculative {speculative}, twice as many {speculative_2}.",
        ),
        Claim(
            key="formulas",
            text="The four formulas predict the speeds within 15 %.",
            where="timeline of the execution",
            claimed="not in numbers",
            metric="formula_error",
            judge=Within(arm="pre_gated", high=0.15),
            tells=SPEEDS,
        ),
        Claim(
            key="cache",
            text="A cache of a fifth of the experts helps on-demand reads more than pre-gated ones.",
            where="evaluation of caching",
            claimed="1.1x to 1.2x",
            metric="cache_gain",
            judge=Beats(method="on_demand", control="pre_gated", better="higher"),
            tells="With the cache {on_demand} and {pre_gated} times as fast.",
        ),
    ),
    arms=(
        Arm(name="conventional", text="each gate reads its own block, tuned", role="control"),
        Arm(name="ahead_1", text="gates one block early, from the next block's gate"),
        Arm(name="ahead_2", text="two blocks early"),
        Arm(name="ahead_3", text="three blocks early"),
        Arm(name="ahead_1_random", text="one block early, from random gates", role="control"),
        Arm(name="ahead_1_unfolded", text="one block early, norms' gains not accounted for", role="reference"),
        Arm(name="blind", text="one block early, random gates that do not learn", role="control"),
        Arm(name="conventional_top2", text="each gate reads its own block and chooses two experts", role="control"),
        Arm(name="ahead_1_top2", text="one block early, two experts"),
        Arm(name="conventional_untuned", text="the pretrained model", role="reference"),
        Arm(name="ahead_1_untuned", text="converted, not tuned", role="reference"),
        Arm(name="on_demand", text="conventional model, experts read when its gates have spoken", role="control"),
        Arm(name="speculative", text="conventional model, next gate on this input, read ahead", role="control"),
        Arm(name="speculative_2", text="the same, twice as many, a third slot", role="control"),
        Arm(
            name="prefetch_all",
            text="conventional model, the whole next layer behind what is needed now, two layers of slots",
            role="control",
        ),
        Arm(name="pre_gated", text="pre-gated model, the decided experts of the next block"),
        Arm(name="pre_gated_3", text="the same with a third slot", role="control"),
        Arm(name="resident", text="all experts in memory", role="reference"),
    ),
    run=run,
    methods=(
        "train.pre_gated",
        "convert.pre_gated",
        "serve.pre_gated",
        "serve.next_gate",
        "serve.lru",
        "train.softmax_topk",
    ),
    units={
        "loss": "nats a token",
        **{f"tokens_s_{rate}": "tokens/s" for rate in RATES},
        **{f"wait_ms_{rate}": "ms a token" for rate in RATES},
        **{f"reads_{rate}": "experts a token" for rate in RATES},
        "busy_tokens_s": "tokens/s",
        "peak_slots": "experts",
        "wasted_share": "share of reads",
        "formula_error": "share of measured",
        "cache_gain": "times",
        "agreement": "share of tokens",
        "agreement_first": "share of tokens",
        "agreement_last": "share of tokens",
    },
)
