"""Which stock architecture, with which config, computes what a model computes; or why none does."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from moestro.core.bank import StackedFFN
from moestro.core.errors import MoestroError, SaveError
from moestro.core.layer import MoELayer, add_shared
from moestro.core.registry import method as method_by_id
from moestro.core.site import Shared
from moestro.models.auto import TASKS
from moestro.models.families import families, family
from moestro.models.save import base_config_values
from moestro.models.sites import sites
from moestro.models.skeleton import parameters_on_meta
from moestro.models.spec import FamilySpec, Get, MoESpec, activation
from moestro.models.swap import Jitter, state_of


TO_MIXTURE = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Dense family -> the mixture family whose attention, norms and names are the same."""

_TRAINING_ONLY = {"gamma", "jitter"}


@dataclass(frozen=True)
class Target:
    """A stock architecture: family, values of its ``config.json``, model class."""

    spec: FamilySpec
    values: dict[str, Any]
    cls: type[Any]


def find_target(model: Any) -> Target:
    """The stock architecture that a model is an instance of.

    Raises:
        SaveError: there is none; the message names what stands in the way.
    """
    if not getattr(model, "is_moestro", False):
        raise SaveError(f"{type(model).__name__} was not opened by Moestro; use its own save_pretrained")
    spec = family(model.config)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, MoELayer)}
    _refuse_foreign(model, layers)
    values = base_config_values(model)
    cls = type(model).__mro__[1]
    if spec.moe is None and not layers:
        return Target(spec, values, cls)
    target = spec
    if spec.moe is None:
        if spec.name not in TO_MIXTURE:
            raise SaveError(f"no stock architecture has the attention of {spec.name} and experts; use moestro.save")
        target = families()[TO_MIXTURE[spec.name]]
        cls = _same_task(model, target)
        values |= {"model_type": target.name, "architectures": [cls.__name__]}
    assert target.moe is not None
    found = list(layers.values())
    for layer in found:
        _refuse_form(layer, target)
    if found:
        _alike(found)
        _sizes(values, target.moe, found[0])
        _which_layers(model, values, target, set(layers))
        _router(model, values, target, found[0])
    return Target(target, values, cls)


def _refuse_foreign(model: Any, layers: dict[str, MoELayer]) -> None:
    """Only modules of torch, Transformers and our mixture layers may stand in the model."""
    inside = tuple(f"{path}." for path in layers)
    for path, module in model.named_modules():
        if not path or path in layers or path.startswith(inside):
            continue
        if type(module).__module__.partition(".")[0] not in ("torch", "transformers"):
            raise SaveError(f"{path} is a {type(module).__name__}, which no stock architecture has; use moestro.save")
    if len(state_of(model).shared.modules):
        name = next(iter(state_of(model).shared.modules))
        raise SaveError(f"the part {name!r} is shared by several sites, which no stock architecture has")


def _refuse_form(layer: MoELayer, target: FamilySpec) -> None:
    """What a MoELayer may have and a stock block may not."""
    moe = target.moe
    assert moe is not None
    bank = layer.bank
    if type(bank) is not StackedFFN:
        _refuse(layer, target, f"its experts are a {type(bank).__name__}")
    assert isinstance(bank, StackedFFN)
    if layer.pre is not None or layer.post is not None:
        _refuse(layer, target, "it projects its routed branch")
    if layer.combine is not add_shared:
        _refuse(layer, target, "it does not add its branches")
    if (layer.shared is None) != (moe.shared is None):
        _refuse(layer, target, f"it has {'no' if layer.shared is None else 'a'} shared expert")
    if (bank.gated, bank.down_proj_bias is not None) != (moe.gated, moe.bias):
        _refuse(layer, target, f"its experts are gated={bank.gated} with bias={bank.down_proj_bias is not None}")


def _refuse(layer: MoELayer, target: FamilySpec, reason: str) -> None:
    raise SaveError(f"{layer.site} cannot be a block of {target.name}: {reason}; use moestro.save")


def _alike(layers: list[MoELayer]) -> None:
    """Stock configs have one number for all layers."""
    first = _facts(layers[0])
    for layer in layers[1:]:
        for name, value in _facts(layer).items():
            if value != first[name]:
                raise SaveError(
                    f"{layer.site} has {name} {value}, {layers[0].site} has {first[name]}; stock architectures have "
                    "one for all layers; use moestro.save"
                )


def _facts(layer: MoELayer) -> dict[str, Any]:
    bank = layer.bank
    assert isinstance(bank, StackedFFN)
    return {
        "num_experts": bank.num_experts,
        "inner width": bank.inner,
        "activation": bank.activation,
        "router": type(layer.router).__name__,
        "router config": getattr(layer.router, "config", None),
        "input noise": layer.noise.size if isinstance(layer.noise, Jitter) else 0.0,
    }


def _sizes(values: dict[str, Any], moe: MoESpec, layer: MoELayer) -> None:
    """Write the sizes of the layers and the settings of their router into the config."""
    bank = layer.bank
    assert isinstance(bank, StackedFFN)
    _set(values, moe.num_experts, bank.num_experts)
    _set(values, moe.inner, bank.inner)
    config = getattr(layer.router, "config", None)
    for name, key in moe.router_keys.items():
        if config is not None and hasattr(config, name):
            _set(values, (key,), getattr(config, name))
    if moe.jitter:
        values[moe.jitter] = layer.noise.size if isinstance(layer.noise, Jitter) else 0.0


def _set(values: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Set the key of ``keys`` that the config has, else the first."""
    values[next((key for key in keys if key in values), keys[0])] = value


def _which_layers(model: Any, values: dict[str, Any], target: FamilySpec, there: set[str]) -> None:
    """The mixtures must stand where the config says; families with a list of dense layers get that list."""
    moe = target.moe
    assert moe is not None
    places = sites(model, "mlp")
    if moe.dense_layers is not None:
        values[moe.dense_layers] = [site.layer for site in places if site.path not in there]
    for stack in target.stacks:
        wanted = set(target.moe_layers(values, stack.name))
        ours = [s for s in places if stack.attribute is None or s.path.startswith(f"{stack.attribute}.")]
        for site in ours:
            if (site.layer in wanted) != (site.path in there):
                has = "is a mixture" if site.path in there else "is dense"
                raise SaveError(f"{site.path} {has}, {target.name} wants it otherwise; use moestro.save")


def _router(model: Any, values: dict[str, Any], target: FamilySpec, layer: MoELayer) -> None:
    """The router and activation the config leads to must be the ones in the layers."""
    moe = target.moe
    assert moe is not None
    assert isinstance(layer.bank, StackedFFN)
    get = Get(values)
    site = next(site for site in sites(model, "mlp") if site.module is layer)
    used = method_by_id(moe.router)
    try:
        config = used.configure({"num_experts": layer.bank.num_experts, **moe.router_config(get)})
    except MoestroError as error:
        raise SaveError(f"cannot export to {target.name}: {error}") from None
    with parameters_on_meta():
        expected = used.build(site, config, Shared())
    if type(layer.router) is not type(expected):
        _refuse(layer, target, f"its router is {type(layer.router).__name__}, not {type(expected).__name__}")
    ours, theirs = _canonical(layer.router), _canonical(expected)
    for name, value in theirs.items():
        if ours.get(name) != value:
            _refuse(layer, target, f"its router has {name}={ours.get(name)!r}, the family {value!r}")
    if layer.bank.activation != activation(get, moe.activation):
        _refuse(layer, target, f"its activation is {layer.bank.activation}")


def _canonical(router: nn.Module) -> dict[str, Any]:
    """A router's settings, with the two ways of saying "softmax over the chosen" made one."""
    values: dict[str, Any] = router.config.model_dump()  # type: ignore[union-attr, operator]
    if values.get("softmax") == "all" and values.get("renormalise") and not values.get("renorm_eps"):
        values["softmax"] = "chosen"
    if values.get("softmax") == "chosen":
        values |= {"renormalise": True, "renorm_eps": 0.0}
    return {name: value for name, value in values.items() if name not in _TRAINING_ONLY}


def _same_task(model: Any, target: FamilySpec) -> type[Any]:
    """The class of the target family that does what the model's class does."""
    import transformers

    for name in TASKS.values():
        mapping = getattr(transformers, name)._model_mapping
        config = transformers.CONFIG_MAPPING[target.name]
        if (
            type(model.config) in mapping
            and config in mapping
            and mapping[type(model.config)] is type(model).__mro__[1]
        ):
            found: type[Any] = mapping[config]
            return found
    raise SaveError(f"Transformers has no {target.name} class for what {type(model).__name__} does")
