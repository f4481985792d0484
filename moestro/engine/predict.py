"""How fast a packed model will be, from its sizes and a profile of the machine; and how fast it is, by running it.

Seconds of a decoded token

    L * layer + sum over matrices that a token meets of weights / rate(1 row, layout)
    + reads of experts that are away: k * slab * (1 - hits) / disk, of each mixture

and of a prompt of T tokens the same at rate(T rows), T k / d rows for each of the d = E (1 - (1 - k/E)^T) experts that
a layer needs, and (1 - share) d slabs to read.

What routing will do is not known, so a speed is a range, as for models that are not packed: at its slow end choices are
uniform and no read is hidden behind computing; at its fast end they follow Zipf's law, the popular experts are in
memory, and reads and computing overlap in full. Both are a quarter wider, as rates vary. ``with_hits`` is the formula
with a hit ratio that was measured, half of what can be hidden being hidden.
"""

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from moestro.engine.dialect import LayerSpec
from moestro.engine.packed import Packed
from moestro.engine.profile import Profile
from moestro.engine.room import Room
from moestro.models.sizing_units import Range, expected_hits


NOISE: Final = 1.25
PROMPT: Final = 512
DECODED: Final = 32


@dataclass(frozen=True)
class Work:
    """What one step does, in seconds.

    Attributes:
        computing: of everything. slow, fast: reading, with hits by uniform choices and by Zipf's law. whole: reading
            without any hit.
    """

    tokens: int
    computing: float
    slow: float
    fast: float
    whole: float

    def range(self) -> Range:
        """Tokens a second."""
        low = self.tokens / (self.computing + self.slow) / NOISE
        high = self.tokens / max(self.computing, self.fast) * NOISE
        return Range(low, math.sqrt(low * high), high)

    def with_hits(self, hits: float) -> float:
        """Tokens a second when the share ``hits`` of experts is found in memory."""
        reading = self.whole * (1 - hits)
        return self.tokens / (max(self.computing, reading) + min(self.computing, reading) / 2)


class Predictor:
    """Speeds of a packed model in a room.

    Args:
        disk: bytes a second.
    """

    def __init__(self, packed: Packed, room: Room, profile: Profile, disk: float) -> None:
        self.packed, self.room, self.profile, self.disk = packed, room, profile, disk
        self.share = room.slots / room.count if room.count else 1.0

    def work(self, rows: int) -> Work:
        """A step of ``rows`` rows of one sequence; the logits of one are wanted."""
        profile = self.profile
        seconds = len(self.packed.model.layers) * profile.layer_s
        for name, piece in self.packed.tensors.items():
            if len(piece.shape) == 2 and name not in ("embedding", "head"):
                seconds += profile.seconds(math.prod(piece.shape), rows, piece.layout)
        head = self.packed.tensors["embedding" if self.packed.model.tied else "head"]
        seconds += profile.seconds(math.prod(head.shape), 1, head.layout)
        slow = fast = whole = 0.0
        for index, layer in enumerate(self.packed.model.layers):
            if layer.experts:
                computing, nbytes = self._mixture(index, layer, rows)
                seconds += computing + (profile.mixture_s if self.share < 1 else 0.0)
                whole += nbytes / self.disk
                one = rows == 1
                slow += nbytes / self.disk * (1 - expected_hits(layer.experts, self.share, popular=False))
                fast += nbytes / self.disk * (1 - expected_hits(layer.experts, self.share, popular=one))
        return Work(rows, seconds, slow, fast, whole)

    def _mixture(self, index: int, layer: LayerSpec, rows: int) -> tuple[float, float]:
        """Seconds of the experts of a layer, and their bytes."""
        assert layer.router is not None
        there = self.packed.experts[index]
        chosen = layer.router.top_k / layer.experts
        distinct = layer.experts * (1 - (1 - chosen) ** rows)
        each = rows * layer.router.top_k / distinct
        matrices = [piece for piece in there.parts.values() if len(piece.shape) == 2]
        seconds = sum(self.profile.seconds(distinct * math.prod(p.shape), each, p.layout) for p in matrices)
        return seconds, distinct * there.stride

    def layouts(self) -> set[str]:
        """Layouts whose rates are needed."""
        return layouts(self.packed)


def layouts(packed: Packed) -> set[str]:
    """Layouts of the matrices of a model."""
    found = {piece.layout for piece in packed.tensors.values() if len(piece.shape) == 2}
    return found | {p.layout for there in packed.experts.values() for p in there.parts.values() if len(p.shape) == 2}


@dataclass(frozen=True)
class Run:
    """What a run measured: tokens a second, hits as a share of needs, and the most memory held meanwhile."""

    prompt: float
    decode: float
    prompt_hits: float
    decode_hits: float
    peak: int


def verify(path: Path, room: Room, prompt: int, policy: dict[str, Any]) -> Run:
    """Run the model: a prompt of ``prompt`` tokens drawn at random, then ``DECODED`` more one by one, after a warm-up.

    Raises:
        ConfigError: memory that sufficed for the plan does not any more.
    """
    from moestro.engine.kernels.interface import LANES
    from moestro.engine.open_native import Native
    from moestro.engine.sequences import Batch

    restart_peak()
    native = Native(path, room.memory, context=room.pages * LANES, **policy)
    tokens = np.random.default_rng(0).integers(0, native.forward.vocab, prompt + 2 * DECODED).astype(np.int32)
    table = np.arange(native.forward.pages, dtype=np.int32)[None]

    def feed(start: int, count: int) -> None:
        batch = Batch(
            tokens=tokens[start : start + count],
            positions=np.arange(start, start + count, dtype=np.int32),
            rows_of=np.zeros(count, np.int32),
            sequences=[0],
            tables=table,
            want=np.array([count - 1], np.int32),
        )
        native.forward.step(batch)

    def timed(parts: list[tuple[int, int]]) -> tuple[float, float]:
        before, started = native.counters(), time.perf_counter()
        for start, count in parts:
            feed(start, count)
        seconds, after = time.perf_counter() - started, native.counters()
        hits, misses = (after.get(name, 0.0) - before.get(name, 0.0) for name in ("hits", "misses"))
        return sum(count for _, count in parts) / seconds, hits / (hits + misses) if hits + misses else 1.0

    try:
        timed([(0, prompt)])
        read, read_hits = timed([(0, prompt)])
        timed([(prompt + at, 1) for at in range(DECODED)])
        decode, decode_hits = timed([(prompt + DECODED + at, 1) for at in range(DECODED)])
    finally:
        native.close()
    return Run(read, decode, read_hits, decode_hits, peak_memory())


def restart_peak() -> None:
    """Count the most memory of this process from now on, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Most memory this process held since ``restart_peak``; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
