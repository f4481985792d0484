"""Small random models as the kernels read them, and the pages of a few sequences."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moestro.engine.kernels.interface import Attention, Description, Ffn, Layer, Matrix, Router
from tests.engine.packing import aligned, pack


@dataclass
class Packed:
    """A description, and the slabs of its experts.

    Attributes:
        slabs: layer -> bytes of all slabs; addresses: layer -> int64 [experts].
    """

    description: Description
    slabs: dict[int, np.ndarray]
    addresses: dict[int, np.ndarray]


def matrix(rng: np.random.Generator, layout: str, n: int, k: int, scale: float = 1.0) -> Matrix:
    data, _ = pack((rng.standard_normal((n, k)) * scale / np.sqrt(k)).astype(np.float32), layout)
    return Matrix(layout, n, k, data)


@dataclass
class Shape:
    """What ``build`` makes; ``router`` and ``attention`` override fields of theirs.

    Attributes:
        shared: width of the shared branch, 0 for none. dense_layers: indices of layers without a mixture.
    """

    layout: str = "q8"
    experts_layout: str = ""
    hidden: int = 80
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    layers: int = 2
    experts: int = 8
    top_k: int = 3
    inner: int = 48
    router: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    shared: int = 0
    shared_gate: bool = False
    dense_layers: tuple[int, ...] = ()
    gate: bool = True
    activation: str = "silu"
    rotary: int = -1


class Maker:
    """Parts of a model of a shape, drawn from one generator."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape, self.rng = shape, np.random.default_rng(seed)

    def vector(self, n: int, around: float = 0.0) -> np.ndarray:
        return (around + 0.1 * self.rng.standard_normal(n)).astype(np.float32)

    def matrix(self, n: int, k: int, layout: str = "", scale: float = 1.0) -> Matrix:
        return matrix(self.rng, layout or self.shape.layout, n, k, scale)

    def ffn(self, width: int) -> Ffn:
        kind, hidden = self.shape.experts_layout or self.shape.layout, self.shape.hidden
        up, down = self.matrix(width, hidden, kind), self.matrix(hidden, width, kind)
        return Ffn(up, down, self.matrix(width, hidden, kind) if self.shape.gate else None, self.shape.activation)

    def attention(self) -> Attention:
        s = self.shape
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        options = {"scale": s.head_dim**-0.5, **s.attention}
        if options.get("qk_norm", "none") != "none":
            wide = options["qk_norm"] == "all"
            options["q_norm"] = self.vector(q if wide else s.head_dim, 1)
            options["k_norm"] = self.vector(kv if wide else s.head_dim, 1)
        if s.bias:
            options |= {"q_bias": self.vector(q), "k_bias": self.vector(kv)}
            options |= {"v_bias": self.vector(kv), "o_bias": self.vector(s.hidden)}
        shapes = ((q, s.hidden), (kv, s.hidden), (kv, s.hidden), (s.hidden, q))
        return Attention(*(self.matrix(n, k) for n, k in shapes), **options)

    def router(self) -> Router:
        s = self.shape
        settings = {"kind": "softmax_topk", "top_k": s.top_k, "renormalise": True, **s.router}
        if settings["kind"] == "sigmoid_bias":
            settings["select_bias"] = self.vector(s.experts)
        return Router(weight=self.matrix(s.experts, s.hidden, "f32", 3.0), **settings)


def build(*, seed: int = 0, vocab: int = 100, **options: Any) -> Packed:
    """A model with random weights; fields of ``Shape``, others go to the description."""
    known = Shape.__dataclass_fields__
    shape = Shape(**{name: value for name, value in options.items() if name in known})
    more = {name: value for name, value in options.items() if name not in known}
    make = Maker(shape, seed)
    layers: list[Layer] = []
    slabs: dict[int, np.ndarray] = {}
    addresses: dict[int, np.ndarray] = {}
    for index in range(shape.layers):
        parts: dict[str, Any] = {}
        if index in shape.dense_layers:
            parts["shared"] = make.ffn(shape.inner * 2)
        else:
            parts |= {"router": make.router(), "experts": shape.experts}
            parts["expert"], slabs[index], addresses[index] = slab_of(
                [make.ffn(shape.inner) for _ in range(shape.experts)]
            )
            if shape.shared:
                parts["shared"] = make.ffn(shape.shared)
            if shape.shared_gate:
                parts["shared_gate"] = make.matrix(1, shape.hidden, "f32")
        layers.append(Layer(make.vector(shape.hidden, 1), make.vector(shape.hidden, 1), make.attention(), **parts))
    rotary = shape.head_dim if shape.rotary < 0 else shape.rotary
    inv_freq = [(1e4 ** (-np.arange(0, rotary, 2) / rotary)).astype(np.float32)] if rotary else []
    embedding = make.matrix(vocab, shape.hidden, scale=8.0)
    sizes = (shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, vocab)
    description = Description(*sizes, embedding, embedding, make.vector(shape.hidden, 1), layers, inv_freq, **more)
    return Packed(description, slabs, addresses)


def slab_of(each: list[Ffn]) -> tuple[Ffn, np.ndarray, np.ndarray]:
    """Experts -> (offsets in a slab, the slabs behind one another, their addresses)."""
    offset, placed = 0, {}
    for name in ("gate", "up", "down"):
        part = getattr(each[0], name)
        if part is not None:
            placed[name] = Matrix(part.layout, part.n, part.k, None, offset)
            offset += -(-part.nbytes // 64) * 64
    data = aligned(offset * len(each))
    for index, ffn in enumerate(each):
        for name, where in placed.items():
            start = index * offset + where.offset
            data[start : start + where.nbytes] = getattr(ffn, name).data
    addresses = data.ctypes.data + offset * np.arange(len(each), dtype=np.int64)
    return Ffn(placed["up"], placed["down"], placed.get("gate"), each[0].activation), data, addresses


def one_sequence(length: int, start: int = 0, pages: int = 8) -> dict[str, np.ndarray]:
    """Arguments of ``begin`` but the tokens, for positions start..start+length-1 of a sequence on pages 0, 1, ..."""
    return {
        "positions": np.arange(start, start + length, dtype=np.int32),
        "rows_of": np.zeros(length, np.int32),
        "tables": np.arange(pages, dtype=np.int32)[None],
    }
