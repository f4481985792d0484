"""The decoupled router of a packed model (train.read_me): token ids alone decide the expert of every layer, in numpy.

Keys and values of the router stand on the same pages as the model's: a sequence that takes the pages of another one's
beginning, or a copy of a page, finds the router's there too. A row is decided alike, bit for bit, whatever other rows
are asked for with it and however a text is cut: products go row by row or through the native kernels, whose order of
sums does not depend on the number of rows, and attention goes row by row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from moestro.engine.dialect import TokenRouterSpec
from moestro.engine.kernels.interface import LANES, Floats, Ints, Kernels, Matrix


BASE: Final = np.float32(10000.0)
EPS: Final = np.float32(1e-6)

Linear = Callable[[str, Floats], Floats]
"""A matrix by name and rows [R, K] -> [R, N]."""


@dataclass(frozen=True)
class Gate:
    """What a packed model holds of its decoupled router.

    Attributes:
        matrices: ``embedding``, ``qkv``, ``out``, ``up``, ``down``, ``head``, all of the layout f32.
        norms: ``attention_norm``, ``mlp_norm``, ``last_norm``, float32 [R]. layers: which layers it decides.
    """

    spec: TokenRouterSpec
    matrices: Mapping[str, Matrix]
    norms: Mapping[str, Floats]
    layers: frozenset[int]


def page_bytes(spec: TokenRouterSpec) -> int:
    """Bytes of a page of the router's keys and values."""
    return 2 * LANES * spec.dim * 4


class TokenRouter:
    """The router over pages.

    Args:
        gate: its tensors. kernels: the engine's. pages: how many there are.
    """

    def __init__(self, gate: Gate, kernels: Kernels, pages: int) -> None:
        self.gate, self.spec = gate, gate.spec
        shape = (pages, LANES, gate.spec.heads, gate.spec.dim // gate.spec.heads)
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.page_bytes = page_bytes(gate.spec)
        self._linear: Linear = _linear(gate, kernels)
        data = gate.matrices["embedding"].data
        assert data is not None
        self._embedding = data.view(np.float32)[: -(-gate.spec.vocab // LANES) * LANES * gate.spec.dim]
        self._embedding = self._embedding.reshape(-1, gate.spec.dim, LANES)

    def route(self, tokens: Ints) -> Floats:
        """Logits [S, E] of a text from its beginning, int32 [S]; nothing is written."""
        places = np.arange(len(tokens), dtype=np.int32)
        none = np.zeros((1, 0), dtype=np.int32)
        return self._decide(tokens, places, np.zeros_like(places), none, write=False)

    def look(self, tokens: Ints, positions: Ints, rows_of: Ints, tables: Ints) -> Floats:
        """Logits [R, E] of rows as in a batch, whose earlier positions stand on their pages; nothing is written."""
        return self._decide(tokens, positions, rows_of, tables, write=False)

    def step(self, tokens: Ints, positions: Ints, rows_of: Ints, tables: Ints) -> Floats:
        """Logits [R, E] of the rows of a batch; their keys and values are written.

        Rows of a sequence stand in order of position, as everywhere in the engine.

        Raises:
            ValueError: a token that the router does not know, or a position without a page.
        """
        return self._decide(tokens, positions, rows_of, tables, write=True)

    def copy_page(self, src: int, dst: int) -> None:
        """Keys and values of one page."""
        self.keys[dst], self.values[dst] = self.keys[src], self.values[src]

    def _decide(self, tokens: Ints, positions: Ints, rows_of: Ints, tables: Ints, *, write: bool) -> Floats:
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.spec.vocab:
            raise ValueError(f"token ids {tokens.min()} to {tokens.max()}, the router knows 0 to {self.spec.vocab - 1}")
        norms, x = self.gate.norms, self._embedding[tokens // LANES, :, tokens % LANES]
        q, k, v = np.split(self._linear("qkv", _norm(x, norms["attention_norm"])), 3, axis=-1)
        shape = (len(x), self.spec.heads, -1)
        q, k, v = _turn(q.reshape(shape), positions), _turn(k.reshape(shape), positions), v.reshape(shape)
        if write:
            if positions.size and int(positions.max()) // LANES >= tables.shape[1]:
                raise ValueError("position outside the page table")
            pages = tables[rows_of, positions // LANES]
            self.keys[pages, positions % LANES], self.values[pages, positions % LANES] = k, v
        mixed = np.empty_like(q)
        for sequence in np.unique(rows_of):
            rows = np.nonzero(rows_of == sequence)[0]
            self._attend(rows, int(positions[rows[0]]), tables[sequence], q, k, v, mixed)
        x = x + self._linear("out", mixed.reshape(len(x), -1))
        up = self._linear("up", _norm(x, norms["mlp_norm"]))
        x = x + self._linear("down", up / (np.float32(1) + np.exp(-up)))
        return self._linear("head", _norm(x, norms["last_norm"]))

    def _attend(self, rows: Any, first: int, table: Ints, q: Floats, k: Floats, v: Floats, out: Floats) -> None:
        """Rows at ``first``, ``first`` + 1, ... of one sequence over what is before them and themselves."""
        pages = table[: -(-first // LANES)]
        before = (part[pages].reshape(-1, *k.shape[1:])[:first] for part in (self.keys, self.values))
        keys, values = (np.concatenate([old, new[rows]]) for old, new in zip(before, (k, v), strict=True))
        keys, values = (np.ascontiguousarray(part.transpose(1, 0, 2)) for part in (keys, values))  # [heads, L, d]
        scale = np.float32(k.shape[-1] ** -0.5)
        for place, row in enumerate(rows):
            end = first + place + 1
            score = np.matmul(keys[:, :end], q[row][:, :, None])[:, :, 0] * scale
            score = np.exp(score - score.max(-1, keepdims=True))
            score /= score.sum(-1, keepdims=True)
            out[row] = np.matmul(score[:, None], values[:, :end])[:, 0]


def best(logits: Floats) -> Ints:
    """The expert of each row [R], equal logits by the lower id."""
    return logits.argmax(-1).astype(np.int32)


def _norm(x: Floats, weight: Floats) -> Floats:
    return x / np.sqrt((x * x).mean(-1, keepdims=True, dtype=np.float32) + EPS) * weight


def _turn(x: Floats, positions: Ints) -> Floats:
    """x [R, heads, d] turned to its positions, halves of a head against one another."""
    half = x.shape[-1] // 2
    rate = BASE ** (-np.arange(half, dtype=np.float32) / np.float32(half))
    angle = positions.astype(np.float32)[:, None, None] * rate
    cos, sin = np.cos(angle), np.sin(angle)
    one, two = x[..., :half], x[..., half:]
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def _linear(gate: Gate, kernels: Kernels) -> Linear:
    """Products whose rows do not depend on one another: the native kernels', or numpy's row by row."""
    if kernels.name == "native":
        return lambda name, x: kernels.linear(gate.matrices[name], np.ascontiguousarray(x))
    from moestro.engine.kernels.twin import floats

    whole = {name: floats(matrix) for name, matrix in gate.matrices.items() if name != "embedding"}
    return lambda name, x: np.stack([whole[name] @ row for row in np.ascontiguousarray(x)])
