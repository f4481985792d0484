"""A small transformer over token ids that says which experts every layer will use; runs in numpy, step by step.

    x_t = embedding[token_t]                                                      [D]
    for each block:  x = x + O attention(norm x),  x = x + W_down silu(W_up norm x)
    logits_t = H norm x_t + b                                                     [C], C = sum over layers of E

A token attends to itself and to the W - 1 tokens before it (rotary positions), so that what a sequence leaves behind
has one size, and a sequence that is first seen in its middle, from shared pages, is no special case. Rows may come in
any cut: one by one or a prompt at a time give the same numbers. On disk it is a folder with ``predictor.json`` and
``predictor.safetensors``.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from moestro.core.config import Config
from moestro.core.errors import ConfigError, LoadError, SaveError
from moestro.core.files import whole_file, write_text


Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[Any]

HEADER, WEIGHTS = "predictor.json", "predictor.safetensors"
BASE: Final = 10000.0
EPSILON: Final = 1e-6
MOST_SEQUENCES: Final = 4096
"""Sequences whose windows are kept; beyond, those that were not heard of for longest are dropped."""


class LayerShape(Config):
    """A routed layer: its number, E, and how many experts a token uses there."""

    layer: int = Field(ge=0)
    experts: int = Field(ge=1)
    top_k: int = Field(ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "LayerShape":
        if self.top_k > self.experts:
            raise ValueError(f"layer {self.layer}: top_k={self.top_k} of {self.experts} experts")
        return self


class Header(Config):
    """What ``predictor.json`` says.

    Attributes:
        layers: in the order of the logits. vocabulary: V, the last id being that of unknown tokens. dim: D.
        heads: of the attention. inner: width of the MLP. depth: blocks. window: W.
        trace: SHA-256 of what it was taught with. model, model_hash, tokenizer_hash: as that trace tells.
        weights: SHA-256 of the file of weights. settings: of the training. scores: on what was held back.
    """

    format: Literal["moestro-route-predictor"] = "moestro-route-predictor"
    version: Literal[1] = 1
    layers: tuple[LayerShape, ...]
    vocabulary: int = Field(ge=1)
    dim: int = Field(ge=2)
    heads: int = Field(ge=1)
    inner: int = Field(ge=1)
    depth: int = Field(ge=1)
    window: int = Field(ge=1)
    trace: str
    model: str = ""
    model_hash: str | None = None
    tokenizer_hash: str | None = None
    weights: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> "Header":
        if not self.layers or len({shape.layer for shape in self.layers}) != len(self.layers):
            raise ValueError("layers: name every routed layer once")
        check_heads(self.dim, self.heads)
        return self

    @property
    def choices(self) -> int:
        """C."""
        return sum(shape.experts for shape in self.layers)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape."""
        d, f = self.dim, self.inner
        found: dict[str, tuple[int, ...]] = {"embedding": (self.vocabulary, d)}
        for block in range(self.depth):
            parts = {"norm1": (d,), "qkv": (3 * d, d), "out": (d, d), "norm2": (d,), "up": (f, d), "down": (d, f)}
            found |= {f"blocks.{block}.{name}": shape for name, shape in parts.items()}
        return found | {"norm": (d,), "head": (self.choices, d), "bias": (self.choices,)}


def check_heads(dim: int, heads: int) -> None:
    """Raise ConfigError unless each head has an even width."""
    if dim % heads or dim // heads % 2:
        raise ConfigError(f"dim={dim} over heads={heads}; give a multiple of {2 * heads}")


def check_free(folder: str | Path) -> Path:
    """Raise SaveError where something stands, but for an empty folder."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SaveError(f"{folder}: exists; remove it or give another name")
    return folder


def save(folder: str | Path, header: Header, weights: Mapping[str, Floats]) -> Path:
    """Write a predictor; the header comes last, so that a folder with one is complete.

    Raises:
        SaveError: something stands there, or the disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    folder = check_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{folder}: cannot be made ({error.strerror})") from None
    with whole_file(folder / WEIGHTS) as draft:
        try:
            save_file({name: np.ascontiguousarray(weights[name], np.float32) for name in header.shapes()}, draft)
        except SafetensorError as error:
            raise SaveError(f"{folder / WEIGHTS}: cannot be written ({error})") from None
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    body = header.model_copy(update={"weights": digest}).model_dump(mode="json")
    write_text(folder / HEADER, json.dumps(body, indent=1) + "\n")
    return folder


def load(folder: str | Path) -> "RoutePredictor":
    """Read a predictor.

    Raises:
        LoadError: no predictor there, damaged, or tensors that are not those its header tells of.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as parse

    folder = Path(folder)
    try:
        values = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        raw = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise LoadError(f"{folder}: no predictor of routes ({error.strerror}); `moestro learn` makes one") from None
    except (ValueError, RecursionError):
        raise LoadError(f"{folder / HEADER}: not a JSON file") from None
    try:
        header = Header.parse(values, where=str(folder / HEADER))
    except ConfigError as error:
        raise LoadError(str(error)) from None
    if hashlib.sha256(raw).hexdigest() != header.weights:
        raise LoadError(f"{folder / WEIGHTS}: does not have the sha256 that {HEADER} says; learn it again")
    try:
        weights = parse(raw)
    except SafetensorError as error:
        raise LoadError(f"{folder / WEIGHTS}: {error}") from None
    wanted, have = header.shapes(), {name: array.shape for name, array in weights.items()}
    odd = next((name for name in sorted({*wanted, *have}) if wanted.get(name) != have.get(name)), None)
    if odd is not None or any(array.dtype != np.float32 for array in weights.values()):
        raise LoadError(
            f"{folder / WEIGHTS}: {odd or 'a tensor'} is {have.get(odd or '')}, not {wanted.get(odd or '')}"
        )
    return RoutePredictor(header, weights)


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


def _norm(x: Floats, weight: Floats) -> Floats:
    scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(EPSILON))
    found: Floats = x * scale * weight
    return found


def _rotated(x: Floats, cos: Floats, sin: Floats) -> Floats:
    half = x.shape[-1] // 2
    one, two = x[..., :half], x[..., half:]
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
