"""Experts of few bits in the native kernels: what a layer's products cost for one token, and for 32.

A layer has experts of ``INNER`` units on ``HIDDEN`` inputs; a token takes ``CHOSEN`` of them, others in each round. All
arms multiply the same activations with the same weights as their layout holds them, on one thread; what counts is the
thread's processor time, so that neighbours on the machine matter little. ``mixed`` is what MC-MoE's programme gives at
2.5 bits: one expert in eight with 1 bit, two with 2 bits, five with 3 bits. ``ternary`` is QMoE's code, multiplied from
its words.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from moestro.core.errors import ConfigError
from moestro.engine import layout as layouts
from moestro.engine import pack_ternary
from moestro.engine.kernels import choose
from moestro.engine.kernels.interface import Kernels, Matrix
from moestro.testing.bench.harness import Row, interleave, time_rows


HIDDEN, INNER, EXPERTS, CHOSEN = 1024, 512, 16, 8
ZEROS = 0.885
MIXED = ("s1", "q2", "q2", "q3", "q3", "q3", "q3", "q3")
ARMS: Mapping[str, Sequence[str]] = {
    "fp32": ("f32",), "8 bits": ("q8",), "4 bits": ("q4",), "3 bits": ("q3",), "mixed 2.5 bits": MIXED,
    "2 bits": ("q2",), "ternary": ("t1",), "1 bit": ("s1",),
}  # fmt: skip


def symbols_of(weight: Any) -> tuple[Any, Any, Any]:
    """Three values a row, the share ``ZEROS`` of the weights 0: symbols, low and high values in bfloat16."""
    edge = np.quantile(np.abs(weight), ZEROS)
    symbols = np.where(weight > edge, 2, np.where(weight < -edge, 1, 0)).astype(np.uint8)
    value = (np.abs(weight).max(1).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    return symbols, -value, value


def matrix_of(weight: Any, layout: str) -> Matrix:
    """A matrix in a layout."""
    if layout == "t1":
        zeros = pack_ternary.nearest_zeros(ZEROS)
        data = pack_ternary.pack(*symbols_of(weight), zeros)
        place = layouts.aligned(len(data))
        place[:] = data
        return Matrix(layout, *weight.shape, place, size=len(data), words=pack_ternary.book(zeros).table)
    return Matrix(layout, *weight.shape, layouts.pack(weight, layout))


class Bank:
    """The experts of a layer in one arm's layouts."""

    def __init__(self, kernels: Kernels, names: Sequence[str]) -> None:
        self.kernels = kernels
        self.experts = []
        for expert in range(EXPERTS):
            draw = np.random.default_rng(expert)
            shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
            weights = [(draw.standard_normal(shape) * 0.02).astype(np.float32) for shape in shapes]
            self.experts.append([matrix_of(weight, names[expert % len(names)]) for weight in weights])

    @property
    def bits(self) -> float:
        """Stored bits a weight, scales and all."""
        return 8 * sum(m.nbytes for expert in self.experts for m in expert) / (EXPERTS * 3 * HIDDEN * INNER)

    def run(self, chosen: Sequence[int], x: Any, h: Any) -> None:
        """The products of some experts."""
        for expert in chosen:
            gate, up, down = self.experts[expert]
            self.kernels.linear(gate, x)
            self.kernels.linear(up, x)
            self.kernels.linear(down, h)


def run(rounds: int) -> list[Row]:
    """Ratios of each layout against 4 bits and float32.

    Raises:
        ConfigError: the native kernels are not installed.
    """
    kernels = choose("native")
    if kernels.name != "native":
        raise ConfigError("this benchmark times the native kernels; run pip install ./native")
    banks = {name: Bank(kernels, used) for name, used in ARMS.items()}
    draw = np.random.default_rng(0)
    found = []
    for tokens in (1, 32):
        x, h = (draw.standard_normal((tokens, width)).astype(np.float32) for width in (HIDDEN, INNER))
        orders = iter([draw.permutation(EXPERTS)[:CHOSEN].tolist() for _ in range((rounds + 1) * len(ARMS))])
        arms = {name: partial(_timed, bank, orders, x, h) for name, bank in banks.items()}
        seconds = interleave(arms, rounds, clock=time.thread_time)
        for name in ARMS:
            peers = {other: seconds[other] for other in ("4 bits", "fp32") if other != name}
            case = f"{CHOSEN} experts [{INNER}, {HIDDEN}], {tokens} token{'s' * (tokens > 1)}"
            label = f"{name}, {banks[name].bits:.2f} bits stored"
            if name != "fp32":
                found += time_rows(case, label, {name: seconds[name], **peers}, ours=name)
    return found


def _timed(bank: Bank, orders: Any, x: Any, h: Any) -> None:
    bank.run(next(orders), x, h)
