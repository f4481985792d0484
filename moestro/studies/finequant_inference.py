"""FineQuant at run time: what weights of 4 and 8 bits with fine groups are worth in a product, for few and many tokens.

Decoders of random weights that differ in the layout of their experts alone run in the engine's kernels on one thread:
token by token, and a prompt at once. Figures are times as fast as 16 bits, in processor time, medians over rounds in
one process. 16 bits are float16 that become float32 in the product; activations of the integer layouts have 8 bits,
where the paper's stay in 16, so that prompts gain here by integer products as well.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from moestro.core.errors import ConfigError
from moestro.studies._framework import Arm, Budget, Claim, Study, Within
from moestro.studies._native import Shape, decoder, native, ratios, rows


LAYOUTS = {"half": "f16", "eight_bits": "q8", "four_bits": "q4"}
TOKENS, PROMPT = 16, 64


@functools.lru_cache(maxsize=1)
def speeds(seed: int, budget: Budget) -> Mapping[str, Mapping[str, float]]:
    """Times as fast as 16 bits by arm.

    Raises:
        ConfigError: the native kernels are not installed.
    """
    kernels = native()
    if kernels is None:
        raise ConfigError("this study times the native kernels; run pip install ./native")
    size = budget.pick(
        ci=Shape(hidden=64, inner=64, layers=1, vocab=64), micro=Shape(hidden=512, inner=1024), full=Shape()
    )
    tokens = np.random.default_rng(seed).integers(0, size.vocab, PROMPT)
    count, rounds = budget.pick(ci=2, micro=6, full=TOKENS), budget.pick(ci=2, micro=9, full=41)
    made = {arm: decoder(size, (name,), kernels) for arm, name in LAYOUTS.items()}
    few = ratios({arm: functools.partial(_decode, one, tokens[:count]) for arm, one in made.items()}, rounds, "half")
    many = ratios({arm: functools.partial(one.step, rows(tokens, 0)) for arm, one in made.items()}, rounds, "half")
    return {arm: {"times": few[arm], "prompt": many[arm]} for arm in LAYOUTS}


def _decode(forward: Any, tokens: Any) -> None:
    for at, token in enumerate(tokens):
        forward.step(rows([token], at))


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Speed of a layout."""
    return speeds(seed, budget)[arm]


ALL = (
    "times as fast as 16 bits token by token and for 64 tokens at once: 8 bits {eight_bits.times} and "
    "{eight_bits.prompt}, 4 bits {four_bits.times} and {four_bits.prompt}."
)

STUDY = Study(
    paper="finequant",
    part="inference",
    title="Products with few bits for few and many tokens",
    setting=(
        "Decoders of 2 layers, width 768, 8 experts of width 2048 and 2 a token, random weights, groups of 64, "
        "attention and head in 4 bits in all arms; one thread, 16 tokens one by one and 64 at once, 41 rounds. "
        "The paper's 3.65 "
        "times is the throughput of OPT-175B on as many GPUs, larger batches included, not that of a product."
    ),
    claims=(
        Claim(
            key="four_bits",
            text="Decoding with experts of 4 bits is at least 1.5 times as fast as with 16 bits.",
            where="abstract; the bar is ours",
            claimed="up to 3.65 times the throughput",
            metric="times",
            judge=Within(arm="four_bits", low=1.5),
            tells=ALL,
        ),
        Claim(
            key="eight_bits",
            text="Decoding with experts of 8 bits is faster than with 16 bits.",
            where="abstract; the bar is ours",
            claimed="faster",
            metric="times",
            judge=Within(arm="eight_bits", low=1.05),
            tells=ALL,
        ),
        Claim(
            key="prompts",
            text="For 64 tokens at once 4 bits are no slower than 16 bits.",
            where="section on kernels: compute-bound products gain nothing",
            claimed="no gain, or a loss",
            metric="prompt",
            judge=Within(arm="four_bits", low=1.0),
            tells=ALL,
        ),
    ),
    arms=(
        Arm(name="half", text="16 bits", role="control"),
        Arm(name="eight_bits", text="8 bits in groups of 64", role="reference"),
        Arm(name="four_bits", text="4 bits in groups of 64"),
    ),
    run=run,
    methods=("compress.finequant",),
    units={"times": "times as fast as 16 bits, token by token", "prompt": "times as fast, 64 tokens at once"},
)
