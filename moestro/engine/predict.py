"""How fast a packed model will be, from its sizes and a profile of the machine; and how fast it is, by running it.

Seconds of a step of T rows of one text

    step + sum over layers of (layer + attention + mixture) + sum over matrices of weights / rate(rows, layout)

where ``step``, ``layer`` and ``mixture`` are what these cost beside their weights, and a matrix meets T rows, the head
one, and each of the d = E (1 - (1 - k/E)^T) experts that a layer needs T k / d. Of these d some are away. The engine
computes with those in memory while the others are read, and with each of the others when it has come, so that a layer
waits for

    max(computing, reading + computing of the last one)

in as many waves as the slots ask for; how many are away is binomial with the hit ratio.

What routing will do is not known, so a speed is a range, as for models that are not packed: at its slow end choices are
uniform; at its fast end those of single rows follow Zipf's law, and the popular experts are in memory. Both are a
quarter wider, as rates vary. ``with_hits`` is the formula with a hit ratio that was measured.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from moestro.core.memory import peak_bytes, restart_peak
from moestro.engine.dialect import LayerSpec
from moestro.engine.kernels.interface import CODE_BYTES, GROUP, LANES
from moestro.engine.packed import Packed
from moestro.engine.packed_index import Piece
from moestro.engine.profile import Disk, Profile, pairs
from moestro.engine.room import Room
from moestro.models.sizing_units import Range, expected_hits


NOISE: Final = 1.25
PROMPT: Final = 512
PROMPTS: Final = 5
DECODED: Final = 40
SECONDS: Final = 0.5


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer in one step.

    Attributes:
        num: how many there are, needed: how many of them the step meets. each: seconds of computing with one.
        nbytes: of one.
    """

    num: int
    needed: int
    each: float
    nbytes: float

    def seconds(self, misses: int, slots: int, disk: Disk | None) -> float:
        """In waves of ``slots``, residents first, reads hidden behind computing as far as there is any."""
        total, left, hits = 0.0, self.needed, self.needed - misses
        while left:
            now = min(left, max(slots, 1))
            away = now - min(hits, now)
            hits, left = hits - (now - away), left - now
            reading = disk.seconds(away * self.nbytes) + self.each if away and disk is not None else 0.0
            total += max(now * self.each, reading)
        return total

    def expected(self, hits: float, slots: int, disk: Disk | None) -> float:
        """Over what may be away where each is there with probability ``hits``."""
        n, away = self.needed, 1 - hits
        chances = ((math.comb(n, m) * away**m * hits ** (n - m), m) for m in range(n + 1))
        return sum(chance * self.seconds(m, slots, disk) for chance, m in chances if chance > 0)


@dataclass(frozen=True)
class Work:
    """What one step does.

    Attributes:
        tokens: of it. computing: seconds of all but experts. mixtures: those. slots, count: experts that fit into
            memory, and how many there are. disk: where the others are; None where there are none.
    """

    tokens: int
    computing: float
    mixtures: tuple[Mixture, ...]
    slots: int
    count: int
    disk: Disk | None

    def range(self) -> Range:
        """Tokens a second."""
        share = self.slots / self.count if self.count else 1.0
        ends = []
        for popular in (False, self.tokens == 1):
            hits = [expected_hits(mixture.num, share, popular=popular) for mixture in self.mixtures]
            ends.append(self.tokens / self._seconds(hits))
        low, high = ends[0] / NOISE, ends[1] * NOISE
        return Range(low, math.sqrt(low * high), high)

    def with_hits(self, hits: float) -> float:
        """Tokens a second when the share ``hits`` of experts is found in memory."""
        return self.tokens / self._seconds([hits] * len(self.mixtures))

    def _seconds(self, hits: list[float]) -> float:
        each = (m.expected(h, self.slots, self.disk) for m, h in zip(self.mixtures, hits, strict=True))
        return self.computing + sum(each)


class Predictor:
    """Speeds of a packed model in a room."""

    def __init__(self, packed: Packed, room: Room, profile: Profile, disk: Disk | None) -> None:
        self.packed, self.room, self.profile, self.disk = packed, room, profile, disk

    def work(self, rows: int, start: int = 0, met: Mapping[int, float] | None = None) -> Work:
        """A step of ``rows`` rows of one text from the position ``start``; the logits of one are wanted.

        Args:
            met: layer -> experts that the step meets, where that was counted.
        """
        model, profile = self.packed.model, self.profile
        seconds = profile.step.seconds(rows)
        for name, piece in self.packed.tensors.items():
            if len(piece.shape) == 2 and not name.endswith("embedding") and name != "head":
                seconds += profile.seconds(_weights(piece), rows, piece.layout)
        head = self.packed.tensors["embedding" if model.tied else "head"]
        seconds += profile.seconds(_weights(head), 1, head.layout)
        mixtures = []
        for index, layer in enumerate(model.layers):
            assert layer.attention is not None
            seen = pairs(rows, start, layer.attention.window)
            seconds += profile.layer.seconds(rows) + profile.attending(model.heads * seen, model.head_dim, rows)
            if layer.experts:
                once, mixture = self._mixture(index, layer, rows, None if met is None else met[index])
                seconds += once
                mixtures.append(mixture)
        return Work(rows, seconds, tuple(mixtures), self.room.slots, self.room.count, self.disk)

    def _mixture(self, index: int, layer: LayerSpec, rows: int, met: float | None) -> tuple[float, Mixture]:
        """Seconds beside the experts of a layer, and these."""
        assert layer.router is not None
        there, choices = self.packed.experts[index], rows * layer.router.top_k
        needed = met or layer.experts * (1 - (1 - layer.router.top_k / layer.experts) ** rows)
        cost = self.profile.resident if self.room.slots == self.room.count else self.profile.stored
        kinds = [there.kinds[kind].parts for kind in there.kind_of] if there.kinds else [there.parts]
        each = sum(self._expert(parts, choices / needed) for parts in kinds) / len(kinds)
        whole = max(1, min(round(needed), layer.experts))
        each = (each + cost.expert) * needed / whole
        return cost.seconds(choices), Mixture(layer.experts, whole, each, there.size / there.num)

    def _expert(self, parts: Mapping[str, Piece], rows: float) -> float:
        matrices = (piece for piece in parts.values() if len(piece.shape) == 2)
        return sum(self.profile.seconds(_weights(p), rows, p.layout) for p in matrices)


def _weights(piece: Piece) -> int:
    """Weights of a matrix as it is computed with, the padding of its blocks included."""
    n, k = piece.shape
    return -(-n // LANES) * LANES * (-(-k // GROUP) * GROUP if piece.layout in CODE_BYTES else k)


def layouts(packed: Packed) -> set[str]:
    """Layouts of the matrices of a model."""
    found = {piece.layout for piece in packed.tensors.values() if len(piece.shape) == 2}
    for there in packed.experts.values():
        for parts in [kind.parts for kind in there.kinds] or [there.parts]:
            found |= {piece.layout for piece in parts.values() if len(piece.shape) == 2}
    return found


@dataclass(frozen=True)
class Run:
    """What a run measured.

    Attributes:
        prompt, decode: tokens a second, by the median pass. prompt_hits, decode_hits: as shares of needs.
        met: layer -> experts that the prompt met. peak: most bytes held meanwhile.
    """

    prompt: float
    decode: float
    prompt_hits: float
    decode_hits: float
    met: dict[int, float]
    peak: int


def verify(path: Path, room: Room, prompt: int, policy: dict[str, Any]) -> Run:
    """Run the model: a prompt of ``prompt`` tokens drawn at random, then ``DECODED`` more one by one, after a warm-up.

    Raises:
        ConfigError: memory that sufficed for the plan does not any more.
    """
    from moestro.engine.measure import WINDOW, typical
    from moestro.engine.open_native import Native
    from moestro.engine.sequences import Batch

    restart_peak()
    native = Native(path, room.memory, context=room.pages * LANES, **policy)
    forward = native.forward
    random = np.random.default_rng(0)
    tokens = random.integers(0, forward.vocab, prompt).astype(np.int32)
    table = np.arange(forward.pages, dtype=np.int32)[None]
    met: dict[int, float] = {}

    def feed(start: int, count: int) -> None:
        batch = Batch(
            tokens=tokens if count == prompt else random.integers(0, forward.vocab, count).astype(np.int32),
            positions=np.arange(start, start + count, dtype=np.int32),
            rows_of=np.zeros(count, np.int32),
            sequences=[0],
            tables=table,
            want=np.array([count - 1], np.int32),
        )
        forward.step(batch)

    def timed(step: Callable[[], object], each: int, passes: int) -> tuple[float, float]:
        """Seconds of a step, and hits."""
        before = native.counters()
        (seconds,) = typical([step], each, passes=passes, seconds=SECONDS)
        after = native.counters()
        hits, misses = (after.get(name, 0.0) - before.get(name, 0.0) for name in ("hits", "misses"))
        return seconds, hits / (hits + misses) if hits + misses else 1.0

    try:
        forward.on_route = lambda layer, ids, weights: met.update({layer: float(np.unique(ids[ids >= 0]).size)})
        feed(0, prompt)
        forward.on_route = None
        read, read_hits = timed(lambda: feed(0, prompt), 1, PROMPTS)
        for at in range(DECODED):
            feed(prompt + at, 1)
        later = itertools.cycle(range(prompt + DECODED, prompt + 2 * DECODED))
        decode, decode_hits = timed(lambda: feed(next(later), 1), WINDOW, DECODED // WINDOW)
    finally:
        native.close()
    return Run(prompt / read, 1 / decode, read_hits, decode_hits, met, peak_bytes())
