"""A small transformer over token ids that says which experts every layer will use; runs in numpy, step by step.

    x_t = embedding[token_t]                                                      [D]
    for each block:  x = x + O attention(norm x),  x = x + W_down silu(W_up norm x)
    logits_t = H norm x_t + b                                                     [C], C = sum over layers of E

A token attends to itself and to the W - 1 tokens before it (rotary positions), so that what a sequence leaves behind
has one size, and a sequence that is first seen in its middle, from shared pages, is no special case. Rows may come in
any cut: one by one or a prompt at a time give the same numbers.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moestro.methods.serve._parts.route_file import Floats, Header, read


Ints = npt.NDArray[Any]

BASE: Final = 10000.0
EPSILON: Final = 1e-6
MOST_SEQUENCES: Final = 4096
"""Sequences whose windows are kept; beyond, those that were not heard of for longest are dropped."""


@dataclass
class _Windows:
    """What sequences leave behind: rings of W positions, position p at p mod W; a position of -1 is empty."""

    keys: Floats  # [slots, depth, heads, W, D / heads]
    values: Floats
    position: npt.NDArray[np.int64]  # [slots, W]


class RoutePredictor:
    """See the top of the file.

    Args:
        header: sizes. weights: float32 by the names of ``Header.shapes``.
    """

    def __init__(self, header: Header, weights: Mapping[str, Floats]) -> None:
        self.header, self.weights = header, dict(weights)
        half = header.dim // header.heads // 2
        self._rate = BASE ** (-np.arange(half) / half)
        self._slot: OrderedDict[int, int] = OrderedDict()
        self._free: list[int] = []
        self._windows = self._empty(0)

    def _empty(self, slots: int) -> _Windows:
        h = self.header
        shape = (slots, h.depth, h.heads, h.window, h.dim // h.heads)
        nothing = np.full((slots, h.window), -1, np.int64)
        return _Windows(np.zeros(shape, np.float32), np.zeros(shape, np.float32), nothing)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Those it remembers."""
        return tuple(self._slot)

    def last(self, sequence: int) -> int:
        """The last position it has seen of a sequence, -1 for none."""
        slot = self._slot.get(sequence)
        return -1 if slot is None else int(self._windows.position[slot].max())

    def forget(self, sequence: int) -> None:
        """A sequence is over."""
        slot = self._slot.pop(sequence, None)
        if slot is not None:
            self._windows.position[slot] = -1
            self._free.append(slot)

    def _slots(self, sequences: list[int]) -> Ints:
        for sequence in sequences:
            if sequence not in self._slot:
                if len(self._slot) >= max(MOST_SEQUENCES, len(sequences)):
                    self.forget(next(iter(self._slot)))
                if not self._free:
                    self._grow()
                self._slot[sequence] = self._free.pop()
            self._slot.move_to_end(sequence)
        return np.array([self._slot[sequence] for sequence in sequences])

    def _grow(self) -> None:
        old, have = self._windows, len(self._windows.position)
        more = self._empty(max(8, have))
        self._windows = _Windows(
            np.concatenate([old.keys, more.keys]),
            np.concatenate([old.values, more.values]),
            np.concatenate([old.position, more.position]),
        )
        self._free = list(range(have, have + len(more.position)))[::-1]

    def step(self, tokens: Ints, positions: Ints, sequences: Ints) -> Floats:
        """Logits [R, C] of rows; what later rows of their sequences attend to is kept.

        Args:
            tokens, positions, sequences: int [R]; rows of a sequence in order of position. A position that comes
                again, as when a step is repeated, takes the place of what was there and of all behind it. The last id
                of the vocabulary stands for all beyond.
        """
        tokens = np.minimum(tokens, self.header.vocabulary - 1)
        logits = np.empty((len(tokens), self.header.choices), np.float32)
        ids, inverse, count = np.unique(sequences, return_inverse=True, return_counts=True)
        order, first = np.argsort(inverse, kind="stable"), np.cumsum(count) - count
        for n in np.unique(count):
            mine = np.flatnonzero(count == n)
            rows = order[first[mine][:, None] + np.arange(n)]
            slots = self._slots(ids[mine].tolist())
            logits[rows] = self._run(slots, tokens[rows], positions[rows].astype(np.int64))
        return logits

    def _run(self, slots: Ints, ids: Ints, place: Ints) -> Floats:
        """Logits [S, n, C] of n rows of each of S sequences; ids, place: [S, n]."""
        h, w, windows = self.header, self.weights, self._windows
        x = w["embedding"][ids]
        before = windows.position[slots]
        known = np.concatenate([np.where(before < place[:, :1], before, -1), place], axis=1)
        now, then = place[:, :, None], known[:, None, :]
        closed = ((then < 0) | (then > now) | (then <= now - h.window))[:, None]
        angle = place[:, None, :, None] * self._rate
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        kept = min(h.window, place.shape[1])
        at, own = place[:, -kept:] % h.window, slots[:, None]
        for block in range(h.depth):
            part = {name: w[f"blocks.{block}.{name}"] for name in ("norm1", "qkv", "out", "norm2", "up", "down")}
            q, k, v = self._heads(_norm(x, part["norm1"]) @ part["qkv"].T)
            q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
            keys = np.concatenate([windows.keys[slots, block], k], axis=2)
            values = np.concatenate([windows.values[slots, block], v], axis=2)
            score = (q @ keys.swapaxes(2, 3)) * np.float32(q.shape[-1] ** -0.5)
            score[np.broadcast_to(closed, score.shape)] = -np.inf
            score = np.exp(score - score.max(-1, keepdims=True))
            mixed = (score / score.sum(-1, keepdims=True)) @ values
            x = x + mixed.swapaxes(1, 2).reshape(x.shape) @ part["out"].T
            up = _norm(x, part["norm2"]) @ part["up"].T
            x = x + (up / (1 + np.exp(-np.clip(up, -80, 80)))) @ part["down"].T
            windows.keys[own, block, :, at] = k[:, :, -kept:].swapaxes(1, 2)
            windows.values[own, block, :, at] = v[:, :, -kept:].swapaxes(1, 2)
        # A sequence that went back leaves nothing of what it had read beyond.
        windows.position[slots] = np.where(before < place[:, :1], before, -1)
        windows.position[own, at] = place[:, -kept:]
        found: Floats = (_norm(x, w["norm"]) @ w["head"].T + w["bias"]).astype(np.float32)
        return found

    def _heads(self, qkv: Floats) -> list[Floats]:
        """Queries, keys, values [S, heads, n, D / heads]."""
        rows, n, _ = qkv.shape
        parts = qkv.reshape(rows, n, 3, self.header.heads, -1)
        return [parts[:, :, index].swapaxes(1, 2) for index in range(3)]


def load(folder: str | Path) -> RoutePredictor:
    """A predictor as `route_file` reads it."""
    return RoutePredictor(*read(folder))


def _norm(x: Floats, weight: Floats) -> Floats:
    scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(EPSILON))
    found: Floats = x * scale * weight
    return found


def _rotated(x: Floats, cos: Floats, sin: Floats) -> Floats:
    half = x.shape[-1] // 2
    one, two = x[..., :half], x[..., half:]
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
