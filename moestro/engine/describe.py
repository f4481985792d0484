"""A packed model as the kernels read it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moestro.core.errors import ConfigError, LoadError
from moestro.engine.dialect import TERNARY_WORDS, LayerSpec
from moestro.engine.kernels.interface import LANES, Attention, Description, Ffn, Layer, Matrix, Router
from moestro.engine.layout import Bytes, aligned
from moestro.engine.packed import Packed, Piece
from moestro.engine.ternary import CODED, Table, check_table
from moestro.engine.token_router import Gate


def describe(packed: Packed, resident: Mapping[str, Bytes]) -> Description:
    """The description of a native model over tensors that ``packed.resident()`` read.

    Raises:
        LoadError: a model that only Transformers' modules can run.
    """
    if packed.model.dialect != "native":
        raise LoadError(f"{packed.path}: the native forward cannot run it: {packed.model.why}")
    return _Reader(packed, resident).whole()


class _Reader:
    def __init__(self, packed: Packed, resident: Mapping[str, Bytes]) -> None:
        self.packed, self.resident = packed, resident
        self.zeros: dict[int, Bytes] = {}
        self.words: Table | None = None
        if packed.model.ternary:
            self.words = resident[TERNARY_WORDS].view(np.uint64)
            try:
                check_table(self.words)
            except ConfigError as error:
                raise LoadError(f"{packed.path}: {error}; pack the model again") from None

    def get(self, name: str) -> Any:
        """A tensor as a Matrix or a float32 vector; None where the model has none of the name."""
        piece = self.packed.tensors.get(name)
        if piece is None:
            return None
        data = self.resident[name]
        if len(piece.shape) == 1:
            return data.view(np.float32)
        return Matrix(piece.layout, piece.shape[0], piece.shape[1], data)

    def whole(self) -> Description:
        model = self.packed.model
        embedding = self.get("embedding")
        return Description(
            hidden=model.hidden,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            vocab=model.vocab,
            embedding=embedding,
            head=embedding if model.tied else self.get("head"),
            final_norm=self.get("final_norm"),
            final_norm_bias=self.get("final_norm_bias"),
            layers=[self.layer(index, layer) for index, layer in enumerate(model.layers)],
            inv_freq=[self.get(f"rope.{index}") for index in range(model.ropes)],
            norm=model.norm,
            norm_eps=model.norm_eps,
            norm_add=model.norm_add,
            rope_factor=model.rope_factor,
            rope_interleaved=model.rope_interleaved,
            embed_scale=model.embed_scale,
            residual_scale=model.residual_scale,
            logit_scale=model.logit_scale,
            logit_softcap=model.logit_softcap,
            gate=self.gate(),
            keep=[self.resident],
        )

    def gate(self) -> Gate | None:
        """The router of all decoupled layers.

        Raises:
            LoadError: it is stored in a layout that rounds.
        """
        model = self.packed.model
        if model.token_router is None:
            return None
        parts = {name: self.get(f"token_router.{name}") for name in model.token_router.tensors()}
        matrices = {name: part for name, part in parts.items() if isinstance(part, Matrix)}
        odd = next((name for name, matrix in matrices.items() if matrix.layout != "f32"), None)
        if odd is not None:
            raise LoadError(f"{self.packed.path}: token_router.{odd} is {matrices[odd].layout}; it must be f32")
        norms = {name: part for name, part in parts.items() if name not in matrices}
        return Gate(model.token_router, matrices, norms, frozenset(model.decoupled))

    def layer(self, index: int, spec: LayerSpec) -> Layer:
        def get(name: str) -> Any:
            return self.get(f"layers.{index}.{name}")

        assert spec.attention is not None
        tensors = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm")
        attention = Attention(
            scale=spec.attention.scale,
            qk_norm=spec.attention.qk_norm,
            window=spec.attention.window,
            softcap=spec.attention.softcap,
            rope=spec.attention.rope,
            **{name: get(name) for name in tensors},
        )
        shared = None
        if spec.shared:
            parts = {name: get(f"shared.{name}") for name in spec.projections}
            shared = Ffn(activation=spec.activation, **parts)
        return Layer(
            attention_norm=get("attention_norm"),
            ffn_norm=get("ffn_norm"),
            attention_norm_bias=get("attention_norm_bias"),
            ffn_norm_bias=get("ffn_norm_bias"),
            attention=attention,
            router=self.router(spec, get),
            experts=spec.experts,
            **self.expert(index, spec),
            shared=shared,
            shared_gate=get("shared_gate"),
        )

    def router(self, spec: LayerSpec, get: Any) -> Router | None:
        found = spec.router
        if found is None:
            return None
        if found.kind == "decoupled":  # the kernels rank zeros; the forward says what is followed
            nbytes = -(-spec.experts // LANES) * LANES * self.packed.model.hidden * 4
            if nbytes not in self.zeros:
                self.zeros[nbytes] = aligned(nbytes, 64)
            weight = Matrix("f32", spec.experts, self.packed.model.hidden, self.zeros[nbytes])
            return Router(kind="softmax_topk", top_k=1, weight=weight, renormalise=True)
        return Router(
            kind=found.kind,
            top_k=found.top_k,
            weight=get("router"),
            bias=get("router_bias"),
            select_bias=get("select_bias"),
            renormalise=found.renormalise,
            scale=found.scale,
            groups=found.groups,
            top_groups=found.top_groups,
            ahead=found.ahead,
        )

    def expert(self, index: int, spec: LayerSpec) -> dict[str, Any]:
        if not spec.experts:
            return {}
        there = self.packed.experts[index]
        return {
            "expert": self.ffn(there.parts, spec),
            "kinds": [self.ffn(kind.parts, spec) for kind in there.kinds],
            "kind_of": there.kind_of,
        }

    def ffn(self, pieces: Mapping[str, Piece], spec: LayerSpec) -> Ffn:
        """A form of slab."""
        parts = {}
        for name, piece in pieces.items():
            more = {"size": piece.nbytes, "words": self.words} if piece.layout == CODED else {}
            parts[name] = Matrix(piece.layout, piece.shape[0], piece.shape[1], None, piece.offset, **more)
        return Ffn(activation=spec.activation, **parts)
