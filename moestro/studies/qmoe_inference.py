"""QMoE at run time: is a product with coded ternary weights as fast as one with weights of 16 bits?

Products of one matrix, and whole decoders of random weights that differ in the layout of their experts alone, in the
engine's kernels on one thread; figures are times as fast as 16 bits, in processor time, medians over rounds in one
process. Symbols are independent, with the paper's share of zeros. Weights of 16 bits are float16 that become float32 in
the product, which is this engine's layout for them; 4 bits are the control that says what a plain small layout gives.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moestro.core.errors import ConfigError
from moestro.engine.kernels.interface import Kernels, Matrix
from moestro.studies._framework import Arm, Budget, Claim, Study, Within
from moestro.studies._native import Shape, decoder, drawn, native, ratios, rows


LAYOUTS = {"half": "f16", "ternary": "t1", "four_bits": "q4", "two_bits": "q2"}
TOKENS = 16


@functools.lru_cache(maxsize=1)
def speeds(seed: int, budget: Budget) -> Mapping[str, Mapping[str, float]]:
    """Times as fast as 16 bits, and bits a weight, by arm.

    Raises:
        ConfigError: the native kernels are not installed.
    """
    kernels = native()
    if kernels is None:
        raise ConfigError("this study times the native kernels; run pip install ./native")
    rng = np.random.default_rng(seed)
    n, k = budget.pick(ci=(64, 512), micro=(3072, 768), full=(3072, 768))
    copies = budget.pick(ci=1, micro=6, full=12)  # so that weights come from memory, not from a cache
    size = budget.pick(
        ci=Shape(hidden=64, inner=64, layers=1, vocab=64), micro=Shape(hidden=512, inner=1024), full=Shape()
    )
    rounds = budget.pick(ci=2, micro=9, full=41)
    matrices = {arm: [drawn(rng, n, k, name) for _ in range(copies)] for arm, name in LAYOUTS.items()}
    found: dict[str, dict[str, float]] = {
        arm: {"bits": 8 * sum(m.nbytes for m in made) / (copies * n * k)} for arm, made in matrices.items()
    }
    for name, count in (("times", 1), ("times_32", 32)):
        x = rng.standard_normal((count, k)).astype(np.float32)
        calls = {arm: functools.partial(_products, kernels, made, x) for arm, made in matrices.items()}
        for arm, times in ratios(calls, rounds, "half").items():
            found[arm][name] = times
    tokens = rng.integers(0, size.vocab, budget.pick(ci=2, micro=6, full=TOKENS))
    whole = {arm: functools.partial(_decode, decoder(size, (name,), kernels), tokens) for arm, name in LAYOUTS.items()}
    for arm, times in ratios(whole, rounds, "half").items():
        found[arm]["whole"] = times
    return found


def _products(kernels: Kernels, matrices: Sequence[Matrix], x: Any) -> None:
    for matrix in matrices:
        kernels.linear(matrix, x)


def _decode(forward: Any, tokens: Any) -> None:
    for at, token in enumerate(tokens):
        forward.step(rows([token], at))


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Speed and bits of a layout."""
    found = speeds(seed, budget)
    return {**found[arm], "over_four_bits": found["four_bits"]["times"] / found[arm]["times"]}


ALL = (
    "times as fast as 16 bits for one token, 32 tokens, and a whole decoder: ternary {ternary.times}, "
    "{ternary.times_32}, {ternary.whole} at {ternary.bits} bits; 4 bits {four_bits.times}, {four_bits.times_32}, "
    "{four_bits.whole}; 2 bits {two_bits.times}, {two_bits.times_32}, {two_bits.whole}. Ternary "
    "takes {ternary.over_four_bits} times as long as 4 bits."
)

STUDY = Study(
    paper="qmoe",
    part="inference",
    title="Products with coded ternary weights",
    setting=(
        "Matrices of 3072 outputs and 768 inputs with 88.5 % zeros, twelve of them in turn; decoders of 2 layers, "
        "width 768, 8 experts of width 2048 and 2 a token, random weights, attention and head in 4 bits; one thread of "
        "a CPU with vectors of 512 bits, 41 rounds. The paper multiplies on GPUs, against bfloat16 in cuBLAS; its code "
        "is a dictionary of words for pairs of symbols, this one's words stand for quadruples, so that strings are "
        "whole bytes."
    ),
    claims=(
        Claim(
            key="product",
            text="A product for one token is faster with coded ternary weights than with 16 bits.",
            where="figure of single layers",
            claimed="up to 35 % faster",
            metric="times",
            judge=Within(arm="ternary", low=1.0),
            tells=ALL,
        ),
        Claim(
            key="whole",
            text="A decoder with coded experts takes at most 1.05 times as long a token as one with 16 bits.",
            where="abstract, section 5.3",
            claimed="less than 5 % slower",
            metric="whole",
            judge=Within(arm="ternary", low=1 / 1.05),
            tells=ALL,
        ),
        Claim(
            key="four_bits",
            text="A product with the code takes at most 1.5 times as long as one with 4 bits.",
            where="not of the paper; the bar is ours",
            claimed="none",
            metric="over_four_bits",
            judge=Within(arm="ternary", high=1.5),
            tells=ALL,
        ),
        Claim(
            key="bits",
            text="All that is stored for a coded matrix is less than 0.807 bits a weight at 88.5 % zeros.",
            where="table 6",
            claimed="0.807 bits at 88.6 %",
            metric="bits",
            judge=Within(arm="ternary", high=0.807),
            tells=ALL,
        ),
    ),
    arms=(
        Arm(name="half", text="16 bits", role="control"),
        Arm(name="ternary", text="three values a row, coded, multiplied from the words"),
        Arm(name="four_bits", text="4 bits", role="reference"),
        Arm(name="two_bits", text="2 bits", role="reference"),
    ),
    run=run,
    methods=("compress.qmoe",),
    units={"times": "times as fast as 16 bits, one token", "whole": "times as fast, a whole decoder",
           "over_four_bits": "times the time of 4 bits", "bits": "bits a weight"},
)  # fmt: skip
