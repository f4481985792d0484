"""The parts of a supernet that are sliced and not mixed, and its way back to a plain model.

A slice is the first rows and columns of a matrix: the first channels of the model, the first heads, the first neurons.
Norms and heads slice to the width of what they are given; the others ask for the architecture of the forward.
"""

import copy
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro import ops
from moestro.core.context import RoutingContext, current_context, layer_context
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer
from moestro.core.site import Site, SiteKind
from moestro.methods.train._parts.supernet_space import Arch, Encoder, Found, Limits, Search, SharedEncoder, Space
from moestro.models.families import family
from moestro.models.save import base_config_values
from moestro.models.sites import sites
from moestro.models.skeleton import config_from, construct, empty_model, model_class
from moestro.models.spec import Get
from moestro.surgery.opened import form_at


FAMILIES = ("llama", "mistral", "qwen2")
NEEDS: dict[str, tuple[SiteKind, ...]] = {
    "hidden": ("embedding", "norm", "attention", "mlp", "head"),
    "inner": ("mlp",),
    "heads": ("attention",),
    "layers": ("attention", "mlp"),
}


@runtime_checkable
class Elastic(Protocol):
    """A module that stands for one of every architecture."""

    def dense(self, arch: Arch) -> dict[str, Tensor]:
        """The tensors of the plain module of one architecture, by their names there."""


def running(space: SharedEncoder, ctx: RoutingContext, hidden: Tensor, layer: int | None) -> Arch | None:
    """The architecture of this forward; None where it has no block ``layer``.

    Raises:
        ContextError: see ``Encoder.active``; or hidden states of another width, where a part of the model is plain.
    """
    arch = space.module.active(ctx)
    if hidden.shape[-1] != arch.hidden:
        raise ContextError(
            f"the architecture is {arch.hidden} wide but its layer got {hidden.shape[-1]}; a space that varies hidden "
            f"needs the method at the sites {', '.join(NEEDS['hidden'])}"
        )
    return None if layer is not None and layer >= arch.layers else arch


def sliced(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of ``module`` for one call that computes with ``tensors`` in place of its parameters.

    ``torch.func.functional_call`` would put them into the module itself, where another thread finds them.
    """
    one = copy.copy(module)
    one.__dict__["_parameters"] = {name: tensors.get(name) for name in module._parameters}
    one.__dict__["_modules"] = {
        child: sliced(part, {n.removeprefix(f"{child}."): t for n, t in tensors.items() if n.startswith(f"{child}.")})
        for child, part in module.named_children()
    }
    return one


class ElasticAttention(nn.Module):
    """The stock attention on its first heads and the first channels of the model; ``inner`` is the stock module."""

    def __init__(self, inner: Any, layer: int | None, space: Encoder) -> None:
        super().__init__()
        self.inner, self.layer = inner, layer
        self.space = SharedEncoder(space)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the stock attention returns."""
        with layer_context(hidden_states, self.training) as ctx:
            arch = running(self.space, ctx, hidden_states, self.layer)
            if arch is None:
                return torch.zeros_like(hidden_states), None
            return sliced(self.inner, self.dense(arch))(hidden_states, *args, **kwargs)

    def dense(self, arch: Arch) -> dict[str, Tensor]:
        """See Elastic."""
        wide = arch.heads * self.inner.head_dim
        rows = {"q_proj": wide, "o_proj": arch.hidden}
        rows |= dict.fromkeys(("k_proj", "v_proj"), wide // self.inner.num_key_value_groups)
        found = dict(self.inner.named_parameters())
        for name, count in rows.items():
            width = wide if name == "o_proj" else arch.hidden
            found[f"{name}.weight"] = found[f"{name}.weight"][:count, :width]
            if f"{name}.bias" in found:
                found[f"{name}.bias"] = found[f"{name}.bias"][:count]
        return found


class ElasticNorm(nn.Module):
    """The stock norm on the first channels: as many as its input has. ``inner`` is the stock module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden: Tensor) -> Tensor:
        """Normalised hidden states, same shape."""
        cut = {name: p[: hidden.shape[-1]] for name, p in self.inner.named_parameters()}
        normed: Tensor = sliced(self.inner, cut)(hidden)
        return normed

    def dense(self, arch: Arch) -> dict[str, Tensor]:
        """See Elastic."""
        return {name: p[: arch.hidden] for name, p in self.inner.named_parameters()}


class ElasticEmbedding(nn.Embedding):
    """The first channels of an embedding; ``weight`` [V, D] is the stock parameter itself, so that a tie holds."""

    def __init__(self, stock: nn.Embedding, space: Encoder) -> None:
        super().__init__(stock.num_embeddings, stock.embedding_dim, stock.padding_idx, _weight=stock.weight)
        self.weight = stock.weight
        self.space = SharedEncoder(space)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        """Vectors [..., hidden] of token ids."""
        width = self.space.module.active(current_context()).hidden
        return F.embedding(input, self.weight[:, :width], self.padding_idx)

    def dense(self, arch: Arch) -> dict[str, Tensor]:
        """See Elastic."""
        return {"weight": self.weight[:, : arch.hidden]}


class ElasticHead(nn.Module):
    """An output layer that reads as many channels as its input has; ``weight`` [V, D] is the stock parameter."""

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = stock.weight, stock.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V]."""
        return F.linear(hidden, self.weight[:, : hidden.shape[-1]], self.bias)

    def dense(self, arch: Arch) -> dict[str, Tensor]:
        """See Elastic."""
        return {"weight": self.weight[:, : arch.hidden], **({} if self.bias is None else {"bias": self.bias})}


def stock_parts(site: Site, inner: int) -> tuple[dict[str, nn.Linear], ops.Activation]:
    """The matrices of the dense feed-forward at a site; new ones, gated and without bias, where there is none."""
    form = form_at(site)
    if form is None:
        new = {name: nn.Linear(site.dim, inner, bias=False) for name in ("gate_proj", "up_proj")}
        return {**new, "down_proj": nn.Linear(inner, site.out or site.dim, bias=False)}, "silu"
    names = family(site.family).ffn
    if names.split or isinstance(site.module, MoELayer):
        raise ConfigError(f"{site.path}: a {type(site.module).__name__} of {site.family} is no dense feed-forward")
    found = {name: site.module.get_submodule(name) for name in (names.gate, names.up, names.down) if name is not None}
    return found, form.activation  # type: ignore[return-value]


def default_space(site: Site) -> Space:
    """A quarter, a half and all of the neurons of the feed-forwards; everything else as it is."""
    get, form = Get(site.model_config), form_at(site)
    inner = form.inner if form else get("intermediate_size", default=None)
    if inner is None:
        raise ConfigError(f"{site.path}: {type(site.module).__name__} does not tell its inner width; give a space")
    heads = get("num_attention_heads", default=None)
    return Space(
        hidden=[site.dim],
        heads=None if heads is None else [heads],
        head_dim=get("head_dim", default=site.dim // (heads or 1)),
        inner=sorted({max(1, inner // part) for part in (4, 2, 1)}),
        layers=[get("num_hidden_layers", default=site.num_layers or 1)],
    )


def check_site(site: Site, space: Space) -> None:
    """Raise ConfigError unless the largest architecture is the model at the site."""
    largest, model = space.largest, site.model_config
    if site.kind != "mlp" and site.family not in FAMILIES:
        raise ConfigError(f"{site.path}: slicing a {site.kind} is known for {', '.join(FAMILIES)}, not {site.family}")
    has = {"hidden": getattr(model, "hidden_size", site.dim), "layers": site.num_layers or largest.layers}
    if form := form_at(site):
        has["inner"] = form.inner
    if site.kind == "attention":
        has |= {"heads": model.num_attention_heads, "head_dim": site.module.head_dim}
    for name, size in has.items():
        told = getattr(space if name == "head_dim" else largest, name)
        if told != size:
            raise ConfigError(f"{site.path}: the largest {name} of the space is {told}, the model has {size}")
    if site.kind == "attention":
        group = model.num_attention_heads // model.num_key_value_heads
        for arch in space.archs:
            if arch.heads % group:
                raise ConfigError(f"{site.path}: {group} heads share one key, so {arch.heads} heads cannot be cut off")


def encoder_of(model: nn.Module) -> Encoder:
    """The encoder of a supernet, after a look at whether all that its space varies is elastic.

    Raises:
        ConfigError: the model is no supernet, or a plain module stands where the space varies a size.
    """
    found = next((module for module in model.modules() if isinstance(module, Encoder)), None)
    if found is None:
        raise ConfigError(f"{type(model).__name__} is no supernet: no train.mixture_of_supernets stands in it")
    found.check()
    for name, kinds in NEEDS.items():
        fixed = len({getattr(arch, name) for arch in found.space.archs}) == 1
        for site in () if fixed else (site for kind in kinds for site in sites(model, kind)):
            if not isinstance(site.module, Elastic):
                raise ConfigError(
                    f"the space varies {name} but {site.path} is plain; put the method at the sites {site.kind} too"
                )
    return found


def plain_config(model: Any, arch: Arch) -> Any:
    """The Transformers configuration of one architecture of a supernet."""
    values = base_config_values(model)
    group = values["num_attention_heads"] // values["num_key_value_heads"]
    values.update(hidden_size=arch.hidden, intermediate_size=arch.inner, num_hidden_layers=arch.layers)
    values.update(num_attention_heads=arch.heads, num_key_value_heads=arch.heads // group)
    values["head_dim"] = encoder_of(model).space.head_dim
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][: arch.layers]
    return config_from(values, "collapse")


@torch.no_grad()
def collapse(model: Any, arch: Any) -> Any:
    """One architecture of a supernet as a plain Transformers model: mixtures done once, no copies, no routers.

    Args:
        arch: as a session takes it. The model is left as it is, and shares no memory with the result.

    Raises:
        ContextError: not in the space. ConfigError: see ``encoder_of``.
    """
    chosen = encoder_of(model).space.resolve(arch)
    config = plain_config(model, chosen)
    plain = construct(model_class(config, None), config, "collapse").to(model.dtype)
    training = model.training
    model.eval()  # no dropout in the routers
    parts = {path: part.dense(chosen) for path, part in model.named_modules() if isinstance(part, Elastic)}
    model.train(training)
    tensors = model.state_dict() | {
        f"{path}.{n}": tensor for path, dense in parts.items() for n, tensor in dense.items()
    }
    plain.load_state_dict({name: tensors[name] for name in plain.state_dict()})
    if model.can_generate():
        plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.to(model.device).eval()


def parameters(model: Any, arch: Arch) -> int:
    """Parameters of the plain model of an architecture, a tied tensor once."""
    config = plain_config(model, arch)
    return sum(p.numel() for p in empty_model(model_class(config, None), config).parameters())


@torch.no_grad()
def latency(model: Any, arch: Arch, *, length: int = 64, repeats: int = 7) -> float:
    """Milliseconds of a forward of the collapsed architecture on this machine: one row of ``length`` tokens, median."""
    plain = collapse(model, arch)
    ids = torch.zeros(1, length, dtype=torch.int64, device=plain.device)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        plain(input_ids=ids)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[1:])


def search(model: Any, fitness: Callable[[Arch], float], *, limits: Limits, seed: int = 0, **evolution: Any) -> Found:
    """The architecture of a trained supernet with the lowest ``fitness(arch)`` that keeps ``limits``.

    Parameters are those of the plain model, latency is measured on it, on this machine. Raises as ``Search`` does,
    whose ``run`` takes ``evolution``.
    """
    space = encoder_of(model).space
    sizes = functools.partial(parameters, model)
    return Search(space, fitness, limits, parameters=sizes, latency=functools.partial(latency, model), seed=seed).run(
        **evolution
    )
