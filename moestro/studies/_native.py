"""Decoders of random weights in the engine's layouts, and what a token costs in them: for studies of speed.

Weights are random codes, so that nothing has to be trained or rounded: the kernels' work does not depend on them. What
counts is processor time on one thread, arms in turns within a round, in an order that rotates.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from moestro.engine import layout as layouts
from moestro.engine import pack_ternary
from moestro.engine.kernels import choose
from moestro.engine.kernels.interface import Attention, Description, Ffn, Kernels, Layer, Matrix, Router
from moestro.engine.native_forward import NativeForward


ZEROS = 0.885
"""Of ternary weights: the paper's design point."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    hidden: int = 768
    inner: int = 2048
    experts: int = 8
    top_k: int = 2
    layers: int = 2
    head_dim: int = 64
    vocab: int = 1024


def drawn(rng: np.random.Generator, n: int, k: int, name: str) -> Matrix:
    """A matrix [n, k] of random codes."""
    if name == "t1":
        symbols = (rng.random((n, k), dtype=np.float32) >= ZEROS).astype(np.uint8)
        symbols *= rng.integers(1, 3, (n, k), dtype=np.uint8)
        zeros, value = pack_ternary.nearest_zeros(ZEROS), np.full(n, 0.0625, np.float32)
        data = pack_ternary.pack(symbols, -value, value, zeros)
        place = layouts.aligned(len(data))
        place[:] = data
        return Matrix(name, n, k, place, size=len(data), words=pack_ternary.book(zeros).table)
    place = layouts.aligned(layouts.matrix_bytes(name, n, k))
    if name in layouts.FLOATS:
        values = place.view(layouts.FLOATS[name])
        values[:] = (rng.standard_normal(values.size, dtype=np.float32) / np.sqrt(k)).astype(values.dtype)
        return Matrix(name, n, k, place)
    block = place.reshape(-1, layouts.block_bytes(name))
    codes = layouts.PLACES * layouts.BITS[name] // 8
    block[:, :codes] = rng.integers(0, 256, (len(block), codes), dtype=np.uint8)
    middle = {"s1": 1.0, "q1": 0.5}.get(name, 0.6 * (1 << layouts.BITS[name]) / 2)
    block[:, codes : codes + 32] = np.full((len(block), 16), 1 / (middle * np.sqrt(k)), np.float16).view(np.uint8)
    block[:, codes + 32 :] = 1 << (layouts.BITS[name] - 1)
    return Matrix(name, n, k, place)


def decoder(shape: Shape, names: Sequence[str], kernels: Kernels, pages: int = 16) -> NativeForward:
    """A decoder whose expert e has the layout ``names[e % len(names)]``, everything else in 4 bits; all resident."""
    rng = np.random.default_rng(0)

    def four(n: int, k: int) -> Matrix:
        return drawn(rng, n, k, "q4")

    def norm() -> Any:
        return np.ones(shape.hidden, np.float32)

    layers, addresses, kept = [], {}, []
    for index in range(shape.layers):
        bank = [
            [drawn(rng, n, k, names[expert % len(names)]) for n, k in (
                (shape.inner, shape.hidden), (shape.inner, shape.hidden), (shape.hidden, shape.inner))]
            for expert in range(shape.experts)
        ]  # fmt: skip
        kinds = [_placed(matrices) for matrices in bank]
        slabs = [_slab(matrices) for matrices in bank]
        kept.append(slabs)
        addresses[index] = np.array([slab.ctypes.data for slab in slabs], np.int64)
        router = Router("softmax_topk", shape.top_k, drawn(rng, shape.experts, shape.hidden, "f32"), renormalise=True)
        q, k, v, o = (four(shape.hidden, shape.hidden) for _ in range(4))
        attention = Attention(q, k, v, o, scale=shape.head_dim**-0.5)
        layers.append(
            Layer(norm(), norm(), attention, router, shape.experts, kinds[0], kinds, list(range(shape.experts)))
        )
    embedding = drawn(rng, shape.vocab, shape.hidden, "f32")
    heads = shape.hidden // shape.head_dim
    half = shape.head_dim // 2
    description = Description(
        shape.hidden, heads, heads, shape.head_dim, shape.vocab, embedding, four(shape.vocab, shape.hidden), norm(),
        layers, [(10000.0 ** (-np.arange(half) / half)).astype(np.float32)], keep=kept,
    )  # fmt: skip
    return NativeForward(description, pages=pages, slabs=addresses, kernels=kernels, threads=1)


def _placed(matrices: Sequence[Matrix]) -> Ffn:
    found, at = [], 0
    for one in matrices:
        found.append(Matrix(one.layout, one.n, one.k, None, at, one.size, one.words))
        at += -(-one.nbytes // 64) * 64
    gate, up, down = found
    return Ffn(up, down, gate)


def _slab(matrices: Sequence[Matrix]) -> Any:
    slab = layouts.aligned(sum(-(-one.nbytes // 64) * 64 for one in matrices))
    at = 0
    for one in matrices:
        assert one.data is not None
        slab[at : at + one.nbytes] = one.data[: one.nbytes]
        at += -(-one.nbytes // 64) * 64
    return slab


def rows(tokens: Any, start: int, route: int = 0) -> Any:
    """Rows of one text from a position on."""
    count = len(tokens)
    return SimpleNamespace(
        tokens=np.asarray(tokens, np.int32), positions=np.arange(start, start + count, dtype=np.int32),
        rows_of=np.zeros(count, np.int32), sequences=[0], tables=np.arange(16, dtype=np.int32)[None],
        want=np.array([count - 1], np.int32), routes=np.full(count, route, np.int32) if route else None,
    )  # fmt: skip


def native() -> Kernels | None:
    """The native kernels, None where they are not installed."""
    found = choose()
    return found if found.name == "native" else None


def ratios(calls: Mapping[str, Callable[[], object]], rounds: int, against: str) -> dict[str, float]:
    """How many times the processor time of each call that of ``against`` is: the median over rounds."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-1, rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            start = time.process_time()
            calls[name]()
            if round_ >= 0:
                seconds[name].append(time.process_time() - start)
    return {
        name: statistics.median(a / b for a, b in zip(seconds[against], taken, strict=True))
        for name, taken in seconds.items()
    }
