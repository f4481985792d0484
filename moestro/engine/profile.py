"""What the engine's kernels and this disk do in a second: measured once in some seconds, kept in a file.

Compute is that of whole steps over dense models made up for it, whose matrices do not fit into caches, so that threads,
norms and the quantising of activations are in it. Where little fits together nothing can be faster than memory, and
nothing here is a promise for a busier machine.
"""

import math
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import Field

from moestro.core.config import Config, read_kept
from moestro.core.files import cache_root, write_text
from moestro.engine.kernels import choose
from moestro.engine.kernels.interface import LANES, Attention, Description, Ffn, Layer, Matrix, Router
from moestro.engine.layout import aligned, matrix_bytes
from moestro.engine.packed import EXPERTS, Packed
from moestro.engine.slabs import SlabFile, Slot


ROWS: Final = (1, 4, 16, 64, 512)
READERS: Final = 2
_SLABS = 48
_BUDGET_S = 0.25
_BYTES = 192 << 20  # of made-up matrices: more than a processor keeps to itself
_HEAD = 64

Progress = Callable[[str], None]


class Profile(Config):
    """Measured rates.

    Attributes:
        signature: processor, threads and kernels; another one is measured anew. measured: when.
        weights_per_s: layout -> rows of a product -> matrix weights a second (each met once, whatever the rows).
        layer_s, mixture_s: what a layer costs beside its weights, and a layer whose experts come from a store besides.
    """

    signature: str
    measured: str
    weights_per_s: dict[str, dict[int, float]]
    layer_s: float = Field(ge=0)
    mixture_s: float = Field(ge=0)

    def seconds(self, weights: float, rows: float, layout: str) -> float:
        """Seconds of a product of ``rows`` rows with so many weights; between measured rows by their logarithms."""
        rates = self.weights_per_s[layout]
        known = sorted(rates)
        if rows <= known[0]:
            return weights / rates[known[0]]
        if rows >= known[-1]:
            return weights / rates[known[-1]] * rows / known[-1]
        high = next(index for index, value in enumerate(known) if value > rows)
        a, b = known[high - 1], known[high]
        part = math.log(rows / a) / math.log(b / a)
        return weights / math.exp((1 - part) * math.log(rates[a]) + part * math.log(rates[b]))


def profile_file() -> Path:
    """Where it is kept."""
    return cache_root() / "engine.json"


def signature(threads: int) -> str:
    """What must be the same for a measurement to hold."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    kernels = choose()
    return f"{model or platform.machine()}; {threads} threads; {kernels.name} {kernels.features()['isa']}"


def this_profile(layouts: set[str], threads: int, *, again: bool = False, progress: Progress | None = None) -> Profile:
    """The kept profile, or a new one; layouts that it lacks are added.

    Args:
        layouts: those that are needed. again: measure even what is kept. progress: told what is being measured.
    """
    path, tell = profile_file(), progress or (lambda text: None)
    found = None if again else read_kept(Profile, path)
    if found is None or found.signature != signature(threads):
        tell("layers")
        layer, mixture = _layers(threads)
        when = time.strftime("%Y-%m-%d %H:%M")
        found = Profile(signature=signature(threads), measured=when, weights_per_s={}, layer_s=layer, mixture_s=mixture)
    missing = sorted(layouts - set(found.weights_per_s))
    if not missing and path.is_file() and not again:
        return found
    rates = dict(found.weights_per_s)
    for layout in missing:
        tell(f"matrices in {layout}")
        rates[layout] = _rates(layout, threads)
    found = found.model_copy(update={"weights_per_s": rates})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, found.model_dump_json(indent=1) + "\n")
    return found


def disk_rate(packed: Packed) -> float:
    """Bytes a second of reading slabs here and there as the store does, two at a time; infinite without experts."""
    places = [(layer, expert) for layer, there in packed.experts.items() for expert in range(there.num)]
    if not places:
        return math.inf
    chosen = np.random.default_rng(0).permutation(len(places))[:_SLABS].tolist()
    file = SlabFile(packed.path / EXPERTS, packed.files[EXPERTS][0])
    largest = max(there.stride for there in packed.experts.values())
    done: list[int] = []

    def read() -> None:
        slot = Slot(largest)
        try:
            while chosen:
                offset, size = packed.slab(*places[chosen.pop()])
                file.read(offset, slot.view[:size])
                done.append(size)
        finally:
            slot.free()

    workers = [threading.Thread(target=read) for _ in range(READERS)]
    started = time.perf_counter()
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        file.close()
    return sum(done) / (time.perf_counter() - started)


def _matrix(layout: str, n: int, k: int) -> Matrix:
    """Any codes will do; the bytes 0x11 make small scales. Untouched zeros would all be one page, in every cache."""
    data = aligned(matrix_bytes(layout, n, k))
    data[:] = 0x11
    return Matrix(layout, n, k, data)


def _model(layout: str, hidden: int, inner: int, layers: int, experts: int = 0) -> Description:
    """A made-up model: dense, or with experts of the width ``inner``, two of them chosen."""
    heads = hidden // _HEAD
    ones = np.ones(hidden, dtype=np.float32)

    def layer() -> Layer:
        square = [_matrix(layout, hidden, hidden) for _ in range(4)]
        attention = Attention(*square, scale=_HEAD**-0.5)  # type: ignore[call-arg]
        if not experts:
            shared = Ffn(_matrix(layout, inner, hidden), _matrix(layout, hidden, inner), _matrix(layout, inner, hidden))
            return Layer(ones, ones, attention, shared=shared)
        size = matrix_bytes(layout, inner, hidden)
        expert = Ffn(
            Matrix(layout, inner, hidden, None, 0),
            Matrix(layout, hidden, inner, None, size),
            Matrix(layout, inner, hidden, None, 2 * size),
        )
        router = Router("softmax_topk", 2, _matrix("f32", experts, hidden))
        return Layer(ones, ones, attention, router=router, experts=experts, expert=expert)

    embedding = _matrix(layout, 64, hidden)
    frequencies = [np.ones(_HEAD // 2, dtype=np.float32)]
    parts = [layer() for _ in range(layers)]
    return Description(hidden, heads, heads, _HEAD, 64, embedding, embedding, ones, parts, frequencies)


def _step_seconds(description: Description, rows: int, threads: int, *, apart: bool = False) -> float:
    """Seconds of a step without its head: the best of those that fit into the time. apart: layer by layer, as with a
    store of experts."""
    from moestro.engine.native_forward import NativeForward
    from moestro.engine.sequences import Batch

    experts = max(layer.experts for layer in description.layers)
    slabs, kept = None, []
    if experts:
        first = description.layers[0].expert
        assert first is not None
        size = 3 * matrix_bytes(first.up.layout, first.up.n, first.up.k)
        kept = [aligned(experts * size) for _ in description.layers]
        for one in kept:
            one[:] = 0x11
        slabs = {i: one.ctypes.data + size * np.arange(experts, dtype=np.int64) for i, one in enumerate(kept)}
    forward = NativeForward(description, pages=-(-rows // LANES), slabs=slabs, threads=threads)
    forward.overrides.append(lambda layer, scores, ids, weights: (ids, weights))
    count = np.arange(rows, dtype=np.int32)
    batch = Batch(
        tokens=count % 64,
        positions=count,
        rows_of=np.zeros(rows, np.int32),
        sequences=[0],
        tables=np.arange(forward.pages, dtype=np.int32)[None],
        want=np.zeros(0, np.int32),
        routes=np.ones(rows, np.int32) if apart else None,
    )
    forward.step(batch)
    best, end = math.inf, time.perf_counter() + _BUDGET_S
    while time.perf_counter() < end or best == math.inf:
        started = time.perf_counter()
        forward.step(batch)
        best = min(best, time.perf_counter() - started)
    del kept
    return best


def _layers(threads: int) -> tuple[float, float]:
    """Seconds of a layer of almost no weights, and what one with experts of almost none adds when run apart."""
    layout, many, few = "q8", 10, 2
    dense = [_step_seconds(_model(layout, _HEAD, _HEAD, count), 1, threads) for count in (few, many)]
    mixed = [_step_seconds(_model(layout, _HEAD, _HEAD, n, 4), 1, threads, apart=True) for n in (few, many)]
    layer = max(dense[1] - dense[0], 0.0) / (many - few)
    return layer, max((mixed[1] - mixed[0]) / (many - few) - layer, 0.0)


def _rates(layout: str, threads: int) -> dict[int, float]:
    """Weights a second by rows."""
    hidden, inner = 1024, 4096
    each = 4 * hidden * hidden + 3 * hidden * inner
    layers = max(2, round(_BYTES * hidden * hidden / matrix_bytes(layout, hidden, hidden) / each))
    description, weights = _model(layout, hidden, inner, layers), layers * each
    return {rows: weights / _step_seconds(description, rows, threads) for rows in ROWS}


def facts(profile: Profile, disk: float) -> dict[str, Any]:
    """For a report."""
    return {**profile.model_dump(mode="json"), "disk_bytes_per_s": disk}
