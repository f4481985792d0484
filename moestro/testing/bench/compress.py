"""What packs experts, against other ways to do the same: codes for ternary weights, 4-bit quantisers, bit allocation.

Codes: bits a weight, encoding, decoding, products. Symbols are independent with the share of zeros that QMoE's code is
made for, in rows as wide as its widest. All arms store and give back the same symbols, which is checked before anything
is timed; general compressors work on five trits a byte. Bits are those of codes and of what each row needs to be found,
without the two values that all have alike.

Quantisers: relative error of matrices of normal draws, as they are and with some large inputs, at 4 bits: FineQuant's
adaptive groups and its finest ones, the nearest codes on whole rows, and hqq, the upper reference, whose groups are
twice as long as the finest and take the same bytes. Allocation: MC-MoE's dynamic programme against HiGHS.
"""

import math
import statistics
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.methods.compress._parts.programme import allocate
from moestro.methods.compress.finequant import choose_group_size
from moestro.ops.formats import (
    Packing,
    dequantise,
    format_named,
    pack_rows,
    packed_linear,
    packed_nbytes,
    quantise,
    unpack_rows,
)
from moestro.ops.formats._codebook import codebook, decode, encode
from moestro.testing.bench.harness import Row, interleave, paired_ratio, time_rows
from moestro.testing.peers import half_quadratic


ZEROS = 0.885
ROWS, WIDTH = 4096, 3072
LEVEL = 9
OUT, INTO = 768, 2048  # of a product
FINEST = 32  # weights that share a scale in FineQuant's finest groups
OURS, PAPER = "ours", "the paper's dictionary"


def symbols(rows: int, width: int) -> Tensor:
    """Uint8 [rows, width]."""
    draw = torch.Generator().manual_seed(0)
    sign = torch.randint(1, 3, (rows, width), dtype=torch.uint8, generator=draw)
    return (torch.rand(rows, width, generator=draw) >= ZEROS).to(torch.uint8) * sign


class Store:
    """One arm: ``pack`` turns symbols into anything, ``unpack`` gives them back, ``nbytes`` is what it takes."""

    def __init__(self, pack: Callable[[], Any], unpack: Callable[[Any], Tensor], nbytes: Callable[[Any], int]) -> None:
        self.pack, self.unpack, self.nbytes = pack, unpack, nbytes
        self.packed = pack()


def stores(codes_RI: Tensor) -> dict[str, Store]:
    """Every arm by name."""
    import pyarrow

    rows, width = codes_RI.shape
    zstd = pyarrow.Codec("zstd", compression_level=LEVEL)
    trits, used = format_named("trits"), Packing("trits")
    values = {name: torch.ones(1, rows, 1) for name in ("low", "high")}

    def coded(kind: Any) -> Store:
        book = codebook(kind, round(1000 * ZEROS))

        def unpack(stored: tuple[Tensor, Tensor]) -> Tensor:
            place_N, high_N = decode(*stored, width, book)
            found = torch.zeros(rows * width, dtype=torch.uint8)
            found[place_N] = high_N.to(torch.uint8) + 1
            return found.view(rows, width)

        return Store(partial(encode, codes_RI, book), unpack, lambda stored: 2 * len(stored[0]) + 2 * rows)

    def five() -> Tensor:
        return trits.pack(codes_RI[None], values, used)[0]["codes"][0]

    def one_by_one(codes: Tensor) -> Tensor:
        return trits.unpack({"codes": codes, "low": values["low"], "high": values["high"]}, (rows, width), used)[0]

    def spread(stored: bytes | Any) -> Tensor:
        return one_by_one(torch.frombuffer(bytearray(stored), dtype=torch.uint8).view(rows, -1))

    size = rows * -(-width // 5)
    return {
        OURS: coded("tree"),
        PAPER: coded("pairs"),
        "five trits a byte": Store(five, one_by_one, lambda stored: stored.nbytes),
        "two bits": Store(partial(pack_rows, codes_RI, 2), lambda x: unpack_rows(x, 2, width), lambda x: x.nbytes),
        f"zlib {LEVEL}": Store(
            lambda: zlib.compress(five().numpy().tobytes(), LEVEL), lambda x: spread(zlib.decompress(x)), len
        ),
        f"zstd {LEVEL}": Store(
            lambda: zstd.compress(five().numpy().tobytes(), asbytes=True),
            lambda x: spread(zstd.decompress(x, decompressed_size=size, asbytes=True)),
            len,
        ),
    }


def codecs(rows: int, width: int, rounds: int) -> list[Row]:
    """Bits a weight, and weights a second in both directions, of ours against every other arm."""
    codes_RI = symbols(rows, width)
    arms = stores(codes_RI)
    for name, arm in arms.items():
        assert torch.equal(arm.unpack(arm.packed), codes_RI), name
    case = f"{rows} rows of {width} symbols, {ZEROS:.1%} zeros"
    bits = {name: 8 * arm.nbytes(arm.packed) / codes_RI.numel() for name, arm in arms.items()}
    bits["entropy"] = -ZEROS * math.log2(ZEROS) - (1 - ZEROS) * math.log2((1 - ZEROS) / 2)
    found = [
        Row(case, "size", "bits a weight", bits[OURS], name, size, size / bits[OURS], 0.0)
        for name, size in bits.items()
        if name != OURS
    ]
    gap = bits[PAPER] / bits["entropy"]
    found.append(Row(f"{case}, the paper's dictionary", "size", "bits a weight", bits[PAPER], "entropy",
                     bits["entropy"], 1 / gap, 0.0))  # fmt: skip
    for metric, calls in (
        ("encoding", {name: arm.pack for name, arm in arms.items()}),
        ("decoding", {name: partial(arm.unpack, arm.packed) for name, arm in arms.items()}),
    ):
        seconds = interleave(calls, rounds)
        speed = {name: codes_RI.numel() / statistics.median(taken) / 1e6 for name, taken in seconds.items()}
        found += [
            Row(case, metric, "million weights/s", speed[OURS], name, speed[name], *paired_ratio(taken, seconds[OURS]))
            for name, taken in seconds.items() if name != OURS
        ]  # fmt: skip
    return found


def products(out: int, width: int, rounds: int) -> list[Row]:
    """Time of a product with a coded matrix against the dense one and against one in 2 bits."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(1, out, width, generator=draw)
    packed = {}
    for name, used in (("ours", Packing("ternary", None, "bf16")), ("two bits", Packing("uint2", None, "bf16"))):
        parts, final = quantise(weight, used)
        packed[name] = ({key: part[0] for key, part in parts.items()}, final)
    held = sum(part.nbytes for part in packed["ours"][0].values())
    found = []
    for tokens in (1, 32):
        x = torch.randn(tokens, width, generator=draw)
        calls: dict[str, Callable[[], object]] = {
            name: partial(packed_linear, x, parts, (out, width), used) for name, (parts, used) in packed.items()
        }
        seconds = interleave({**calls, "dense float32": partial(F.linear, x, weight[0])}, rounds * 10, warmup=3)
        case = f"product of {tokens} tokens with a matrix of {out} x {width}"
        mine = statistics.median(seconds["ours"]) * 1e3
        for name in ("dense float32", "two bits"):
            peer = statistics.median(seconds[name]) * 1e3
            found.append(Row(case, "time", "ms", mine, name, peer, *paired_ratio(seconds[name], seconds["ours"])))
    memory = Row(f"a matrix of {out} x {width}", "memory", "kB", held / 1e3, "dense float32", weight.nbytes / 1e3,
                 weight.nbytes / held, 0.0)  # fmt: skip
    return [*found, memory]


def matrices(count: int, out: int, width: int, outliers: int) -> list[Tensor]:
    """Normal draws [out, width], in each the columns of some inputs 50 times as large."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        weight = torch.randn(out, width, generator=draw)
        weight[:, torch.randperm(width, generator=draw)[:outliers]] *= 50
        found.append(weight)
    return found


def nearest_codes(weight: Tensor, group: int | None) -> tuple[Tensor, int]:
    """What the nearest 4-bit codes stand for, and their bytes."""
    used = Packing("int4", group, "f16")
    parts, final = quantise(weight[None], used)
    return dequantise(parts, (weight.shape[0], weight.shape[1]), final)[0], packed_nbytes(tuple(weight.shape), final)


def quantisers(count: int, out: int, width: int, rounds: int) -> list[Row]:
    """Error, bytes and time of 4-bit quantisers. Errors leave the large columns out: they would drown the others."""
    fine, large = FINEST, 10.0
    arms: dict[str, Callable[[Tensor], tuple[Tensor, int]]] = {
        "ours": lambda weight: nearest_codes(weight, choose_group_size(weight, sizes=(4 * fine, 2 * fine, fine)).size),
        "whole rows": partial(nearest_codes, group=None),
        f"groups of {fine}": partial(nearest_codes, group=fine),
        "hqq": partial(half_quadratic, bits=4, group=2 * fine),
    }
    found = []
    for outliers in (0, 4):
        weights = matrices(count, out, width, outliers)
        case = f"{count} matrices of {out} x {width} in 4 bits, {outliers} large inputs"
        error, bits = {}, {}
        for name, arm in arms.items():
            pairs = [(weight, *arm(weight)) for weight in weights]
            plain = [weight.abs().amax(0) < large for weight in weights]
            gaps = [((v - w)[:, p].norm() / w[:, p].norm()).item() for (w, v, _), p in zip(pairs, plain, strict=True)]
            error[name] = statistics.mean(gaps)
            bits[name] = 8 * sum(size for _, _, size in pairs) / (count * out * width)
        calls = {name: partial(_each, arm, weights) for name, arm in arms.items()}
        seconds = interleave(calls, rounds)
        for metric, unit, of in (("relative error", "share", error), ("size", "bits a weight", bits)):
            found += [
                Row(case, metric, unit, of["ours"], name, of[name], of[name] / of["ours"], 0.0)
                for name in arms if name != "ours"
            ]  # fmt: skip
        found += time_rows(case, "time", seconds)
    return found


def _each(arm: Callable[[Tensor], object], weights: list[Tensor]) -> None:
    for weight in weights:
        arm(weight)


def allocations(experts: int, rounds: int) -> list[Row]:
    """Time of the exact programme of one layer, 2 bits on average, and of HiGHS, which finds the same optimum."""
    cost_EJ = np.random.default_rng(0).random((experts, 3)) * [9.0, 3.0, 1.0]
    least = [0, 1, 1]
    ours = partial(allocate, cost_EJ, (1, 2, 3), 2 * experts, exact=True, least_J=least)
    best = sum(cost_EJ[expert, place] for expert, place in enumerate(ours()))
    other = by_highs(cost_EJ, (1, 2, 3), 2 * experts, least)
    assert math.isclose(best, other, rel_tol=1e-6), (best, other)
    seconds = interleave({"ours": ours, "HiGHS": partial(by_highs, cost_EJ, (1, 2, 3), 2 * experts, least)}, rounds)
    return time_rows(f"bits for {experts} experts of a layer", "time", seconds)


def by_highs(cost_EJ: np.ndarray, widths: tuple[int, ...], budget: int, least_J: list[int]) -> float:
    """The least cost by SciPy's mixed-integer solver."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    experts, count = cost_EJ.shape
    rules = [
        LinearConstraint(np.kron(np.eye(experts), np.ones(count)), 1, 1),
        LinearConstraint(np.tile(widths, experts), budget, budget),
        LinearConstraint(np.tile(np.eye(count), experts), least_J, np.inf),
    ]
    found = milp(cost_EJ.ravel(), constraints=rules, integrality=1, bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0})
    return float(found.fun)


def run(rounds: int) -> list[Row]:
    """All cases."""
    return [
        *codecs(ROWS, WIDTH, rounds),
        *products(OUT, INTO, rounds),
        *quantisers(4, 512, 1024, rounds),
        *allocations(256, rounds),
    ]
