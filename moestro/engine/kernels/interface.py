"""What the engine computes with: a description of a model in packed matrices, and the steps of a forward over it.

Two makers of these steps exist: ``native`` (C++, optional wheel ``moestro-native``) and ``twin`` (numpy, the reference
of the arithmetic). A *layout* is how a matrix [N out, K in] is stored; see the packed-model format. Quantised layouts
multiply integers: a row of activations is quantised per group of 64 inputs (scale = max|x| / 127, round half to even),
the sum of code products of a group is an exact int32, and groups are added in order by fused multiply-adds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError


Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Addresses = npt.NDArray[np.int64]

LAYOUTS = ("f32", "f16", "q8", "q4", "q3", "q2", "q1", "s1", "t1")
LANES = 16
GROUP = 64
CODE_BYTES = {"q8": 1024, "q4": 512, "q3": 384, "q2": 256, "q1": 128, "s1": 128}
# What stands for zero; layouts without a fixed offset store 16 zero points behind the 16 scales of a block.
OFFSETS = {"q8": 128, "q4": 8}
# Codes 0 and 1 of s1 mean -1 and 1 times the scale. t1: see ``moestro.engine.ternary``; its matrices differ in size.
ACTIVATIONS = ("silu", "gelu_tanh", "relu", "identity", "gelu")
ROUTERS = ("softmax_topk", "topk_softmax", "sigmoid_bias")


@dataclass(frozen=True)
class Matrix:
    """A matrix [n, k] in a layout: its bytes, or where it starts inside an expert's slab.

    Attributes:
        data: uint8, starts at a multiple of 64; None inside a slab. offset: bytes from the start of the slab.
        size: bytes of a t1 matrix. words: its table of strings, uint64 [65536].
    """

    layout: str
    n: int
    k: int
    data: npt.NDArray[np.uint8] | None = None
    offset: int = 0
    size: int = 0
    words: npt.NDArray[np.uint64] | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout {self.layout!r}; known are {', '.join(LAYOUTS)}")
        if self.n < 1 or self.k < 1:
            raise ConfigError(f"a matrix [{self.n}, {self.k}] holds nothing")
        if self.layout == "t1" and (self.words is None or self.size < 4 * (-(-self.n // LANES) + 1)):
            raise ConfigError(f"a t1 matrix [{self.n}, {self.k}] needs a table of strings and its size")
        if self.data is not None and self.data.size < self.nbytes:
            raise ConfigError(
                f"{self.layout} [{self.n}, {self.k}] takes {self.nbytes} bytes, {self.data.size} are there"
            )

    @property
    def block_bytes(self) -> int:
        """Bytes of 16 rows x 64 inputs (quantised layouts)."""
        return CODE_BYTES[self.layout] + (32 if self.layout in OFFSETS or self.layout == "s1" else 48)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole matrix, padding included."""
        if self.layout == "t1":
            return self.size
        rows = -(-self.n // LANES)
        if self.layout in CODE_BYTES:
            return rows * -(-self.k // GROUP) * self.block_bytes
        return rows * LANES * self.k * (4 if self.layout == "f32" else 2)

    @property
    def address(self) -> int:
        """Address of the bytes, or the offset into a slab."""
        return self.offset if self.data is None else int(self.data.ctypes.data)


@dataclass(frozen=True)
class Ffn:
    """down(act(gate x) * up x), or down(act(up x)) without a gate."""

    up: Matrix
    down: Matrix
    gate: Matrix | None = None
    activation: str = "silu"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation {self.activation!r}; known are {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class Router:
    """How a layer chooses: ``softmax_topk`` (softmax over all, the k best), ``topk_softmax`` (softmax over the k best
    logits) or ``sigmoid_bias`` (sigmoids; a bias shifts what is ranked, not what weighs; DeepSeek-V3's groups).

    Attributes:
        weight: [experts, hidden], a float layout. bias: added to the logits. select_bias: added to what is ranked.
        renormalise: the k weights are divided by their sum. scale: multiplies the weights.
        groups, top_groups: only experts of the best groups (by the sum of their two best) may be chosen.
        ahead: the router reads the input of the router of the layer so many before.
    """

    kind: str
    top_k: int
    weight: Matrix
    bias: Floats | None = None
    select_bias: Floats | None = None
    renormalise: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    ahead: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ROUTERS:
            raise ConfigError(f"router {self.kind!r}; native ones are {', '.join(ROUTERS)}")


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention.

    Attributes:
        qk_norm: "none", "head" (each head) or "all" (all heads together), with weights q_norm and k_norm.
        window: positions a query sees back, itself included; 0: all. rope: index into ``Description.inv_freq``.
    """

    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    scale: float
    q_bias: Floats | None = None
    k_bias: Floats | None = None
    v_bias: Floats | None = None
    o_bias: Floats | None = None
    qk_norm: str = "none"
    q_norm: Floats | None = None
    k_norm: Floats | None = None
    window: int = 0
    softcap: float = 0.0
    rope: int = 0


@dataclass(frozen=True)
class Layer:
    """One decoder layer: x + attention(norm x), then x + ffn(norm x).

    Attributes:
        router, experts, expert: the mixture; ``expert`` holds offsets into a slab. None and 0: a dense layer.
        kinds, kind_of: where slabs differ, what stands for ``expert``, and the number of each expert's own.
        shared: shared experts, or the dense block. shared_gate: [1, hidden]; its sigmoid weighs the shared branch.
    """

    attention_norm: Floats
    ffn_norm: Floats
    attention: Attention
    router: Router | None = None
    experts: int = 0
    expert: Ffn | None = None
    kinds: Sequence[Ffn] = ()
    kind_of: Sequence[int] = ()
    shared: Ffn | None = None
    shared_gate: Matrix | None = None
    attention_norm_bias: Floats | None = None
    ffn_norm_bias: Floats | None = None

    def ffn_of(self, expert: int) -> Ffn | None:
        """The matrices of an expert, as offsets into its slab."""
        return self.kinds[self.kind_of[expert]] if self.kinds else self.expert


@dataclass(frozen=True)
class Description:
    """A decoder-only model as the kernels read it.

    Attributes:
        norm: "rms" or "layer". norm_add: added to RMS weights (1 for Gemma).
        inv_freq: rope tables, float32 [rotary / 2].
        rope_factor: multiplies cos and sin. rope_interleaved: pairs (2i, 2i + 1) turn instead of (i, i + rotary / 2).
        gate: a router of token ids for some layers (``engine.token_router.Gate``); steps know nothing of it.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    embedding: Matrix
    head: Matrix
    final_norm: Floats
    layers: Sequence[Layer]
    inv_freq: Sequence[Floats] = ()
    final_norm_bias: Floats | None = None
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_add: float = 0.0
    rope_factor: float = 1.0
    rope_interleaved: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    gate: Any = None
    keep: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, layer in enumerate(self.layers):
            if layer.router is not None and not 0 <= layer.router.ahead <= index:
                raise ConfigError(f"layer {index}: its router reads ahead={layer.router.ahead} layers before")

    def routed_at(self, layer: int) -> list[int]:
        """Layers whose routers read the input of the experts of ``layer``, itself perhaps among them."""
        routers = [(index, there.router) for index, there in enumerate(self.layers)]
        return [index for index, router in routers if router is not None and index - router.ahead == layer]

    @property
    def rotary(self) -> int:
        """Dimensions of a head that turn."""
        return 2 * len(self.inv_freq[0]) if len(self.inv_freq) else 0


class Steps(Protocol):
    """One forward over some rows, call by call: begin, then for each layer attention, routes, experts..., finish, then
    logits. A row gets the same bits whatever other rows, chunks or waves run with it."""

    page_bytes: int

    def begin(self, tokens: Ints, positions: Ints, rows_of: Ints, tables: Ints) -> None:
        """Rows of a step: int32 [R] each; tables int32 [S, P] of page ids.

        Raises:
            ValueError: an id is out of range.
        """

    def attention(self, layer: int) -> None:
        """Attention block of a layer, and the routing of all whose routers read its input; writes keys and values at
        the rows' positions."""

    def chosen(self, layer: int) -> tuple[Ints, Floats]:
        """Experts [R, k], best first (equal scores: lower id first), and their weights, by the layer's own router.

        Known as soon as the layer whose input that router reads has run its attention.
        """

    def scores(self, layer: int) -> Floats:
        """Router logits [R, E] of the layer whose attention ran last, or of one that is routed ahead."""

    def peek(self, layer: int, other: int) -> Floats:
        """Router logits [R, E] of layer ``other`` for the input of the experts of ``layer``, whose attention ran last.

        Raises:
            ValueError: another layer's attention ran last, or ``other`` has no experts.
        """

    def routes(self, layer: int, ids: Ints, weights: Floats) -> None:
        """The routes [R, k] to follow; a negative id is no expert."""

    def experts(self, layer: int, ids: Ints, slabs: Addresses) -> None:
        """Compute ascending ``ids``, whose slabs start at ``slabs``. Calls may come in any order of ids."""

    def finish(self, layer: int) -> None:
        """Shared branch and residual; all experts with rows must have come."""

    def run(self, from_layer: int, to_layer: int) -> None:
        """Whole layers, whose slabs are all resident."""

    def logits(self, want: Ints) -> Floats:
        """float32 [len(want), vocab]. Raises RuntimeError naming the place of a NaN or an infinity."""

    def copy_page(self, src: int, dst: int) -> None:
        """Keys and values of 16 positions, all layers."""


class Kernels(Protocol):
    """A maker of steps, and the product on its own."""

    name: str

    def features(self) -> dict[str, Any]:
        """What runs: {"isa": ..., "available": [...]}."""

    def linear(self, matrix: Matrix, x: Floats) -> Floats:
        """x [R, K] -> x W^T [R, N]."""

    def build(
        self, description: Description, *, pages: int, threads: int, slabs: dict[int, Addresses] | None = None
    ) -> Steps:
        """Steps over a cache of ``pages`` pages. slabs: addresses of all experts of a layer, where all are resident."""
