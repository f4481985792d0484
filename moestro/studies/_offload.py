"""A packed model whose experts come from a slow tier: the same code as in service, reading and computing paced.

Slabs of small models are read as if they had ``nominal`` bytes at a given rate, one after another (one reader), and
every mixture takes a given time to compute, so that reading over computing is what it is on a machine with large
experts. All that waits, hides, evicts and decides is the engine's own.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moestro.core.errors import ConfigError
from moestro.core.forecast import Forecast
from moestro.core.registry import method
from moestro.engine.describe import describe
from moestro.engine.kernels import choose
from moestro.engine.kernels.interface import LANES, Floats, Ints
from moestro.engine.native_forward import NativeForward
from moestro.engine.packed import Packed
from moestro.engine.slabs import load_all
from moestro.engine.store import ExpertStore


@dataclass(frozen=True)
class Pace:
    """Attributes: nominal: bytes an expert stands for. compute_s: seconds a mixture and all before it take. busy: a
    processor works for these seconds and copies are made, where otherwise both sleep."""

    nominal: float
    compute_s: float
    busy: bool = False


class Tier:
    """Stands in for ``os.preadv``: a token bucket of ``rate`` bytes/s, filled by one slab at most.

    Attributes:
        reads: slabs that were read.
    """

    def __init__(self, pace: Pace, rate: float) -> None:
        self.pace, self.seconds = pace, pace.nominal / rate
        self.reads, self._free = 0, 0.0
        self._from = np.ones(int(pace.nominal) if pace.busy else 1, np.uint8)
        self._to = self._from.copy()

    def __call__(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        """Read, not before the time is up."""
        self._free = max(time.monotonic(), self._free) + self.seconds
        if self.pace.busy:
            np.copyto(self._to, self._from)
        count = os.preadv(descriptor, buffers, offset)
        self.reads += 1
        time.sleep(max(0.0, self._free - time.monotonic()))
        return count


@dataclass(frozen=True)
class Ran:
    """A stretch of text, token by token.

    Attributes:
        logits: float32 [T, V]. seconds: of all tokens. waited_s: of them for slabs. reads: slabs. wasted: of them read
            ahead and evicted unused. peak: most slabs in memory at a time.
    """

    logits: Floats
    seconds: float
    waited_s: float
    reads: int
    wasted: int
    peak: int

    @property
    def tokens_s(self) -> float:
        """Tokens a second."""
        return len(self.logits) / self.seconds


def work(seconds: float, busy: bool) -> None:
    """Let time go by, asleep or with products of small matrices."""
    if not busy:
        time.sleep(seconds)
        return
    until, square = time.perf_counter() + seconds, np.ones((64, 64), np.float32)
    while time.perf_counter() < until:
        square = np.maximum(square @ square, 1.0) / 4096


def reads_ahead(method_id: str | None, **config: Any) -> Forecast | None:
    """A forecast by method id."""
    if method_id is None:
        return None
    use = method(method_id)
    found: Forecast = use.entry("forecast")(use.configure(config))
    return found


def play(
    packed: Packed,
    ids: Sequence[int],
    pace: Pace,
    *,
    rate: float | None = None,
    slots: int = 0,
    forecast: Forecast | None = None,
) -> Ran:
    """Feed recorded tokens one by one.

    Args:
        rate: bytes a second of the tier; None: all experts are in memory. slots: experts that memory holds.
    """
    sizes = {there.stride for there in packed.experts.values()}
    if len(sizes) != 1:
        raise ConfigError(f"experts of {len(sizes)} sizes; this bench counts slots")
    stride = sizes.pop()
    description = describe(packed, packed.resident())
    pages = -(-len(ids) // LANES)
    if rate is None:
        kept, slabs = load_all(packed)
        one = NativeForward(description, pages=pages, slabs=slabs, kernels=choose("twin"), threads=1)
        logits, seconds = _feed(one, ids, pages, pace, lambda: None)
        for slot in kept:
            slot.free()
        return Ran(logits, seconds, 0.0, 0, 0, experts_of(packed))
    lru = method("serve.lru")
    policy = lru.entry("policy")(lru.configure({}))
    tier = Tier(pace, rate)
    with ExpertStore(packed, slots * stride, policy, readers=1, read=tier) as store:
        one = NativeForward(description, pages=pages, store=store, forecast=forecast, kernels=choose("twin"), threads=1)
        peak = 0

        def look() -> None:
            nonlocal peak
            peak = max(peak, store.cache.used // stride)

        logits, seconds = _feed(one, ids, pages, pace, look)
        counters = store.counters
        return Ran(logits, seconds, counters.waited_s, tier.reads, counters.wasted // stride, peak)


def experts_of(packed: Packed) -> int:
    """Experts of all layers."""
    return sum(there.num for there in packed.experts.values())


def _feed(
    one: NativeForward, ids: Sequence[int], pages: int, pace: Pace, look: Callable[[], None]
) -> tuple[Floats, float]:
    def routed(layer: int, experts: Ints, weights: Floats) -> None:
        look()
        work(pace.compute_s, pace.busy)

    one.on_route = routed
    logits, started = [], time.perf_counter()
    for position, token in enumerate(ids):
        logits.append(one.step(_Row(token, position, pages))[0])
    seconds = time.perf_counter() - started
    return np.stack(logits), seconds


class _Row:
    """One token of one sequence."""

    def __init__(self, token: int, position: int, pages: int) -> None:
        self.tokens = np.array([token], np.int32)
        self.positions = np.array([position], np.int32)
        self.rows_of = self.want = np.zeros(1, np.int32)
        self.tables = np.arange(pages, dtype=np.int32)[None]
        self.sequences: Sequence[int] = [0]
        self.routes: Ints | None = None


# -- the formulas ---------------------------------------------------------------------------------------------------


def token_seconds(way: str, blocks: int, compute_s: float, read_s: float, experts: int) -> float:
    """Seconds a token of one active expert a mixture, by the paper's formulas for a block; the first one waits.

    Args:
        way: resident, on_demand, prefetch_all or pre_gated. compute_s: of a block. read_s: of an expert. experts: E.
    """
    first = compute_s + read_s
    if way == "resident":
        return blocks * compute_s
    if way == "on_demand":
        return blocks * first
    other = max(compute_s, experts * read_s if way == "prefetch_all" else read_s)
    return first + (blocks - 1) * other
