"""Exchange what stands at sites, by method id, in an order that can be written down and done again.

A model keeps the list of its swaps; a saved folder holds it in ``config.json`` and ``load`` replays it on the empty
model before the tensors come in. The blocks of stock MoE families are no entries of that list: they become mixture
layers whenever a model is opened.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from moestro.core.bank import StackedFFN
from moestro.core.config import Config
from moestro.core.context import open_stack
from moestro.core.errors import ConfigError, LoadError
from moestro.core.layer import MoELayer
from moestro.core.losses import RoutingLoss
from moestro.core.registry import method as method_by_id
from moestro.core.router import Router
from moestro.core.site import Shared, Site, SiteKind
from moestro.models.families import family
from moestro.models.keymap import Mixture
from moestro.models.sites import Stack, sites, stacks
from moestro.models.spec import FamilySpec, Get, activation


SHARED = "moestro_shared"
ENTRIES = "routing_entries"


class Swap(Config):
    """One entry of a model's list of swaps.

    Attributes:
        sites: places as ``stack:path in the stack``, or a bare path for heads; the method is built once for each.
        kind: kind of the sites. method: id. config: its settings; a value ``{"per_layer": [...]}`` holds one value a
            site.
    """

    sites: list[str] = Field(min_length=1)
    kind: SiteKind = "mlp"
    method: str
    config: dict[str, Any] = Field(default_factory=dict)

    def config_at(self, index: int) -> dict[str, Any]:
        """The settings of site number ``index``.

        Raises:
            ConfigError: a per-layer list that has not one value a site.
        """
        return {name: self._value(name, value, index) for name, value in self.config.items()}

    def _value(self, name: str, value: Any, index: int) -> Any:
        if not isinstance(value, dict) or set(value) != {"per_layer"}:
            return value
        values = value["per_layer"]
        if len(values) != len(self.sites):
            raise ConfigError(f"{self.method}: {name} lists {len(values)} values per layer for {len(self.sites)} sites")
        return values[index]


@dataclass
class State:
    """What Moestro remembers about a model it opened.

    Attributes:
        swaps: in order. shared: parts that several sites use.
        loss_weights: name of a routing loss -> the weight the stock model gives it; a recipe may say otherwise.
        folder: where the model came from, if that is a folder. facts: for the receipt.
    """

    swaps: list[Swap] = field(default_factory=list)
    shared: Shared = field(default_factory=Shared)
    loss_weights: dict[str, float] = field(default_factory=dict)
    folder: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def state_of(model: nn.Module) -> State:
    """The model's state, made at the first call."""
    state = getattr(model, "_moestro", None)
    if state is None:
        state = State()
        object.__setattr__(model, "_moestro", state)
    assert isinstance(state, State)
    return state


def swap(
    model: nn.Module,
    method: str,
    config: Mapping[str, Any] | None = None,
    *,
    kind: SiteKind = "mlp",
    layers: Iterable[int] | None = None,
    stack: str | None = None,
) -> Swap:
    """Build a method at every site of a kind (or of some layers) and remember it.

    A Router replaces the router of the mixture layer at the site, a RoutingLoss joins its losses, any other module
    takes the site's place; at a ``stack`` site it is called when a routing context opens.

    Returns:
        The entry that was added to the model's list.

    Raises:
        ConfigError: no such sites, settings the method refuses, a router for another number of experts.
    """
    places = stacks(model)
    found = sites(model, kind, layers, stack=stack)
    if not found:
        raise ConfigError(f"{type(model).__name__} has no {kind} site")
    entry = Swap(
        sites=[_relative(places, s.path, kind) for s in found], kind=kind, method=method, config=dict(config or {})
    )
    apply_swap(model, entry)
    return entry


def apply_swap(model: nn.Module, entry: Swap) -> None:
    """Do one entry on a model and add it to the model's list.

    Raises:
        ConfigError: a site that the model does not have, or what ``swap`` raises.
    """
    state = state_of(model)
    used = method_by_id(entry.method)
    configs = [used.configure(entry.config_at(index)) for index in range(len(entry.sites))]
    places = stacks(model)
    by_path = {site.path: site for site in sites(model, entry.kind)}
    found = []
    for written in entry.sites:
        path = _absolute(places, written)
        if path not in by_path:
            raise ConfigError(f"{entry.method}: {type(model).__name__} has no {entry.kind} site {written!r}")
        found.append(by_path[path])
    # Build all before placing any: an error then leaves the model as it was.
    built = [used.build(site, config, state.shared) for site, config in zip(found, configs, strict=True)]
    for site, module in zip(found, built, strict=True):
        _check(site, entry.method, module)
    for site, module in zip(found, built, strict=True):
        _follow(module, site.module, model)
        _place(model, site, entry.method, module)
    if len(state.shared.modules) and not hasattr(model, SHARED):
        _follow(state.shared.modules, model, model)
        model.add_module(SHARED, state.shared.modules)
    state.swaps.append(entry)


def _follow(built: nn.Module, old: nn.Module, model: nn.Module) -> None:
    """Give new parameters the type and device of the model around them; buffers keep the type of their module."""
    like = next((p for part in (old, model) for p in part.parameters() if p.is_floating_point()), None)
    for module in built.modules():
        for name, param in module.named_parameters(recurse=False):
            if like is None or not param.is_floating_point() or param.is_meta or like.is_meta:
                continue
            if (param.dtype, param.device) != (like.dtype, like.device):  # else it stays itself, and tied if it was
                module._parameters[name] = nn.Parameter(param.data.to(like), requires_grad=param.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            if like is not None and not like.is_meta:
                module._buffers[name] = buffer.to(like.device)
    built.train(old.training)


def _relative(places: Sequence[Stack], path: str, kind: SiteKind) -> str:
    """A path as it is written down: under its stack, so that it holds for every head class of the family."""
    if kind == "head":
        return path
    for place in places:
        if path == place.path or place.path == "" or path.startswith(place.path + "."):
            return f"{place.spec.name}:{path.removeprefix(place.path).removeprefix('.')}"
    raise ConfigError(f"{path} lies in no stack of the model")


def _absolute(places: Sequence[Stack], written: str) -> str:
    name, colon, path = written.partition(":")
    if not colon:
        return written
    for place in places:
        if place.spec.name == name:
            return place.within(path)
    raise ConfigError(f"{written!r}: the model has no stack {name!r}, it has {', '.join(p.spec.name for p in places)}")


def _check(site: Site, method: str, built: nn.Module) -> None:
    """Raise ConfigError if what a method built cannot stand at a site."""
    layer = site.module
    if not isinstance(built, (Router, RoutingLoss)):
        return
    if not isinstance(layer, MoELayer):
        raise ConfigError(f"{method} needs a mixture layer, but {site.path} holds {type(layer).__name__}")
    if isinstance(built, Router) and built.num_experts != layer.bank.num_experts:
        raise ConfigError(
            f"{site.path}: {method} chooses among {built.num_experts} experts, the bank has {layer.bank.num_experts}"
        )


def _place(model: nn.Module, site: Site, method: str, built: nn.Module) -> None:
    """Put what a method built where it belongs."""
    name = method.rpartition(".")[2].removesuffix("_loss")
    layer = site.module
    if isinstance(layer, MoELayer) and isinstance(built, Router):
        layer.router = built
    elif isinstance(layer, MoELayer) and isinstance(built, RoutingLoss):
        layer.losses[name] = built
    elif site.kind == "stack":
        if not hasattr(layer, ENTRIES):
            layer.add_module(ENTRIES, nn.ModuleDict())
        layer.get_submodule(ENTRIES).add_module(name, built)
    else:
        stand(model, site, built)


def stand(model: nn.Module, site: Site, module: nn.Module) -> None:
    """Put ``module`` at a site so that it takes and returns what the stock module did."""
    spec = family(site.model_config)
    model.set_submodule(site.path, module)
    if site.kind != "mlp":
        return
    if spec.ffn.split:
        block = site.path.rpartition(".")[0]
        model.set_submodule(f"{block}.{spec.ffn.down}", nn.Identity())
    if spec.moe is not None and spec.moe.returns_tuple:
        module.register_forward_hook(_with_scores)


def _with_scores(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """gpt-oss's blocks return (output, router scores); its layers drop the scores."""
    return output if isinstance(output, tuple) else (output, None)


class SharedExpert(nn.Module):
    """A shared branch under a gate of its own: sigmoid(x w^T) * expert(x) (Qwen2-MoE)."""

    def __init__(self, expert: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.expert = expert
        self.gate = gate

    def forward(self, x_TD: Tensor) -> Tensor:
        """Output [T, O]."""
        gated: Tensor = torch.sigmoid(self.gate(x_TD)) * self.expert(x_TD)
        return gated


class Jitter(nn.Module):
    """Input noise while training: every entry times U(1 - size, 1 + size), seen by router and experts alike.

    Transformers multiplies the block's input in place, so its experts see the noise too.
    """

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x_TD: Tensor) -> Tensor:
        """Noisy input [T, D]; the input itself outside training."""
        if not self.training:
            return x_TD
        return x_TD * torch.empty_like(x_TD).uniform_(1.0 - self.size, 1.0 + self.size)


def mixtures(model: nn.Module, spec: FamilySpec) -> list[Mixture]:
    """The layers of a model that the family's table says are mixtures, whatever stands there now."""
    if spec.moe is None:
        return []
    found = []
    for place in stacks(model, spec):
        for layer in spec.moe_layers(model.config, place.spec.name):
            path = place.within(place.spec.mlp.format(layer=layer))
            count = int(Get(model.config)(*spec.moe.num_experts))
            found.append(Mixture(path, place.path, layer, count))
    return found


def swap_stock_blocks(model: nn.Module, spec: FamilySpec) -> list[Mixture]:
    """Put a MoELayer with the family's router in the place of every stock MoE block; weights are not carried over.

    Raises:
        LoadError: the config contradicts itself (top-k above the number of experts, groups that do not divide).
    """
    found = mixtures(model, spec)
    by_path = {site.path: site for site in sites(model, "mlp")} if found else {}
    for mixture in found:
        site = by_path[mixture.path]
        assert spec.moe is not None
        if not any(cls.__name__ == spec.moe.block for cls in type(site.module).__mro__):
            raise LoadError(
                f"{site.path} is a {type(site.module).__name__}, but the table of {spec.name} says {spec.moe.block}; "
                "this version of Transformers builds the family differently"
            )
        try:
            stand(model, site, stock_mixture(spec, site))
        except ConfigError as error:
            raise LoadError(f"config.json: {site.path}: {error}") from None
    for loss in spec.moe.losses if spec.moe is not None else ():
        weight = float(Get(model.config)(*loss.coefficient, default=0.0))
        if weight > 0:
            state_of(model).loss_weights[loss.name] = weight
    return found


def stock_mixture(spec: FamilySpec, site: Site) -> MoELayer:
    """The MoELayer that computes what the stock block at a site does, with fresh expert and router tensors."""
    moe = spec.moe
    assert moe is not None
    get = Get(site.model_config)
    bank = StackedFFN(
        int(get(*moe.num_experts)),
        site.dim,
        int(get(*moe.inner)),
        activation=activation(get, moe.activation),  # type: ignore[arg-type]
        gated=moe.gated,
        bias=moe.bias,
    )
    config = {"num_experts": bank.num_experts, **moe.router_config(get)}
    jitter = float(get(moe.jitter, default=0.0)) if moe.jitter else 0.0
    shared = Shared()
    router = method_by_id(moe.router)
    layer = MoELayer(
        router.build(site, router.configure(config), shared),
        bank,
        site=site.path,
        shared=_shared_branch(spec, get, site.module),
        noise=Jitter(jitter) if jitter > 0 else None,
    )
    for loss in moe.losses:
        if float(get(*loss.coefficient, default=0.0)) > 0:
            used = method_by_id(loss.method)
            layer.losses[loss.name] = used.build(site, used.configure(dict(loss.config)), shared)
    return layer


def _shared_branch(spec: FamilySpec, get: Get, block: nn.Module) -> nn.Module | None:
    """The stock block's own shared modules."""
    assert spec.moe is not None
    shared = spec.moe.shared
    if shared is None:
        return None
    expert = block.get_submodule(shared.module)
    return expert if shared.gate is None else SharedExpert(expert, block.get_submodule(shared.gate))


def watch_stacks(model: nn.Module, spec: FamilySpec) -> None:
    """Make every stack of the model open a routing context for its forwards; once, however often this is called."""
    for place in stacks(model, spec):
        if getattr(place.module, "_moestro_watch", None) is None:
            remove: Callable[[], None] = open_stack(place.module, place.spec.name)
            object.__setattr__(place.module, "_moestro_watch", remove)
