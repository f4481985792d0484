"""Sizes from headers, from a config, and from modules that have been built (on the meta device too)."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moestro.core.errors import LoadError
from moestro.models.families import family
from moestro.models.sizing import Amount, Attention, LayerSize, MixtureSize, ModelSize, Part, total
from moestro.models.sizing_names import Names, Place, has_language_head
from moestro.models.spec import FamilySpec, Get


if TYPE_CHECKING:
    from moestro.core.layer import MoELayer

HALF = 2


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor as a header tells of it."""

    name: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def parameters(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass
class _Layer:
    """What has been found of one layer so far."""

    parts: dict[Part, Amount] = field(default_factory=lambda: defaultdict(Amount))
    experts: Amount = field(default_factory=Amount)
    ids: set[int] = field(default_factory=set)
    mixtures: list[MixtureSize] = field(default_factory=list)


def size_of_weights(name: str, weights: Iterable[Weight], config: Any, spec: FamilySpec | None = None) -> ModelSize:
    """The size of a model whose tensors have the names of a checkpoint or of the Transformers modules.

    Args:
        name: for messages and reports. weights: names, shapes, bytes; tied copies may be there or not.
        config: the Transformers config object. spec: its family, looked up when None.

    Raises:
        LoadError: the tensors and the config do not agree on the layers or on the number of experts.
        FamilyError: unknown model type.
    """
    spec = spec or family(config)
    collector = _Collector(Names(spec, config), spec, config)
    for weight in weights:
        collector.add(weight)
    return collector.finish(name)


def size_of_config(config: Any, *, name: str = "config", spec: FamilySpec | None = None) -> ModelSize:
    """The size of a model that does not exist yet, from its Transformers config alone.

    The Transformers class is built on the meta device, so that every tensor has its true name and shape and none has
    storage. Bytes are those of the config's ``dtype``, float32 where it names none.

    Raises:
        LoadError: Transformers has no class for the config. FamilyError: unknown model type.
    """
    import torch

    from moestro.models.skeleton import model_class

    spec = spec or family(config)
    with torch.device("meta"):
        model = model_class(config, None)(config)
    itemsize = _config_itemsize(config)
    weights = [Weight(key, tuple(t.shape), t.numel() * itemsize) for key, t in stored_tensors(model)]
    return replace(size_of_weights(name, weights, config, spec), itemsize=itemsize)


def size_of_model(model: nn.Module, *, name: str | None = None, stored: Mapping[str, int] | None = None) -> ModelSize:
    """The size of a model that has been built, with whatever stands at its sites; on the meta device too.

    Mixture layers are counted by their banks (``flops_per_row``), so that any bank's own arithmetic holds; everything
    else by names. A module of no known family is one layer whose weights of two dimensions are matrices.

    Args:
        model: a module. name: for reports. stored: bytes on disk by parameter name, where they are known.
    """
    from moestro.core.layer import MoELayer

    config = getattr(model, "config", None)
    spec = family(config) if Get(config)("model_type", default=None) is not None else None
    collector = _Collector(Names(spec, config), spec, config)
    mixtures = {path: module for path, module in model.named_modules() if isinstance(module, MoELayer)}
    by_type = _parts_by_type(model) if spec is None else {}
    for key, tensor in stored_tensors(model):
        nbytes = (stored or {}).get(key, tensor.numel() * tensor.element_size())
        weight = Weight(key, tuple(tensor.shape), nbytes)
        path = next((path for path in mixtures if key.startswith(f"{path}." if path else "")), None)
        if path is None:
            collector.add(weight, by_type.get(key))
        else:
            collector.add_mixed(weight, key.removeprefix(path).removeprefix("."), path)
    for path, module in mixtures.items():
        collector.close_mixture(path, module)
    found = collector.finish(name or type(model).__name__)
    first = next(iter(model.parameters()), None)
    return found if first is None else replace(found, itemsize=first.element_size())


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors that a checkpoint of the model holds, tied ones once: parameters and persistent buffers."""
    yield from model.named_parameters()
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{path}.{name}" if path else name), buffer


class _Collector:
    """Adds tensors up, layer by layer and part by part."""

    def __init__(self, names: Names, spec: FamilySpec | None, config: Any) -> None:
        self.names, self.spec, self.config = names, spec, config
        self.layers: dict[tuple[str, int], _Layer] = defaultdict(_Layer)
        self.outside: dict[Part, Amount] = defaultdict(Amount)
        self.banks: dict[str, Amount] = defaultdict(Amount)
        self.tied = bool(Get(config)("tie_word_embeddings", default=False)) if config is not None else False
        self.vocabulary: tuple[int, ...] | None = None
        self.head_matrix = self.once = 0
        self.output_head = False
        self.widths: list[int] = []

    def add(self, weight: Weight, part: Part | None = None) -> None:
        """A tensor outside Moestro's mixture layers."""
        if self.names.ignored(weight.name):
            return
        place = self.names.place(weight.name) if part is None else Place(part)
        if place.layer is None:
            self._add_outside(weight, place.part)
            return
        assert place.stack is not None
        layer = self.layers[place.stack, place.layer]
        amount = Amount(weight.parameters, _matrix(weight, place.part), weight.nbytes)
        if place.part != "experts":
            layer.parts[place.part] += amount
            return
        layer.experts += amount
        layer.ids.update(range(weight.shape[0]) if place.expert is None else (place.expert,))

    def _add_outside(self, weight: Weight, part: Part) -> None:
        matrix = _matrix(weight, part)
        if part == "embedding" and len(weight.shape) == 2 and self._is_vocabulary(weight):
            if self.vocabulary is not None:
                return  # encoder and decoder share one table; further names are copies
            self.vocabulary = weight.shape
        if part == "head" and matrix:
            if self.tied and weight.name.endswith(("lm_head.weight", "decoder.weight")):
                return
            if self.names.once(weight.name):
                self.once += weight.parameters
            else:
                self.head_matrix += weight.parameters
            self.output_head |= weight.name.endswith(("lm_head.weight", "decoder.weight"))
        if part == "head" and self.tied and weight.name.endswith("decoder.bias"):
            return
        self.outside[part] += Amount(weight.parameters, matrix, weight.nbytes)

    def _is_vocabulary(self, weight: Weight) -> bool:
        return weight.shape[0] == int(Get(self.config)("vocab_size", default=weight.shape[0]))

    def add_mixed(self, weight: Weight, inside: str, path: str) -> None:
        """A tensor of a MoELayer; ``inside`` is its name there."""
        word = inside.partition(".")[0]
        if word == "bank":
            self.banks[path] += Amount(weight.parameters, 0, weight.nbytes)
            return
        part: Part = "router" if word in ("router", "losses") else "shared"
        amount = Amount(weight.parameters, _matrix(weight, part), weight.nbytes)
        parts = self._parts_at(path)
        parts[part] += amount

    def _parts_at(self, path: str) -> dict[Part, Amount]:
        place = self.names.place(f"{path}.weight")
        return self.outside if place.layer is None else self.layers[place.stack or "", place.layer].parts

    def close_mixture(self, path: str, module: "MoELayer") -> None:
        """Turn what was found of a bank into a mixture, with the bank's own operations."""
        bank, router = module.bank, module.router
        count = bank.num_experts
        flops = sum(bank.flops_per_row(expert) for expert in range(count))
        experts = replace(self.banks[path], matrix=flops // 2)
        choices = router.num_experts + router.num_null
        top_k = count if router.top_k is None else router.top_k * router.num_experts / choices
        mixture = MixtureSize(path=path, num_experts=count, top_k=top_k, experts=experts)
        place = self.names.place(f"{path}.weight")
        self.layers[place.stack or "", place.layer or 0].mixtures.append(mixture)

    def finish(self, name: str) -> ModelSize:
        """Check what was found against the config and put it together."""
        if self.tied and self.vocabulary is not None and has_language_head(self.config):
            self.head_matrix += math.prod(self.vocabulary)
        layers = []
        for stack, index in self._order(name):
            found = self.layers[stack, index]
            if found.experts.parameters:
                found.mixtures.append(self._stock_mixture(name, stack, index, found))
            layers.append(
                LayerSize(
                    stack=stack,
                    index=index,
                    parts=dict(found.parts),
                    mixtures=tuple(found.mixtures),
                    attentions=()
                    if self.spec is None or not stack
                    else attentions(self.spec, self.config, stack, index),
                )
            )
        return ModelSize(
            name=name,
            family="module" if self.spec is None else self.spec.name,
            layers=tuple(layers),
            outside=dict(self.outside),
            head_matrix=self.head_matrix,
            once=self.once,
            itemsize=self._itemsize(),
            width=self.vocabulary[1] if self.vocabulary else 0,
            vocabulary=self.vocabulary[0] if self.vocabulary else 0,
            positions=Get(self.config)("max_position_embeddings", default=None),
        )

    def _order(self, name: str) -> list[tuple[str, int]]:
        """Stacks in the order of the family's table, layers ascending; all that the config names, and no others."""
        if self.spec is None:
            return sorted(self.layers)
        get, order = Get(self.config), []
        for stack in self.spec.stacks:
            wanted = list(range(int(get(*stack.num_layers))))
            found = sorted(index for known, index in self.layers if known == stack.name)
            if found != wanted:
                raise LoadError(
                    f"{name}: the config asks for {len(wanted)} {stack.name} layers, the tensors are those of "
                    f"{len(found)}; first difference: layer {min(set(found) ^ set(wanted))}"
                )
            order += [(stack.name, index) for index in wanted]
        return order + sorted(key for key in self.layers if key[0] == "")

    def _stock_mixture(self, name: str, stack: str, index: int, found: _Layer) -> MixtureSize:
        assert self.spec is not None
        assert self.spec.moe is not None
        get, moe = Get(self.config), self.spec.moe
        count = int(get(*moe.num_experts))
        if found.ids != set(range(count)):
            raise LoadError(
                f"{name}: {stack} layer {index}: the config asks for {count} experts, the tensors are those of "
                f"{len(found.ids)}"
            )
        top_k = moe.top_k if isinstance(moe.top_k, int) else int(get(*moe.top_k))
        if not 1 <= top_k <= count:
            raise LoadError(f"{name}: the config asks for {top_k} of {count} experts a token")
        path = self.spec.stack(stack).mlp.format(layer=index)
        return MixtureSize(path=path, num_experts=count, top_k=top_k, experts=found.experts)

    def _itemsize(self) -> int:
        """Bytes of a number in the cache: 2 where weights are 16 bits wide, else 4 (packed ones are computed so)."""
        whole = total(self.outside.values()) + total(
            layer.experts + total(layer.parts.values()) for layer in self.layers.values()
        )
        return HALF if whole.nbytes == HALF * whole.parameters else 4


def _matrix(weight: Weight, part: Part) -> int:
    """Matrix weights of a tensor. Norms of several heads have two dimensions and are no matrices."""
    words = weight.name.rsplit(".", 2)
    flat = len(weight.shape) < 2 or words[-1].endswith("bias") or "relative_attention_bias" in weight.name
    return 0 if flat or part == "norm" else weight.parameters


def _config_itemsize(config: Any) -> int:
    import torch

    kind = Get(config)("dtype", "torch_dtype", default=torch.float32)
    kind = kind if isinstance(kind, torch.dtype) else getattr(torch, str(kind).removeprefix("torch."), torch.float32)
    assert isinstance(kind, torch.dtype)
    return kind.itemsize


def _parts_by_type(model: nn.Module) -> dict[str, Part]:
    """Parts of the parameters of a module of no known family, by the classes that hold them."""
    found: dict[str, Part] = {}
    for path, module in model.named_modules():
        part: Part = "dense"
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            part = "embedding"
        elif "norm" in type(module).__name__.lower():
            part = "norm"
        for key, _ in module.named_parameters(recurse=False):
            found[f"{path}.{key}" if path else key] = part
    return found


def attentions(spec: FamilySpec, config: Any, stack: str, layer: int) -> tuple[Attention, ...]:
    """The attentions of one layer, from the config alone."""
    get = Get(config)
    if spec.attention == "t5":
        return _t5(get, stack)
    heads = int(get("num_attention_heads"))
    if spec.attention == "mla":
        nope, rope, value = (int(get(f"{word}_head_dim")) for word in ("qk_nope", "qk_rope", "v"))
        rank = int(get("kv_lora_rank"))
        expand = rank * heads * (nope + value)
        return (Attention(heads=heads, qk_dim=nope + rope, v_dim=value, cached=rank + rope, expand=expand),)
    width = int(get("head_dim", default=int(get("hidden_size")) // heads))
    if spec.attention == "bert":
        return (Attention(heads=heads, qk_dim=width, v_dim=width, causal=False),)
    kv_heads = int(get("num_key_value_heads", default=heads))
    window = _window(get, layer)
    return (Attention(heads=heads, qk_dim=width, v_dim=width, window=window, cached=2 * kv_heads * width),)


def _t5(get: Get, stack: str) -> tuple[Attention, ...]:
    heads, width = int(get("num_heads")), int(get("d_kv"))
    if stack == "encoder":
        return (Attention(heads=heads, qk_dim=width, v_dim=width, causal=False),)
    cached = 2 * heads * width
    own = Attention(heads=heads, qk_dim=width, v_dim=width, cached=cached)
    source = cached * int(get("d_model"))
    return own, replace(own, causal=False, cross=True, source_matrix=source)


def _window(get: Get, layer: int) -> int | None:
    """Positions a query of the layer sees, from ``layer_types`` where there are any; None for all."""
    kinds = get("layer_types", default=None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return get("sliding_window", default=None) or None
