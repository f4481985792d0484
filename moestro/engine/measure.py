"""Measuring the engine: whole steps over models made up for it, and slabs read by a store.

Large models' matrices do not fit into caches, so that threads and memory are in their rates; models of almost no
weights show what a step, a layer and a mixture cost beside them. Arms that are compared take turns, and a figure is the
median over passes, as in the runs that predictions are checked with: not the best, which nobody gets.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from moestro.engine.acting import POLICY, cache_and_forecast
from moestro.engine.kernels.interface import LANES, Attention, Description, Ffn, Layer, Matrix, Router
from moestro.engine.layout import Bytes, aligned, matrix_bytes
from moestro.engine.native_forward import NativeForward
from moestro.engine.packed import EXPERTS, PAGE, Packed
from moestro.engine.packed_index import LayerSlabs
from moestro.engine.profile import ROWS, Attend, Cost, Disk, Profile, pairs
from moestro.engine.sequences import Batch
from moestro.engine.store import ExpertStore
from moestro.engine.ternary import CODED, Table


WINDOW: Final = 8
"""Steps of one row in a pass: misses and interruptions of single steps even out."""

MANY: Final = ROWS[-1]

_CLOCK = time.perf_counter
_BUDGET_S = 0.3
_PASS_S = 0.02
_LEAST = 5
_BYTES = 192 << 20  # of made-up matrices: more than a processor keeps to itself
_WIDTH = 64
_HEADS = (16, 64)
_LAYERS = (2, 10)
_MOST_LAYERS = 16
_EXPERTS = 16
_CHOSEN = (2, 8)
_ZEROS = 660  # in a thousand symbols of a ternary matrix

Step = Callable[[], object]


def typical(arms: Sequence[Step], each: int, *, passes: int = _LEAST, seconds: float = 0.0) -> list[float]:
    """Seconds of a step of every arm: medians over passes, in which arms take turns.

    A pass is long enough that whatever else the machine does is spread over it.

    Args:
        each: steps of a pass at least. passes: at least so many. seconds: and at least so long.
    """
    sizes = []
    for step in arms:
        step()
        started = _CLOCK()
        step()
        sizes.append(max(each, math.ceil(_PASS_S / max(_CLOCK() - started, 1e-6))))
    found: list[list[float]] = [[] for _ in arms]
    end = _CLOCK() + seconds
    while len(found[-1]) < passes or _CLOCK() < end:
        for step, size, taken in zip(arms, sizes, found, strict=True):
            started = _CLOCK()
            for _ in range(size):
                step()
            taken.append((_CLOCK() - started) / size)
    return [statistics.median(taken) for taken in found]


def attention(threads: int) -> dict[str, Attend]:
    """What later rows of a text take longer than its first ones, by heads of few and of many dimensions.

    One row reads keys and values from memory; many rows share what was read.
    """
    found = {}
    for name, rows, layers, later in (("one", 1, 16, 2 * MANY - 1), ("many", MANY, 2, MANY)):
        arms = []
        for dim in _HEADS:
            forward = _forward(_dense("q8", _WIDTH, _WIDTH, layers, heads=16, kv_heads=4, dim=dim), 2 * MANY, threads)
            for start in range(0, later, MANY):
                _step(forward, min(MANY, later - start), start)()
            arms += [_step(forward, rows, start) for start in (0, later)]
        taken = typical(arms, _each(rows), seconds=4 * _BUDGET_S)
        looks = 16 * layers * (pairs(rows, later) - pairs(rows, 0))
        small, large = (max(late - early, 0.0) / looks for early, late in zip(taken[::2], taken[1::2], strict=True))
        product = max(large - small, large / 4) / (2 * (_HEADS[1] - _HEADS[0]))
        found[name] = Attend(look_s=max(large - 2 * _HEADS[1] * product, 0.0), product_s=product)
    return found


def rates(layout: str, threads: int, profile: Profile) -> dict[int, float]:
    """Rows -> weights a second; of the profile the rates of attention are used.

    Few rows wait for memory and get more matrices than caches hold; many compute, and two layers will do.
    """
    hidden, inner, fewest = 1024, 4096, 2
    each = 4 * hidden * hidden + 3 * hidden * inner
    layers = round(_BYTES * hidden * hidden / _matrix(layout, hidden, hidden).nbytes / each)
    tall = _dense(layout, hidden, inner, min(max(fewest, layers), _MOST_LAYERS), heads=hidden // _WIDTH)
    found = {}
    for description, part in ((tall, ROWS[:4]), (replace(tall, layers=tall.layers[:fewest]), ROWS[4:])):
        forward, count = _forward(description, MANY, threads), len(description.layers)
        for rows in part:
            (taken,) = typical([_step(forward, rows)], _each(rows), seconds=_BUDGET_S)
            aside = profile.attending(count * hidden // _WIDTH * pairs(rows, 0), _WIDTH, rows)
            found[rows] = count * each / max(taken - aside, taken / 4)
    return found


def costs(threads: int, profile: Profile) -> dict[str, Cost]:
    """What a step, a layer, a mixture in memory and one from a store that always hits cost beside their weights.

    Of the profile the rates of attention and of q8 are used.
    """
    few, many = _LAYERS
    ends: dict[str, list[float]] = {"step": [], "layer": []}
    tall: dict[int, float] = {}
    mixed: dict[str, list[float]] = {"resident": [], "stored": []}
    for rows, chosen in ((1, _CHOSEN), (MANY, _CHOSEN[:1])):
        with _arms(rows, chosen, threads) as arms:
            taken = dict(zip(arms, typical(list(arms.values()), _each(rows), seconds=2 * _BUDGET_S), strict=True))
        layer = max(taken["many"] - taken["few"], 0.0) / (many - few)
        ends["step"].append(max(taken["few"] - few * layer, 0.0))
        weights = profile.seconds(7 * _WIDTH * _WIDTH, rows, "q8")
        ends["layer"].append(max(layer - weights - profile.attending(pairs(rows, 0), _WIDTH, rows), 0.0))
        tall[rows] = taken["many"]
        for kind, found in mixed.items():
            for top_k in chosen:
                met = min(_EXPERTS, rows * top_k)
                own = profile.seconds(met * 3 * _WIDTH * _WIDTH, rows * top_k / met, "q8")
                found.append(max((taken[f"{kind} {top_k}"] - tall[rows]) / many - own, 0.0))
    return {
        **{name: _by_rows(*both) for name, both in ends.items()},
        **{kind: _by_choices(*three) for kind, three in mixed.items()},
    }


def disk(packed: Packed, most: int, seconds: float = 4 * _BUDGET_S) -> Disk:
    """How long a store waits for slabs of a layer that are away: for one, and for some at once.

    Args:
        most: slabs that may be in memory at a time.
    """
    together = max(1, min([8, most // 2, *(there.num for there in packed.experts.values())]))
    largest = max(there.stride for there in packed.experts.values())
    layers = np.random.default_rng(0).permutation(np.repeat(list(packed.experts), 8)).tolist()
    taken: dict[int, list[float]] = {1: [], together: []}
    policy, _ = cache_and_forecast(POLICY, None)
    end = time.perf_counter() + seconds
    with ExpertStore(packed, together * largest, policy) as store:
        for turn in range(10_000):
            if time.perf_counter() > end and turn > 2 * _LEAST:
                break
            count = 1 if turn % 2 else together
            layer = layers[turn // 2 % len(layers)]
            there = packed.experts[layer].num
            ids = [(turn * together + at) % there for at in range(count)]
            before = store.counters.bytes, store.counters.misses
            started = time.perf_counter()
            with store.acquire(layer, ids) as lease:
                for _ in lease.ready():
                    pass
            took = time.perf_counter() - started
            if store.counters.misses - before[1] == count and turn > 1:
                taken[count].append(took * largest * count / (store.counters.bytes - before[0]))
    alone, all_of_them = (statistics.median(taken[count]) if taken[count] else 0.0 for count in (1, together))
    return Disk.of(largest, alone, together, all_of_them)


def _each(rows: int) -> int:
    return WINDOW if rows == 1 else 1


def _by_rows(one: float, many: float) -> Cost:
    row = max(many - one, 0.0) / (MANY - 1)
    return Cost(once=max(one - row, 0.0), row=row, expert=0.0)


def _by_choices(few: float, more: float, many: float) -> Cost:
    """From one row with few and with more choices, and many rows with few that meet all experts."""
    a, b = _CHOSEN
    both = max(more - few, 0.0) / (b - a)  # a choice, and the expert that it meets
    once = max(few - a * both, 0.0)
    choice = min(max(many - once - _EXPERTS * both, 0.0) / (MANY * a - _EXPERTS), both)
    return Cost(once=once, row=choice, expert=both - choice)


@contextmanager
def _arms(rows: int, chosen: Sequence[int], threads: int) -> Iterator[dict[str, Step]]:
    """Steps of models of almost no weights: dense ones, and mixtures in memory and in a store that holds them all."""
    few, many = _LAYERS
    forwards = {
        name: _forward(_dense("q8", _WIDTH, _WIDTH, n), MANY, threads) for name, n in (("few", few), ("many", many))
    }
    with tempfile.TemporaryDirectory(prefix="moestro-") as folder:
        packed = _packed(Path(folder), many)
        policy, _ = cache_and_forecast(POLICY, None)
        with ExpertStore(packed, packed.files[EXPERTS][0], policy) as store:
            for top_k in chosen:
                description = _mixed(many, top_k)
                forwards[f"stored {top_k}"] = _forward(description, MANY, threads, store=store)
                forwards[f"resident {top_k}"] = _forward(description, MANY, threads, size=packed.experts[0].stride)
            for layer in packed.experts:
                with store.acquire(layer, range(_EXPERTS)) as lease:
                    list(lease.ready())
            yield {name: _step(forward, rows) for name, forward in forwards.items()}


def _step(forward: NativeForward, rows: int, start: int = 0) -> Step:
    """A step of rows from a position; the logits of one are wanted."""
    count = np.arange(rows, dtype=np.int32)
    batch = Batch(
        tokens=count % 64,
        positions=count + start,
        rows_of=np.zeros(rows, np.int32),
        sequences=[0],
        tables=np.arange(forward.pages, dtype=np.int32)[None],
        want=np.array([rows - 1], np.int32),
    )
    return lambda: forward.step(batch)


def _forward(
    description: Description, positions: int, threads: int, *, store: Any = None, size: int = 0
) -> NativeForward:
    """size: bytes of a slab, where experts are in memory."""
    slabs = None
    if size:
        kept = [aligned(_EXPERTS * size) for _ in description.layers]
        for one in kept:
            one[:] = 0x11
        description.keep.extend(kept)
        slabs = {i: one.ctypes.data + size * np.arange(_EXPERTS, dtype=np.int64) for i, one in enumerate(kept)}
    return NativeForward(description, pages=-(-positions // LANES), store=store, slabs=slabs, threads=threads)


def _matrix(layout: str, n: int, k: int) -> Matrix:
    """Any codes will do; the bytes 0x11 make small scales. Untouched zeros would all be one page, in every cache."""
    if layout == CODED:
        return _ternary(n, k)
    data = aligned(matrix_bytes(layout, n, k))
    data[:] = 0x11
    return Matrix(layout, n, k, data)


def _ternary(n: int, k: int) -> Matrix:
    packed, words = _random_ternary(n, k)
    data = aligned(packed.size)
    data[:] = packed
    return Matrix(CODED, n, k, data, size=packed.size, words=words)


@lru_cache(maxsize=4)
def _random_ternary(n: int, k: int) -> tuple[Bytes, Table]:
    """Random symbols, and the table of their strings."""
    from moestro.engine import pack_ternary

    odds = (_ZEROS / 1000, (1 - _ZEROS / 1000) / 2, (1 - _ZEROS / 1000) / 2)
    symbols = np.random.default_rng(0).choice(np.arange(3, dtype=np.uint8), (n, k), p=odds)
    return pack_ternary.pack(symbols, -np.ones(n), np.ones(n), _ZEROS), pack_ternary.book(_ZEROS).table


def _attention(layout: str, hidden: int, heads: int, kv_heads: int, dim: int) -> Attention:
    shapes = [(heads * dim, hidden), (kv_heads * dim, hidden), (kv_heads * dim, hidden), (hidden, heads * dim)]
    return Attention(*(_matrix(layout, n, k) for n, k in shapes), scale=dim**-0.5)  # type: ignore[call-arg]


def _whole(layout: str, hidden: int, layers: list[Layer], *, heads: int, kv_heads: int, dim: int) -> Description:
    embedding = _matrix("f32" if layout == CODED else layout, 64, hidden)
    frequencies = [np.ones(dim // 2, dtype=np.float32)]
    ones = np.ones(hidden, dtype=np.float32)
    return Description(hidden, heads, kv_heads, dim, 64, embedding, embedding, ones, layers, frequencies)


def _dense(
    layout: str, hidden: int, inner: int, layers: int, *, heads: int = 1, kv_heads: int = 0, dim: int = _WIDTH
) -> Description:
    """A made-up model. kv_heads: 0: as many as heads."""
    ones = np.ones(hidden, dtype=np.float32)
    kv_heads = kv_heads or heads

    def layer() -> Layer:
        shared = Ffn(_matrix(layout, inner, hidden), _matrix(layout, hidden, inner), _matrix(layout, inner, hidden))
        return Layer(ones, ones, _attention(layout, hidden, heads, kv_heads, dim), shared=shared)

    return _whole(layout, hidden, [layer() for _ in range(layers)], heads=heads, kv_heads=kv_heads, dim=dim)


def _mixed(layers: int, top_k: int) -> Description:
    """One whose layers choose among experts of almost no weights."""
    ones = np.ones(_WIDTH, dtype=np.float32)
    size = matrix_bytes("q8", _WIDTH, _WIDTH)
    expert = Ffn(*(Matrix("q8", _WIDTH, _WIDTH, None, at * size) for at in range(3)))
    random = np.random.default_rng(0)

    def layer() -> Layer:
        weight = _matrix("f32", _EXPERTS, _WIDTH)
        weight.data.view(np.float32)[:] = random.normal(size=_EXPERTS * _WIDTH)  # type: ignore[union-attr]
        router = Router("softmax_topk", top_k, weight)
        return Layer(ones, ones, _attention("q8", _WIDTH, 1, 1, _WIDTH), router=router, experts=_EXPERTS, expert=expert)

    return _whole("q8", _WIDTH, [layer() for _ in range(layers)], heads=1, kv_heads=1, dim=_WIDTH)


def _packed(folder: Path, layers: int) -> Packed:
    """The experts of ``_mixed`` as a file of zeros."""
    nbytes = 3 * matrix_bytes("q8", _WIDTH, _WIDTH)
    stride = -(-nbytes // PAGE) * PAGE
    total = layers * _EXPERTS * stride
    with (folder / EXPERTS).open("wb") as file:
        file.truncate(total)
    experts = {at: LayerSlabs(_EXPERTS, at * _EXPERTS * stride, stride, nbytes, {}) for at in range(layers)}
    return Packed(folder, None, {}, experts, {EXPERTS: (total, "")})  # type: ignore[arg-type]
