"""Codes for ternary weights: bits a weight, encoding, decoding, products, against other ways of storing the same.

Symbols are independent with the share of zeros that QMoE's code is made for, in rows as wide as its widest. All arms
store and give back the same symbols, which is checked before anything is timed; general compressors work on five trits
a byte. Bits are those of codes and of what each row needs to be found, without the two values that all have alike.
"""

import math
import statistics
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.ops.formats import Packing, format_named, pack_rows, packed_linear, quantise, unpack_rows
from moestro.ops.formats._codebook import codebook, decode, encode
from moestro.testing.bench.harness import Row, interleave, paired_ratio


ZEROS = 0.885
ROWS, WIDTH = 4096, 3072
LEVEL = 9
OUT, INTO = 768, 2048  # of a product
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


def run(rounds: int) -> list[Row]:
    """All cases."""
    return codecs(ROWS, WIDTH, rounds) + products(OUT, INTO, rounds)
