"""A model as surgery sees it: its feed-forward sites by layer, and the tensors of every expert.

The same class serves an open model and one whose tensors are still on disk: then the modules are empty, and ``read``
fetches what a parameter stands for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moestro.core.bank import StackedFFN
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import LayerShape, ModelShape, spell
from moestro.core.layer import MoELayer
from moestro.core.plan import MethodUse
from moestro.core.remap import RemapRouter
from moestro.core.site import Site, SiteKind
from moestro.models.families import family
from moestro.models.save import unsaved
from moestro.models.sites import DenseFFN, dense_ffn, sites_by_layer
from moestro.models.source import fingerprint
from moestro.models.spec import Get, activation
from moestro.surgery.lazy import LazySource


Read = Callable[[Tensor], Tensor]
"""What a parameter or buffer stands for: itself, its copy on disk, or the optimiser's state of it."""

Slot = tuple[Tensor, tuple[Any, ...]]
"""A parameter, and the index of the part of it that is meant."""


def itself(parameter: Tensor) -> Tensor:
    """The parameter's own values."""
    return parameter.detach()


@dataclass(frozen=True)
class Form:
    """What the experts or the feed-forward at a site look like."""

    inner: int
    activation: str
    gated: bool
    bias: bool


def form_at(site: Site) -> Form | None:
    """The form of the feed-forward at a site, dense or a mixture of equal experts; None when there is none."""
    there = site.module
    if isinstance(there, MoELayer):
        bank = there.bank
        if not isinstance(bank, StackedFFN):
            return None
        return Form(bank.inner, bank.activation, bank.gated, bank.up_bias is not None)
    if site.family is None:
        return None
    ffn = family(site.family).ffn
    try:
        up = there.get_submodule(ffn.up)
    except AttributeError:
        return None
    if not isinstance(up, nn.Linear):
        return None
    name = activation(Get(site.model_config), ffn.activation)
    return Form(up.out_features, name, ffn.gate is not None, up.bias is not None)


@dataclass
class Place:
    """One feed-forward site of an open model. ``dense`` holds its tensors where no mixture stands there."""

    site: Site
    shape: LayerShape
    dense: DenseFFN | None

    @property
    def mixture(self) -> MoELayer:
        """The mixture layer there."""
        assert isinstance(self.site.module, MoELayer)
        return self.site.module

    def slot(self, expert: int | None, name: str) -> Slot:
        """Where a tensor of an expert, or of the dense layer, lives."""
        if self.dense is not None:
            tensor: Tensor = getattr(self.dense, name)
            return tensor, ()
        bank = self.mixture.bank
        assert isinstance(bank, StackedFFN)
        assert expert is not None
        return bank_slot(bank, expert, name)

    def router_slot(self, expert: int, name: str) -> Slot:
        """Where the row of an expert in a tensor of the router lives.

        Raises:
            PlanError: the router has no such tensor with a row for each choice.
        """
        router = self.mixture.router
        tensor = router.tensor(name) if name in router.choice_rows else None
        if tensor is None:
            has = ", ".join(router.choice_rows) or "none"
            raise PlanError(
                f"layer {self.shape.layer}: a {type(router).__name__} has no row for each expert in {name!r} "
                f"(rows: {has})"
            )
        return tensor, (expert,)


def bank_slot(bank: StackedFFN, expert: int, name: str) -> Slot:
    """Where tensor ``name`` of an expert lives in a stacked bank."""
    projection, bias, _ = name.partition("_bias")
    whole = bank.down_proj_bias if bias and projection == "down" else bank.up_bias if bias else None
    if not bias:
        whole = bank.down_proj if projection == "down" else bank.up_weight
    assert whole is not None
    if projection == "down" or not bank.gated:
        return whole, (expert,)
    half = slice(0, bank.inner) if projection == "gate" else slice(bank.inner, 2 * bank.inner)
    return whole, (expert, half)


class OpenModel:
    """The feed-forward sites of a model; a ``Subject`` for planners.

    Args:
        model: a Transformers model of a known family, with or without swapped modules.
        name: for messages. read: what a parameter stands for.

    Raises:
        FamilyError: an unknown family.
    """

    def __init__(self, model: nn.Module, name: str = "the model", read: Read = itself) -> None:
        self.model = model
        self.read = read
        self.places: dict[int, Place] = {}
        self.foreign: dict[int, str] = {}
        found = sites_by_layer(model, "mlp")
        for layer, site in found.items():
            place = _place(model, site, layer)
            if place is None:
                there = site.module.bank if isinstance(site.module, MoELayer) else site.module
                self.foreign[layer] = type(there).__name__
            else:
                self.places[layer] = place
        shapes = {layer: place.shape for layer, place in self.places.items()}
        self.shape = ModelShape(name=name, layers=shapes, num_layers=max(found) + 1, foreign=self.foreign)

    def place(self, layer: int) -> Place:
        """The site of a layer.

        Raises:
            PlanError: there is none.
        """
        if layer in self.foreign:
            raise PlanError(
                f"{self.shape.name} layer {layer} holds a {self.foreign[layer]}, neither a dense feed-forward nor a "
                "mixture of equal experts; a model of Transformers' own mixtures must be opened with moestro.load"
            )
        self.shape.layer(layer)
        return self.places[layer]

    def fingerprint(self) -> str:
        """Hash of the names, shapes, types and sampled values of all tensors that a saved model has."""
        tensors = self.model.state_dict(keep_vars=True)
        left_out = unsaved(self.model)
        saved = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        return fingerprint(LazySource(self.shape.name, saved, lambda name: self.read(saved[name])))

    def tensor(self, layer: int, expert: int | None, name: str) -> Tensor:
        """See Subject. A view where storage allows; without gradient."""
        shape = self.shape.layer(layer)
        if name not in shape.names:
            raise PlanError(
                f"{self.shape.name} layer {layer}: no tensor {name!r}; an expert has {', '.join(shape.names)}"
            )
        check_expert(self.shape.name, shape, expert)
        parameter, index = self.places[layer].slot(expert, name)
        return self.read(parameter)[index]

    def router_row(self, layer: int, expert: int, name: str) -> Tensor:
        """The row of an expert in a tensor of its layer's router."""
        parameter, index = self.place(layer).router_slot(expert, name)
        return self.read(parameter)[index]

    def site(self, layer: int, kind: SiteKind) -> Site:
        """See Subject.

        Raises:
            PlanError: there is none.
        """
        found = sites_by_layer(self.model, kind)
        if layer not in found:
            raise PlanError(f"{self.shape.name} has no {kind} site in layer {layer}; it has them in {spell(found)}")
        return found[layer]


def check_expert(model: str, shape: LayerShape, expert: int | None) -> None:
    """Raise PlanError unless the layer has that expert (None: unless it is dense)."""
    where = f"{model} layer {shape.layer}"
    if shape.num_experts is None:
        if expert is not None:
            raise PlanError(f"{where} is dense, it has no expert {expert}; leave `expert` out of the source")
    elif expert is None:
        raise PlanError(f"{where} is a mixture of {shape.num_experts}; say which `expert` the source means")
    elif not 0 <= expert < shape.num_experts:
        raise PlanError(f"{where} has no expert {expert}; it has 0 to {shape.num_experts - 1}")


def _place(model: nn.Module, site: Site, layer: int) -> Place | None:
    """The place at a site, or None where neither a dense layer nor a mixture of equal experts stands."""
    form = form_at(site)
    if form is None:
        return None
    common: dict[str, Any] = {
        "layer": layer,
        "site": site.path,
        "dim": site.dim,
        "out": site.dim if site.out is None else site.out,
        "inner": form.inner,
        "gated": form.gated,
        "bias": form.bias,
        "activation": form.activation,
    }
    if not isinstance(site.module, MoELayer):
        try:
            dense = dense_ffn(model, site)
        except ConfigError:
            return None
        return Place(site, LayerShape(**common), dense)
    mixture = site.module
    shape = LayerShape(
        **common,
        num_experts=mixture.bank.num_experts,
        shared=mixture.shared is not None,
        module=described(mixture, form),
    )
    return Place(site, shape, None)


def described(mixture: MoELayer, form: Form) -> MethodUse | None:
    """A mixture as ``train.moe`` builds it anew in its place; None when nobody knows how its router was made, or when
    its bank holds more than the tensors of its experts, which would be lost.
    """
    if type(mixture.bank) is not StackedFFN:
        return None
    router = mixture.router
    inner = router.inner if isinstance(router, RemapRouter) else router
    made_by = getattr(inner, "made_by", None)
    if made_by is None:
        return None
    settings = {name: value for name, value in made_by.config.items() if name != "num_experts"}
    config = {
        "num_experts": mixture.bank.num_experts,
        "expert_size": form.inner,
        "activation": form.activation,
        "gated": form.gated,
        "bias": form.bias,
        "router": {"method": made_by.method, "config": settings},
        "keep": True,
    }
    if isinstance(router, RemapRouter):
        config["remap"] = router.mapping
    return MethodUse(method="train.moe", config=config)
