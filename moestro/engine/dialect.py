"""What a packed model says of itself: the settings of a decoder, and the tensors they call for.

``native`` models are written out in full: the engine's own forward runs them from this description alone. ``modules``
models keep the parameter names of their Transformers modules, which run everything but the experts.
"""

from typing import Final, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from moestro.core.config import Config
from moestro.core.errors import ConfigError


Shape = tuple[int, ...]
MOST = 1 << 24
"""Of any count or width."""

VECTOR: Final = "vector"
"""Layout of a float32 vector."""

TERNARY_WORDS: Final = "ternary_words"
"""The resident tensor with the strings of ternary words: 65536 numbers of 64 bits."""

ROUTERS: Final = ("softmax_topk", "topk_softmax", "sigmoid_bias", "decoupled")


class _Strict(Config):
    model_config = ConfigDict(strict=True)


class RouterSpec(_Strict):
    """How a layer chooses.

    Attributes:
        kind: ``softmax_topk`` (softmax over all, then the k best), ``topk_softmax`` (softmax over the k best logits),
            ``sigmoid_bias`` (sigmoids; ``select_bias`` shifts what is ranked, not what weighs) or ``decoupled`` (the
            model's pre-gate names one expert for all such layers; it weighs 1).
        bias: logits have one. renormalise: the k weights are divided by their sum. scale: multiplies the weights.
        groups, top_groups: only experts of the best groups, by the sum of their two best, may be chosen.
        ahead: the router reads what a router of the layer so many before would read; that layer has experts too.
    """

    kind: Literal["softmax_topk", "topk_softmax", "sigmoid_bias", "decoupled"]
    top_k: int = Field(ge=1, le=MOST)
    bias: bool = False
    renormalise: bool = False
    scale: float = 1.0
    groups: int = Field(default=1, ge=1, le=MOST)
    top_groups: int = Field(default=1, ge=1, le=MOST)
    ahead: int = Field(default=0, ge=0, le=MOST)


class TokenRouterSpec(_Strict):
    """A router of token ids for all layers at once: an embedding, one causal block, a map to logits.

    Attributes:
        vocab: ids it knows. dim: its width. heads: of its attention; dim / heads is even. experts: it chooses among.
    """

    vocab: int = Field(ge=1, le=MOST)
    dim: int = Field(ge=2, le=MOST)
    heads: int = Field(ge=1, le=MOST)
    experts: int = Field(ge=1, le=MOST)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise ConfigError(f"token_router: {self.heads} heads over {self.dim} dimensions; each takes an even number")
        return self

    def tensors(self) -> dict[str, Shape]:
        """Names and shapes; the layout of the matrices is f32."""
        dim = self.dim
        shapes: dict[str, Shape] = {"embedding": (self.vocab, dim)}
        shapes |= dict.fromkeys(("attention_norm", "mlp_norm", "last_norm"), (dim,))
        shapes |= {"qkv": (3 * dim, dim), "head": (self.experts, dim)}
        return shapes | dict.fromkeys(("out", "up", "down"), (dim, dim))


class AttentionSpec(_Strict):
    """Grouped-query attention.

    Attributes:
        scale: of the products of queries and keys. bias: which of q, k, v, o have one.
        qk_norm: ``head`` (each head by itself) or ``all`` (all heads together). rope: number of the table of
            frequencies. window: positions a query sees back, itself included; 0: all. softcap: 0: none.
    """

    scale: float
    bias: tuple[Literal["q", "k", "v", "o"], ...] = Field(default=(), strict=False)
    qk_norm: Literal["none", "head", "all"] = "none"
    rope: int = Field(default=0, ge=0, le=MOST)
    window: int = Field(default=0, ge=0)
    softcap: float = 0.0


class LayerSpec(_Strict):
    """One layer.

    Attributes:
        attention: None in ``modules``. experts: 0 in a dense layer. inner: width of an expert. site: module path of the
            feed-forward. gated, activation: form of the experts and of the branch beside them; bias: experts have one.
        shared: width of the branch every token takes (the whole feed-forward of a dense layer), 0: none.
        shared_gate: a sigmoid weighs that branch.
    """

    attention: AttentionSpec | None = None
    router: RouterSpec | None = None
    experts: int = Field(default=0, ge=0, le=MOST)
    inner: int = Field(default=0, ge=0, le=MOST)
    site: str = ""
    gated: bool = True
    bias: bool = False
    activation: str = "silu"
    shared: int = Field(default=0, ge=0, le=MOST)
    shared_gate: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.experts and not self.inner:
            raise ConfigError(f"{self.experts} experts of width 0")
        if self.router is not None and self.router.top_k > self.experts:
            raise ConfigError(f"top_k={self.router.top_k} of {self.experts} experts")
        if self.router is not None and self.experts % self.router.groups:
            raise ConfigError(f"{self.experts} experts in {self.router.groups} equal groups")
        return self

    @property
    def projections(self) -> tuple[str, ...]:
        """Matrices of an expert in the order of its slab."""
        return ("gate", "up", "down") if self.gated else ("up", "down")

    def parts(self, hidden: int) -> dict[str, Shape]:
        """Shapes of an expert's parts in the order of its slab: matrices, then biases."""
        shapes: dict[str, Shape] = {
            name: (hidden, self.inner) if name == "down" else (self.inner, hidden) for name in self.projections
        }
        if self.bias:
            shapes |= {f"{name}_bias": (shape[0],) for name, shape in shapes.items()}
        return shapes


class ModelSpec(_Strict):
    """A decoder.

    Attributes:
        dialect: who can run it, see the top of the file. why: what keeps a ``modules`` model from being native.
        family: Transformers' model type. hash: fingerprint of the checkpoint it was made from.
        hidden, heads, kv_heads, head_dim, vocab: sizes. tied: the head is the embedding.
        positions: the model was made for, 0: unknown. eos: ids that end a text.
        norm: ``rms`` or ``layer``. norm_add: added to the weights of norms. rotary: dimensions of a head that turn.
        ropes: number of tables of frequencies. rope_factor: multiplies cosines and sines. rope_interleaved: pairs
            (2 i, 2 i + 1) turn, not (i, i + rotary / 2).
        embed_scale, residual_scale, logit_scale: factors. logit_softcap: 0: none.
        token_router: the router of all ``decoupled`` layers.
        ternary: zeros in a thousand symbols that the table of ternary words is made for, 0: there is none.
    """

    dialect: Literal["native", "modules"]
    why: str = ""
    family: str
    hash: str
    hidden: int = Field(ge=1, le=MOST)
    vocab: int = Field(ge=1, le=MOST)
    heads: int = Field(default=1, ge=1, le=MOST)
    kv_heads: int = Field(default=1, ge=1, le=MOST)
    head_dim: int = Field(default=1, ge=1, le=MOST)
    tied: bool = False
    positions: int = Field(default=0, ge=0)
    eos: tuple[int, ...] = Field(default=(), strict=False)
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = Field(default=1e-6, ge=0)
    norm_add: float = 0.0
    rotary: int = Field(default=0, ge=0, le=MOST)
    ropes: int = Field(default=0, ge=0, le=MOST)
    rope_factor: float = 1.0
    rope_interleaved: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    token_router: TokenRouterSpec | None = None
    ternary: int = Field(default=0, ge=0, le=999)
    layers: tuple[LayerSpec, ...] = Field(strict=False, max_length=1 << 12)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dialect == "modules":
            return self
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads={self.heads} are no multiple of kv_heads={self.kv_heads}")
        if self.rotary > self.head_dim or self.rotary % 2:
            raise ConfigError(f"rotary={self.rotary}: an even number of the head's {self.head_dim} dimensions turns")
        for index, layer in enumerate(self.layers):
            if layer.attention is None or (layer.router is None) != (layer.experts == 0) or layer.bias:
                raise ConfigError(f"layer {index}: a native layer has attention, experts without bias and their router")
            ahead = 0 if layer.router is None else layer.router.ahead
            if ahead and (ahead > index or not self.layers[index - ahead].experts):
                raise ConfigError(f"layer {index}: ahead={ahead}, but layer {index - ahead} is no mixture")
            if not layer.experts and not layer.shared:
                raise ConfigError(f"layer {index} has no feed-forward")
            if self.rotary and layer.attention.rope >= self.ropes:
                raise ConfigError(f"layer {index}: table of frequencies {layer.attention.rope} of {self.ropes}")
        self._decoupled()
        return self

    def _decoupled(self) -> None:
        """Raise ConfigError unless the router of token ids and the layers that follow it fit one another."""
        layers = {index: self.layers[index] for index in self.decoupled}
        if bool(layers) != (self.token_router is not None):
            raise ConfigError(
                f"{len(layers)} decoupled layers and {'a' if self.token_router else 'no'} router of token ids"
            )
        for index, layer in layers.items():
            assert self.token_router is not None
            assert layer.router is not None
            if layer.experts != self.token_router.experts or layer.router.top_k != 1:
                raise ConfigError(
                    f"layer {index}: top {layer.router.top_k} of {layer.experts} experts under a router of token "
                    f"ids that names 1 of {self.token_router.experts}"
                )
            if self.token_router.vocab < self.vocab:
                raise ConfigError(f"a router of {self.token_router.vocab} token ids for a vocabulary of {self.vocab}")

    @property
    def decoupled(self) -> tuple[int, ...]:
        """Layers that the router of token ids decides."""
        routers = ((index, layer.router) for index, layer in enumerate(self.layers))
        return tuple(index for index, router in routers if router is not None and router.kind == "decoupled")

    def tensors(self) -> dict[str, Shape]:
        """Names and shapes of a native model's resident tensors; one axis: a float32 vector, two: a matrix."""
        shapes: dict[str, Shape] = {"embedding": (self.vocab, self.hidden)}
        if not self.tied:
            shapes["head"] = (self.vocab, self.hidden)
        if self.ternary:
            shapes[TERNARY_WORDS] = (1 << 16,)
        shapes |= self._norm("final_norm")
        if self.rotary:
            shapes |= {f"rope.{index}": (self.rotary // 2,) for index in range(self.ropes)}
        if self.token_router is not None:
            shapes |= {f"token_router.{name}": shape for name, shape in self.token_router.tensors().items()}
        for index, layer in enumerate(self.layers):
            found = {**self._norm("attention_norm"), **self._norm("ffn_norm")}
            found |= self._attention(layer) | self._feed_forward(layer)
            shapes |= {f"layers.{index}.{name}": shape for name, shape in found.items()}
        return shapes

    def _norm(self, name: str) -> dict[str, Shape]:
        both = (name, f"{name}_bias") if self.norm == "layer" else (name,)
        return dict.fromkeys(both, (self.hidden,))

    def _attention(self, layer: LayerSpec) -> dict[str, Shape]:
        assert layer.attention is not None
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, Shape] = {
            "q": (wide, self.hidden),
            "k": (narrow, self.hidden),
            "v": (narrow, self.hidden),
            "o": (self.hidden, wide),
        }
        shapes |= {f"{name}_bias": (shapes[name][0],) for name in layer.attention.bias}
        if layer.attention.qk_norm != "none":
            one = layer.attention.qk_norm == "head"
            shapes |= {
                "q_norm": (self.head_dim if one else wide,),
                "k_norm": (self.head_dim if one else narrow,),
            }
        return shapes

    def _feed_forward(self, layer: LayerSpec) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        if layer.router is not None and layer.router.kind != "decoupled":
            shapes["router"] = (layer.experts, self.hidden)
            if layer.router.bias:
                shapes["router_bias"] = (layer.experts,)
            if layer.router.kind == "sigmoid_bias":
                shapes["select_bias"] = (layer.experts,)
        if layer.shared:
            for name in layer.projections:
                down = name == "down"
                shapes[f"shared.{name}"] = (self.hidden, layer.shared) if down else (layer.shared, self.hidden)
        if layer.shared_gate:
            shapes["shared_gate"] = (1, self.hidden)
        return shapes
