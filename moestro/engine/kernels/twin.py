"""The steps in numpy: the arithmetic of the native kernels, readable, and what runs where the wheel is missing.

Integer sums are exact as there; the last bit of a float may differ (numpy's own order of sums, a fused multiply-add
rounded through float64).
"""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from moestro.engine import ternary
from moestro.engine.kernels.interface import (
    CODE_BYTES,
    GROUP,
    LANES,
    OFFSETS,
    Addresses,
    Description,
    Floats,
    Ints,
    Matrix,
    Router,
    Steps,
)


SMALLEST = np.float32(1.17549435e-38)  # a subnormal scale counts as zero


def raw(matrix: Matrix, slab: int = 0) -> npt.NDArray[np.uint8]:
    """The bytes of a matrix; of one inside a slab, from the slab's address."""
    if matrix.data is not None:
        return matrix.data[: matrix.nbytes]
    memory = (ctypes.c_uint8 * matrix.nbytes).from_address(slab + matrix.offset)
    return np.frombuffer(memory, dtype=np.uint8)


def spread(plane: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.uint8]:
    """Bytes [..., S] of a plane -> the S * (8 / width) values it holds, low bits first."""
    parts = [(plane >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)]
    return np.concatenate(parts, axis=-1)[..., :1024]


def codes_of(layout: str, block: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """[..., block bytes] -> the 1024 codes of each block, in stored order."""
    if layout == "q8":
        return block[..., :1024]
    if layout == "q4":
        return spread(block[..., :512], 4)
    if layout in ("q1", "s1"):
        return spread(block[..., :128], 1)
    low = spread(block[..., :256], 2)
    return low if layout == "q2" else low | spread(block[..., 256:384], 1) << 2


def unpacked(matrix: Matrix, slab: int = 0) -> tuple[Floats, Floats]:
    """(codes minus what stands for zero [G, N, 64], scales [G, N]) of a quantised matrix, padded, as float32."""
    rows, groups = -(-matrix.n // LANES), -(-matrix.k // GROUP)
    block = raw(matrix, slab).reshape(rows, groups, matrix.block_bytes)
    size = CODE_BYTES[matrix.layout]
    stored = codes_of(matrix.layout, block).reshape(rows, groups, 16, LANES, 4)
    codes = stored.transpose(1, 0, 3, 2, 4).reshape(groups, rows * LANES, GROUP).astype(np.float32)
    scale = np.ascontiguousarray(block[..., size : size + 32]).view(np.float16).astype(np.float32)
    scale = scale.transpose(1, 0, 2).reshape(groups, rows * LANES)
    if matrix.layout in OFFSETS:
        return codes - np.float32(OFFSETS[matrix.layout]), scale
    if matrix.layout == "s1":
        return 2 * codes - 1, scale
    zero = block[..., size + 32 :].transpose(1, 0, 2).reshape(groups, rows * LANES).astype(np.float32)
    return codes - zero[..., None], scale


def floats(matrix: Matrix, slab: int = 0) -> Floats:
    """float32 [N, K] of a matrix in any layout."""
    if matrix.words is not None:
        return ternary.unpack(raw(matrix, slab), matrix.n, matrix.k, matrix.words)
    if matrix.layout in CODE_BYTES:
        codes, scale = unpacked(matrix, slab)
        wide = (codes * scale[..., None]).transpose(1, 0, 2).reshape(codes.shape[1], -1)
        return wide[: matrix.n, : matrix.k]
    dtype = np.float32 if matrix.layout == "f32" else np.float16
    stored = raw(matrix, slab).view(dtype).reshape(-1, matrix.k, LANES)
    return stored.transpose(0, 2, 1).reshape(-1, matrix.k)[: matrix.n].astype(np.float32)


def quantise(x: Floats) -> tuple[Floats, Floats]:
    """Rows [R, K] -> (integer codes [R, G, 64] as float32, scales [R, G])."""
    rows, k = x.shape
    padded = np.zeros((rows, -(-k // GROUP) * GROUP), dtype=np.float32)
    padded[:, :k] = x
    part = padded.reshape(rows, -1, GROUP)
    scale = np.abs(part).max(-1) / np.float32(127)
    scale = np.where(scale < SMALLEST, np.float32(0), scale)
    safe = np.where(scale > 0, scale, np.float32(1))[..., None]
    return np.where(scale[..., None] > 0, np.rint(part / safe), np.float32(0)).astype(np.float32), scale


def linear(matrix: Matrix, x: Floats, slab: int = 0) -> Floats:
    """x [R, K] -> x W^T [R, N]."""
    if matrix.words is not None:
        return _ternary(matrix, x, slab)
    if matrix.layout not in CODE_BYTES:
        return x @ floats(matrix, slab).T
    codes, scale = unpacked(matrix, slab)
    xq, sx = quantise(x)
    y = np.zeros((x.shape[0], codes.shape[1]), dtype=np.float32)
    for group in range(codes.shape[0]):
        exact = xq[:, group] @ codes[group].T  # below 2^24: float32 holds the integers
        factor = sx[:, group, None] * scale[group][None]
        y = (exact.astype(np.float64) * factor + y).astype(np.float32)
    return y[:, : matrix.n]


def _ternary(matrix: Matrix, x: Floats, slab: int) -> Floats:
    """A product with three values a row: of each group first the high symbols are added, then the low ones."""
    assert matrix.words is not None
    data, groups = raw(matrix, slab), -(-matrix.k // GROUP)
    low, high, _, _ = ternary.parts(data, matrix.n)
    codes = np.zeros((matrix.n, groups * GROUP), dtype=np.uint8)
    codes[:, : matrix.k] = ternary.symbols(data, matrix.n, matrix.k, matrix.words)
    xq, sx = quantise(x)
    y = np.zeros((x.shape[0], matrix.n), dtype=np.float32)
    for group in range(groups):
        part = codes[:, group * GROUP : (group + 1) * GROUP]
        for symbol, value in ((2, high), (1, low)):
            exact = xq[:, group] @ (part == symbol).T.astype(np.float32)
            y = (exact.astype(np.float64) * (sx[:, group, None] * value[None]) + y).astype(np.float32)
    return y


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + e^-x)."""
    with np.errstate(over="ignore"):
        return np.float32(1) / (np.float32(1) + np.exp(-x))


def activate(name: str, x: Floats) -> Floats:
    """An activation of the interface."""
    if name == "silu":
        return x * sigmoid(x)
    if name == "relu":
        return np.maximum(x, np.float32(0))
    if name == "gelu_tanh":
        return x * sigmoid(np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x))
    if name == "gelu":
        t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * np.abs(x / np.float32(np.sqrt(2))))
        p = np.polyval(np.array([1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0], np.float32), t)
        erf = np.sign(x) * (1 - p * np.exp(-x * x / 2))
        return (0.5 * x * (1 + erf)).astype(np.float32)
    return x


def softmax(x: Floats) -> Floats:
    """Along the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def best(values: Floats, k: int) -> Ints:
    """Ids of the k highest, best first, equal ones by lower id; [..., k] int32."""
    return np.argsort(-values, axis=-1, kind="stable")[..., :k].astype(np.int32)


def ranked(router: Router, logits: Floats) -> Floats:
    """What the router ranks, [R, E], from its logits [R, E]; minus infinity in closed groups."""
    rank = sigmoid(logits) if router.kind == "sigmoid_bias" else logits
    if router.select_bias is not None:
        rank = rank + router.select_bias
    if router.groups > router.top_groups:
        parts = rank.reshape(len(rank), router.groups, -1)
        score = np.sort(parts, axis=-1)[..., -2:].sum(-1)
        kept = np.zeros(score.shape, dtype=bool)
        np.put_along_axis(kept, best(score, router.top_groups), True, axis=-1)
        rank = np.where(kept[..., None], parts, np.float32(-np.inf)).reshape(rank.shape)
    return rank


def choose(router: Router, logits: Floats) -> tuple[Ints, Floats]:
    """Logits [R, E] -> (ids [R, k], weights [R, k])."""
    gate = logits
    if router.kind != "topk_softmax":
        gate = sigmoid(logits) if router.kind == "sigmoid_bias" else softmax(logits)
    ids = best(ranked(router, logits), router.top_k)
    weights = np.take_along_axis(gate, ids, axis=-1)
    if router.kind == "topk_softmax":
        weights = softmax(weights)
    if router.renormalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return ids, (weights * np.float32(router.scale)).astype(np.float32)


class TwinKernels:
    """Kernels in numpy."""

    name = "twin"

    def features(self) -> dict[str, Any]:
        """What runs."""
        return {"isa": "numpy", "available": ["numpy"]}

    def linear(self, matrix: Matrix, x: Floats) -> Floats:
        """x [R, K] -> x W^T [R, N]."""
        return linear(matrix, x)

    def build(
        self, description: Description, *, pages: int, threads: int, slabs: dict[int, Addresses] | None = None
    ) -> Steps:
        """Steps over a cache of ``pages`` pages; ``threads`` is numpy's own affair."""
        from moestro.engine.kernels.twin_steps import TwinSteps

        return TwinSteps(description, pages, slabs or {})
