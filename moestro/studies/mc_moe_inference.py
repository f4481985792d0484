"""MC-MoE at run time: what fewer bits and fewer experts are worth in the engine's own kernels.

Speed: decoders of random weights, equal but for the layouts of their experts, produce tokens one by one on one thread,
in turns; an arm's figure is how many times faster than 4 bits it is, in processor time, the median over rounds. Bits
follow the programme at a mean of 2.5. Pruning leaves out half of the second experts, by the median ratio of the decoder
itself; it is served as any request would ask for it. Quality: the same choices on a mixture that is trained inside the
job, held-out perplexity. Nothing here says what a larger model loses.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moestro import surgery
from moestro.core.decoding import Route
from moestro.core.errors import ConfigError
from moestro.engine.decoding import route_index
from moestro.engine.kernels.interface import Kernels
from moestro.methods.planning import make_plan
from moestro.methods.serve.dynamic_pruning import Config, pruning
from moestro.studies._framework import Arm, Budget, Claim, NotWorse, Study, Within
from moestro.studies._mixture import Mixture, corpus_of, rows_of, size_of, trained
from moestro.studies._native import Shape, decoder, native, ratios, rows
from moestro.studies._rows import row_losses


MIXED = ("s1", "q2", "q2", "q3", "q3", "q3", "q3", "q3")
LAYOUTS = {"four_bits": ("q4",), "mixed": MIXED, "four_bits_pruned": ("q4",), "mixed_pruned": MIXED}
TOKENS = 24


def shape(budget: Budget) -> Shape:
    """Of the decoder that is timed."""
    return budget.pick(
        ci=Shape(hidden=64, inner=64, layers=1, vocab=64), micro=Shape(hidden=512, inner=1024), full=Shape()
    )


def scale(budget: Budget) -> Mixture:
    """Of the mixture whose loss is measured."""
    return size_of(budget, **budget.pick(ci={"layers": 1}, micro={}, full={"heldout": 128, "steps": 400}))


def median_ratio(forward: Any, tokens: Any) -> float:
    """Of the second weight to the first, over a text."""
    seen: list[Any] = []
    forward.on_route = lambda layer, ids, weights: seen.append(weights[:, 1] / weights[:, 0])
    forward.step(rows(tokens, 0))
    forward.on_route = None
    return float(np.median(np.concatenate(seen)))


@functools.lru_cache(maxsize=1)
def speeds(seed: int, budget: Budget) -> Mapping[str, float]:
    """Times faster than 4 bits, by arm.

    Raises:
        ConfigError: the native kernels are not installed.
    """
    kernels: Kernels | None = native()
    if kernels is None:
        raise ConfigError("this study times the native kernels; run pip install ./native")
    size, count = shape(budget), budget.pick(ci=2, micro=8, full=TOKENS)
    tokens = np.random.default_rng(seed).integers(0, size.vocab, 64)
    calls = {}
    made = {names: decoder(size, names, kernels) for names in dict.fromkeys(LAYOUTS.values())}
    for arm, names in LAYOUTS.items():
        forward, route = made[names], 0
        if arm.endswith("_pruned"):
            route = route_index(forward, Route(kind="ratio", threshold=median_ratio(forward, tokens)))
        calls[arm] = functools.partial(_decode, forward, tokens[:count], route)
    return ratios(calls, budget.pick(ci=2, micro=9, full=41), "four_bits")


def _decode(forward: Any, tokens: Any, route: int) -> None:
    for at, token in enumerate(tokens):
        forward.step(rows([token], at, route))


@functools.lru_cache(maxsize=4)
def model_of(bits: str, seed: int, budget: Budget) -> tuple[Any, Any]:
    """A packed copy of the trained mixture, and rows it was calibrated on."""
    size = scale(budget)
    model = trained(size, seed)
    data = rows_of(corpus_of(size).train, size, seed + 7, limit=budget.pick(ci=4, micro=24, full=96))
    group = budget.pick(ci=8, micro=24, full=32)
    settings: dict[str, Any] = {"group_size": group, "avg_bits": 4 if bits == "four_bits" else 2.5}
    if bits == "four_bits":
        settings |= {"allocation": "uniform", "choices": (4,)}
    if bits != "float":
        surgery.apply(model, make_plan("compress.mc_moe", model, settings, batches=data), calib=data)
    return model, data


def perplexity(arm: str, seed: int, budget: Budget) -> float:
    """Held out, under what the arm does."""
    size = scale(budget)
    model, data = model_of(arm.removesuffix("_pruned"), seed, budget)
    held = rows_of(corpus_of(size).heldout, size)
    if not arm.endswith("_pruned"):
        return math.exp(row_losses(model, held).mean())
    plan: Any = make_plan("serve.dynamic_pruning", model, {}, batches=data)
    with pruning(model, Config(**plan.decoder.config)):
        return math.exp(row_losses(model, held).mean())


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Speed and perplexity of an arm."""
    found = {"ppl": perplexity(arm, seed, budget)}
    return found if arm == "float" else {"times": speeds(seed, budget)[arm], **found}


ALL = (
    "times faster than 4 bits: mixed bits {mixed.times}, pruned {four_bits_pruned.times}, both {mixed_pruned.times}; "
    "perplexity of a trained mixture: float {float.ppl}, 4 bits {four_bits.ppl}, mixed {mixed.ppl}, pruned "
    "{four_bits_pruned.ppl}, both {mixed_pruned.ppl}."
)

STUDY = Study(
    paper="mc-moe",
    part="inference",
    title="Fewer bits and fewer experts in the engine",
    setting=(
        "Speed: 2 layers of width 768, 8 experts of width 2048 and 2 a token, random weights, attention and head in 4 "
        "bits, 24 tokens one by one on one thread, 41 rounds; one expert in eight has 1 bit, two have 2, five have 3. "
        "Perplexity: 3 layers of width 96, 8 experts of width 96, trained for 400 steps. The paper times Mixtral 8x7B "
        "on GPUs: 1.63 times at 2.54 bits and 1.71 with pruning, against 16 bits on twice the GPUs."
    ),
    claims=(
        Claim(
            key="faster_than_4_bits",
            text="2.5 bits and pruning together decode at least 1.15 times as fast as 4 bits.",
            where="table of speed and memory; the bar is ours",
            claimed="1.71 times 16 bits",
            metric="times",
            judge=Within(arm="mixed_pruned", low=1.15),
            tells=ALL,
        ),
        Claim(
            key="bits_alone",
            text="2.5 bits decode faster than 4 bits without pruning.",
            where="table of speed and memory; the bar is ours",
            claimed="1.63 times 16 bits",
            metric="times",
            judge=Within(arm="mixed", low=1.05),
            tells=ALL,
        ),
        Claim(
            key="pruning_alone",
            text="Pruning makes decoding faster by a twentieth.",
            where="table of speed and memory: 1.63 to 1.71",
            claimed="1.05 times",
            metric="times",
            judge=Within(arm="four_bits_pruned", low=1.05),
            tells=ALL,
        ),
        Claim(
            key="price",
            text="Mixed bits and pruning cost at most 40 % of perplexity.",
            where="WikiText2: 16 bits, 2.54 bits",
            claimed="3.84 to 5.09 without pruning, 33 % more",
            metric="ppl",
            judge=NotWorse(method="mixed_pruned", control="float", tolerance=0.4, relative=True),
            tells=ALL,
        ),
    ),
    arms=(
        Arm(name="float", text="the trained mixture in float32; not timed", role="control"),
        Arm(name="four_bits", text="experts in 4 bits", role="control"),
        Arm(name="four_bits_pruned", text="4 bits, second experts below the median ratio left out", role="reference"),
        Arm(name="mixed", text="1, 2 and 3 bits, 2.5 in the mean", role="reference"),
        Arm(name="mixed_pruned", text="both"),
    ),
    run=run,
    methods=("compress.mc_moe", "serve.dynamic_pruning"),
    units={"times": "times the speed of 4 bits, processor time", "ppl": "perplexity of a small trained mixture"},
)
