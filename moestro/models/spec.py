"""FamilySpec: what Moestro must know about one family of Transformers models, as data.

A family file holds one frozen ``SPEC``. It imports neither torch nor transformers, so that planners, the
engine and the command line can read it from a config and tensor names alone. Paths are written relative to a
*stack* (the module whose forward is one routing context: a decoder, an encoder) with ``{layer}`` for the
index of a layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moestro.core.errors import FamilyError
from moestro.models.weights import Chain


Kind = Literal["mlp", "attention", "linear", "norm", "embedding", "block", "stack", "head"]
KINDS: tuple[Kind, ...] = ("mlp", "attention", "linear", "norm", "embedding", "block", "stack", "head")

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Transformers' names of activations and those of ``moestro.ops``."""

_MISSING = object()


@dataclass(frozen=True)
class Get:
    """Reads a model config, be it a Transformers config object or the mapping of a ``config.json``."""

    config: Any

    def __call__(self, *names: str, default: Any = _MISSING) -> Any:
        """The value of the first of ``names`` that is there and not None, else ``default``.

        Raises:
            FamilyError: none of the names is there and no default was given.
        """
        for name in names:
            if isinstance(self.config, Mapping):
                value = self.config.get(name)
            else:
                value = getattr(self.config, name, None)
            if value is not None:
                return value
        if default is _MISSING:
            kind = self("model_type", default="model")
            raise FamilyError(f"the {kind} config has no {' or '.join(repr(name) for name in names)}")
        return default


@dataclass(frozen=True, kw_only=True)
class StackSpec:
    """One stack: the module that opens a routing context, and the sites inside it.

    Attributes:
        cls: name of the module's class (a subclass counts).
        name: what the context is called, ``decoder`` or ``encoder``.
        attribute: last part of the module's path where several stacks share one class, else None.
        num_layers: config keys of the number of layers, the first present wins.
        sites: kind to paths relative to the stack.
    """

    cls: str
    name: str
    attribute: str | None = None
    num_layers: tuple[str, ...] = ("num_hidden_layers",)
    sites: Mapping[Kind, tuple[str, ...]] = field(default_factory=dict)

    @property
    def mlp(self) -> str:
        """Path of the feed-forward site of a layer."""
        return self.sites["mlp"][0]


@dataclass(frozen=True, kw_only=True)
class FFNSpec:
    """A layer's dense feed-forward.

    Attributes: gate, up, down: paths of the projections under the mlp site; ``gate`` is None where the FFN
            is not gated. activation: config key that names the activation. split: True where the FFN is no
            module of its own (BERT): ``down`` is then a path under the block, and becomes an identity when
            something else stands at the mlp site.
    """

    gate: str | None
    up: str
    down: str
    activation: str = "hidden_act"
    split: bool = False


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One tensor of a MoE layer and the tensors of a checkpoint that hold it.

    Attributes:
        target: name under the MoELayer, for example ``bank.gate_up_proj``.
        sources: names under the block on disk; ``{expert}`` runs over the experts, fastest.
        chain: how the target is cut into the sources.
        projections: the word for each source in messages and ledgers.
    """

    target: str
    sources: tuple[str, ...]
    chain: Chain = ()
    projections: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of naming and packing the tensors of a MoE block.

    Attributes:
        name: ``split`` (one tensor an expert), ``stacked`` (three-dimensional) or a word of the family's own.
        rules: the tensors that change shape or name one by one.
        moves: prefixes under the block and what they are called under the MoELayer, for whole submodules.
        block: path of the block relative to the stack when it differs from the mlp site's.
        stock: this is how the Transformers module itself names them.
    """

    name: str
    rules: tuple[Rule, ...]
    moves: tuple[tuple[str, str], ...] = ()
    block: str | None = None
    stock: bool = False


@dataclass(frozen=True, kw_only=True)
class SharedSpec:
    """The branch every token takes: submodule of the stock block, and the linear that gates it, if any."""

    module: str
    gate: str | None = None


@dataclass(frozen=True, kw_only=True)
class AuxLoss:
    """A loss that the stock model adds to its own when ``output_router_logits`` is set.

    Attributes:
        name: what the loss is called in a mixture layer and in a recipe's weights.
        method: id of the loss method that takes it over. config: its settings.
        coefficient: config keys of its weight; a weight of 0 or no such key means no loss.
    """

    name: str
    method: str
    coefficient: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """How a family's stock MoE block maps to a MoELayer.

    Attributes:
        block: class name of the stock block.
        is_moe: whether layer ``layer`` of stack ``stack`` is a mixture, from the config alone.
        num_experts, top_k, inner: config keys of the expert count, choices per token, width of an expert.
        router: id of the router method. router_config: the fields of that method from the config.
        router_keys: field of the router -> config key it comes from, for writing a config from a router.
        dense_layers: config key with the list of layers that are no mixtures, where the family has one.
        layouts: every packing a checkpoint may have; exactly one is ``stock``.
        activation: config key of the experts' activation, or ``=name`` for a fixed one.
        gated, bias: form of an expert.
        jitter: config key of the input noise while training, or None.
        returns_tuple: the stock block returns ``(output, router scores)``.
        losses: auxiliary losses of the stock model.
    """

    block: str
    is_moe: Callable[[Get, int, str], bool]
    num_experts: tuple[str, ...]
    top_k: tuple[str, ...] | int
    inner: tuple[str, ...]
    router: str
    router_config: Callable[[Get], dict[str, Any]]
    layouts: tuple[Layout, ...]
    router_keys: Mapping[str, str] = field(default_factory=dict)
    dense_layers: str | None = None
    activation: str = "hidden_act"
    gated: bool = True
    bias: bool = False
    jitter: str | None = None
    returns_tuple: bool = False
    shared: SharedSpec | None = None
    losses: tuple[AuxLoss, ...] = ()

    @property
    def stock(self) -> Layout:
        """The packing of the Transformers module itself."""
        return next(layout for layout in self.layouts if layout.stock)


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """One family.

    Attributes: model_types: the ``model_type`` values of its configs; the first names the family. stacks: in
            the order in which they run. ffn: the dense feed-forward (of the dense layers, in a MoE family).
            moe: None for a dense family. heads: paths of output heads relative to the model, for every class
            of the family. prefix: ``base_model_prefix``; checkpoints of a bare stack lack it. attention:
            kind of attention, for the native engine and for conversions: ``gqa`` (grouped queries, rotary),
            ``gqa+qk_norm``, ``gqa+sinks``, ``gqa+residual_scale``, ``mla``, ``t5``, ``bert``.
        parallel: attention and feed-forward read the same normalised input (Cohere).
        renames: old names in checkpoints as (regular expression, replacement), applied to every key.
        ignored: regular expressions of checkpoint tensors that Transformers leaves out too.
    """

    model_types: tuple[str, ...]
    stacks: tuple[StackSpec, ...]
    ffn: FFNSpec
    moe: MoESpec | None = None
    heads: tuple[str, ...] = ("lm_head", "score", "qa_outputs")
    prefix: str = "model"
    attention: str = "gqa"
    parallel: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = (r"(^|\.)rotary_emb\.inv_freq$",)

    @property
    def name(self) -> str:
        """The family's name: its first model type."""
        return self.model_types[0]

    @property
    def kind(self) -> Literal["dense", "moe"]:
        """``moe`` if the stock model has experts."""
        return "dense" if self.moe is None else "moe"

    def stack(self, name: str) -> StackSpec:
        """The stack of that name."""
        for stack in self.stacks:
            if stack.name == name:
                return stack
        raise FamilyError(f"{self.name} has no stack {name!r}, it has {', '.join(s.name for s in self.stacks)}")

    def moe_layers(self, config: Any, stack: str = "decoder") -> list[int]:
        """Indices of the mixture layers of a stack, from the config alone (object or mapping)."""
        if self.moe is None:
            return []
        get = Get(config)
        count = int(get(*self.stack(stack).num_layers))
        return [layer for layer in range(count) if self.moe.is_moe(get, layer, stack)]


def activation(get: Get, key: str) -> str:
    """The name in ``moestro.ops`` of the activation that config key ``key`` (or ``=name``) asks for."""
    if key.startswith("="):
        return key[1:]
    name = get(key)
    if name not in ACTIVATIONS:
        raise FamilyError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
