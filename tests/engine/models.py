"""Small random models as the kernels read them, and the pages of a few sequences."""

from dataclasses import dataclass
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


def build(
    *,
    layout: str = "q8",
    experts_layout: str | None = None,
    hidden: int = 80,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vocab: int = 100,
    layers: int = 2,
    experts: int = 8,
    top_k: int = 3,
    inner: int = 48,
    router: dict[str, Any] | None = None,
    attention: dict[str, Any] | None = None,
    bias: bool = False,
    shared: int = 0,
    shared_gate: bool = False,
    dense_layers: tuple[int, ...] = (),
    gate: bool = True,
    activation: str = "silu",
    seed: int = 0,
    **more: Any,
) -> Packed:
    """A model with random weights; ``more`` goes to the description."""
    rng = np.random.default_rng(seed)
    inside = experts_layout or layout
    q, kv = heads * head_dim, kv_heads * head_dim

    def vector(n: int, around: float = 0.0) -> np.ndarray:
        return (around + 0.1 * rng.standard_normal(n)).astype(np.float32)

    def ffn(width: int, kind: str) -> Ffn:
        up, down = matrix(rng, kind, width, hidden), matrix(rng, kind, hidden, width)
        return Ffn(up, down, matrix(rng, kind, width, hidden) if gate else None, activation)

    made: list[Layer] = []
    slabs: dict[int, np.ndarray] = {}
    addresses: dict[int, np.ndarray] = {}
    for index in range(layers):
        options = {"scale": head_dim**-0.5, **(attention or {})}
        if options.get("qk_norm", "none") != "none":
            wide = options["qk_norm"] == "all"
            options |= {"q_norm": vector(q if wide else head_dim, 1), "k_norm": vector(kv if wide else head_dim, 1)}
        if bias:
            options |= {"q_bias": vector(q), "k_bias": vector(kv), "v_bias": vector(kv), "o_bias": vector(hidden)}
        block = Attention(
            matrix(rng, layout, q, hidden),
            matrix(rng, layout, kv, hidden),
            matrix(rng, layout, kv, hidden),
            matrix(rng, layout, hidden, q),
            **options,
        )
        parts: dict[str, Any] = {}
        if index in dense_layers:
            parts["shared"] = ffn(inner * 2, inside)
        else:
            settings = {"kind": "softmax_topk", "top_k": top_k, "renormalise": True, **(router or {})}
            if settings["kind"] == "sigmoid_bias":
                settings["select_bias"] = vector(experts)
            parts["router"] = Router(weight=matrix(rng, "f32", experts, hidden, 3.0), **settings)
            each = [ffn(inner, inside) for _ in range(experts)]
            parts["experts"] = experts
            parts["expert"], slabs[index], addresses[index] = slab_of(each)
            if shared:
                parts["shared"] = ffn(shared, inside)
                parts["shared_gate"] = matrix(rng, "f32", 1, hidden) if shared_gate else None
        made.append(Layer(vector(hidden, 1), vector(hidden, 1), block, **parts))
    rotary = more.pop("rotary", head_dim)
    inv_freq = [(1e4 ** (-np.arange(0, rotary, 2) / rotary)).astype(np.float32)] if rotary else []
    embedding = matrix(rng, layout, vocab, hidden, 8.0)
    description = Description(
        hidden, heads, kv_heads, head_dim, vocab, embedding, embedding, vector(hidden, 1), made, inv_freq, **more
    )
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
