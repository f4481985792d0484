"""Sites: the places of a model where a module can be exchanged, by kind and layer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor, nn

from moestro.core.errors import ConfigError, FamilyError
from moestro.core.layer import MoELayer
from moestro.core.site import Site, SiteKind
from moestro.models.families import family
from moestro.models.spec import FamilySpec, Get, StackSpec, activation


@dataclass(frozen=True)
class Stack:
    """A stack as it stands in a model: the spec, its module path and the module."""

    spec: StackSpec
    path: str
    module: nn.Module

    def within(self, path: str) -> str:
        """The full path of ``path``, which is relative to the stack."""
        return ".".join(part for part in (self.path, path) if part)


def stacks(model: nn.Module, spec: FamilySpec | None = None) -> list[Stack]:
    """The stacks of a model, in the order of the family's table.

    Raises:
        FamilyError: the model is of no known family, or has none of the family's stacks.
    """
    spec = spec or family(getattr(model, "config", None))
    found = []
    for stack in spec.stacks:
        for path, module in model.named_modules():
            ours = any(cls.__name__ == stack.cls for cls in type(module).__mro__)
            if ours and stack.attribute in (None, path.rpartition(".")[2]):
                found.append(Stack(stack, path, module))
    if not found:
        wanted = " or ".join(dict.fromkeys(stack.cls for stack in spec.stacks))
        raise FamilyError(f"{type(model).__name__} has no {wanted}, which the family {spec.name} is built on")
    return found


def sites(
    model: nn.Module, kind: SiteKind, layers: Iterable[int] | None = None, *, stack: str | None = None
) -> list[Site]:
    """The sites of one kind.

    Args:
        model: a Transformers model of a known family, with or without swapped modules.
        kind: mlp, attention, linear, norm, embedding, block, stack or head.
        layers: only these block indices; None means all, and sites outside blocks too.
        stack: only this stack (``encoder``, ``decoder``).

    Returns:
        Sites ordered by stack, then by layer, then as in the family's table.

    Raises:
        FamilyError: unknown family. ConfigError: unknown kind, or layers that have no such site.
    """
    if kind not in get_args(SiteKind):
        raise ConfigError(f"no site kind {kind!r}; known: {', '.join(get_args(SiteKind))}")
    spec = family(getattr(model, "config", None))
    if kind == "head":
        found = [Site(path=p, kind=kind, module=m, **_about(model, spec, m)) for p, m in _heads(model, spec)]
        return found if layers is None else []
    wanted = None if layers is None else sorted(set(layers))
    found = []
    for place in stacks(model, spec):
        if stack in (None, place.spec.name):
            found += _stack_sites(model, spec, place, kind, wanted)
    if wanted is not None:
        missing = sorted(set(wanted) - {site.layer for site in found})
        if missing:
            has = sorted({site.layer for site in sites(model, kind, stack=stack) if site.layer is not None})
            raise ConfigError(f"no {kind} site in layer {missing[0]}; {spec.name} has them in layers {has}")
    return found


def sites_by_layer(model: nn.Module, kind: SiteKind) -> dict[int, Site]:
    """The sites of a kind that stands once in a block, by the index of the block over all stacks: the blocks of a
    decoder count on after those of its encoder.
    """
    found: dict[int, Site] = {}
    first = 0
    for place in stacks(model):
        mine = sites(model, kind, stack=place.spec.name)
        found.update({first + site.layer: site for site in mine if site.layer is not None})
        first += len(_blocks(place))
    return found


def _stack_sites(
    model: nn.Module, spec: FamilySpec, place: Stack, kind: SiteKind, wanted: list[int] | None
) -> list[Site]:
    matches: list[tuple[int, int, int | None, str, nn.Module]] = []
    for order, pattern in enumerate(place.spec.sites.get(kind, ())):
        expression = re.compile(re.escape(place.within(pattern)).replace(r"\{layer\}", r"(\d+)"))
        for path, module in _modules(model, place):
            match = expression.fullmatch(path)
            if match is None:
                continue
            layer = int(match[1]) if match.groups() else None
            if wanted is None or layer in wanted:
                matches.append((len(matches) if layer is None else layer, order, layer, path, module))
    matches.sort(key=lambda found: found[:2])
    count = len(_blocks(place))
    return [
        Site(
            path=path,
            kind=kind,
            layer=layer,
            num_layers=count,
            module=module,
            ordinal=ordinal,
            **_about(model, spec, module),
        )
        for ordinal, (_, _, layer, path, module) in enumerate(matches)
    ]


def _modules(model: nn.Module, place: Stack) -> list[tuple[str, nn.Module]]:
    return [(place.within(path), module) for path, module in place.module.named_modules()]


def _blocks(place: Stack) -> nn.ModuleList:
    """The module list of the stack's blocks."""
    path = place.spec.sites["block"][0].removesuffix(".{layer}")
    blocks = place.module.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _heads(model: nn.Module, spec: FamilySpec) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_children() if name in spec.heads]


def _about(model: nn.Module, spec: FamilySpec, module: nn.Module) -> dict[str, Any]:
    """The fields of a Site that come from the model and from what stands there."""
    config: Any = model.config
    dim = out = int(Get(config)("hidden_size", "d_model"))
    if isinstance(module, nn.Linear):
        dim, out = module.in_features, module.out_features
    return {"dim": dim, "out": out, "model_config": config, "family": spec.name}


@dataclass(frozen=True)
class DenseFFN:
    """The tensors of a dense feed-forward: up (and gate) [I, D], down [D, I], biases [I], [D] or None."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str

    @property
    def inner(self) -> int:
        """I, the width of the hidden layer."""
        return self.up.shape[0]


def dense_ffn(model: nn.Module, site: Site) -> DenseFFN:
    """The tensors of the dense feed-forward at an mlp site; they are the model's own, not copies.

    Raises:
        ConfigError: another module stands there.
    """
    spec = family(site.model_config)
    names = {"gate": spec.ffn.gate, "up": spec.ffn.up, "down": spec.ffn.down}
    block = site.path.rpartition(".")[0]
    linears: dict[str, nn.Linear | None] = {"gate": None}
    for name, path in names.items():
        if path is None:
            continue
        base = block if spec.ffn.split and name == "down" else site.path
        module = _submodule(model, f"{base}.{path}")
        if not isinstance(module, nn.Linear):
            what = "a mixture layer" if isinstance(site.module, MoELayer) else type(site.module).__name__
            raise ConfigError(f"{site.path} holds {what}, not the dense feed-forward of {spec.name}")
        linears[name] = module
    gate, up, down = linears["gate"], linears["up"], linears["down"]
    assert up is not None
    assert down is not None
    return DenseFFN(
        gate=None if gate is None else gate.weight,
        up=up.weight,
        down=down.weight,
        gate_bias=None if gate is None else gate.bias,
        up_bias=up.bias,
        down_bias=down.bias,
        activation=activation(Get(site.model_config), spec.ffn.activation),
    )


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
