"""The baseline ``topk``: the same layers, every router a softmax over logits with a fixed number of choices."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.losses import RoutingLoss
from moestro.core.plan import MethodUse
from moestro.training.baseline_recipe import WITHIN, Origin, carried, covered, entries, merged
from moestro.training.build import loss_weights
from moestro.training.recipe import SwapConfig
from moestro.training.skeleton import recipe_skeleton


ROUTER, BALANCE = "train.softmax_topk", "train.balance_loss"
KEPT = (BALANCE, "train.z_loss")  # losses that say something about any softmax router
WEIGHT = 0.01  # of a balance loss that the recipe does not have; alpha of Switch Transformers (2101.03961, section 2.2)


def route_by_topk(found: Origin) -> tuple[dict[str, Any], str]:
    """Recipe values in which every mixture is routed by softmax top-k, and what was done in words.

    Where the mixtures' assignments a token are no whole number, layers differ by one so that the sum is as near as it
    can be.

    Raises:
        ConfigError: a mixture without a router of its own, one that is this baseline already, assignments that no whole
            numbers come near to, a loss that only the mixture's own router can have.
    """
    layers = _layers(found.model, found)
    real = [sum(found.work.rows_of(layer.site, layer.router)) for layer in layers]
    top_k = carried(real)
    if sum(top_k) - sum(real) > 0.5 or any(k > layer.bank.num_experts for k, layer in zip(top_k, layers, strict=True)):
        raise ConfigError(
            f"{found.recipe.name}: a token takes {sum(real):.3f} real assignments in {found.where()}, top-k at least "
            f"{sum(top_k)}; use dense or equal_flops"
        )
    routers = [_router(layer, k) for layer, k in zip(layers, top_k, strict=True)]
    foreign = [loss for layer in layers for loss in layer.losses.values() if _made(loss) not in KEPT]
    if not foreign and all(_is(layer, use) for layer, use in zip(layers, routers, strict=True)):
        raise ConfigError(
            f"{found.recipe.name}: its routers are {ROUTER} with as many choices already; use another baseline"
        )
    swaps = _rewritten(found, routers)
    swaps += _routers_after(found, swaps, routers)
    balance, weights = _balance(found, swaps)
    said = f"{ROUTER} with top_k {_words(top_k)} of {_words([r.config['num_experts'] for r in routers])} experts"
    said += f" ({sum(top_k)} real assignments a token in all layers, the recipe {sum(real):.4g})"
    if balance:
        said += f", balanced by {BALANCE} with weight {weights['balance']:g}"
    exact = abs(sum(top_k) / sum(real) - 1) <= WITHIN
    return {"swaps": [*swaps, *balance], "losses": weights, "exact": exact}, f"{said}, in {found.where()}"


def _layers(model: nn.Module, found: Origin) -> list[MoELayer]:
    layers = []
    for place in found.places:
        layer = model.get_submodule(place.site.path)
        if not isinstance(layer, MoELayer):
            raise ConfigError(
                f"{place.site.path}: a {type(layer).__name__} routes in a way of its own, no other router fits it; use "
                "dense, equal_flops or equal_parameters"
            )
        layers.append(layer)
    return layers


def _router(layer: MoELayer, top_k: int) -> MethodUse:
    """Softmax top-k for a layer. The weight of a single choice stays a probability: as 1 it would teach nothing."""
    config = {"num_experts": layer.bank.num_experts, "top_k": top_k, "renormalise": top_k > 1}
    return MethodUse(method=ROUTER, config=config)


def _made(module: nn.Module) -> str:
    use = getattr(module, "made_by", None)
    return use.method if isinstance(use, MethodUse) else type(module).__name__


def _is(layer: MoELayer, use: MethodUse) -> bool:
    """Whether a layer's router is softmax top-k with as many choices, however they are weighed."""
    return _made(layer.router) == ROUTER and layer.router.top_k == use.config["top_k"]


def _rewritten(found: Origin, routers: list[MethodUse]) -> list[SwapConfig]:
    """The recipe's swaps with the router and the losses that they name exchanged; routers and losses that are swaps of
    their own are left out where they do not fit.
    """
    layers = _layers(found.model, found)
    own = {_made(layer.router) for layer in layers}
    losses = {_made(loss) for layer in layers for loss in layer.losses.values()}
    alone = (own | losses) - {_made(layer) for layer in layers} - set(KEPT)
    swaps = []
    for entry in found.recipe.model.swaps:
        mine = covered(found, entry) if entry.sites == "mlp" else []
        if entry.sites == "stack" or (mine and entry.method in alone):
            continue
        config: dict[str, Any] = dict(entry.config)
        if mine and config.get("router"):
            config |= merged([{"router": _inside(routers[index])} for index in mine])
        if mine and isinstance(config.get("losses"), Mapping):
            config["losses"] = {name: use for name, use in config["losses"].items() if _named(use) in KEPT}
        swaps.append(entry.model_copy(update={"config": config}))
    return swaps


def _inside(use: MethodUse) -> dict[str, Any]:
    """A router as the settings of a layer name it; the layer fills in num_experts."""
    return {"method": use.method, "config": {k: v for k, v in use.config.items() if k != "num_experts"}}


def _named(use: Any) -> str:
    """The method that a layer's settings name."""
    return str(use.get("method")) if isinstance(use, Mapping) else ""


def _built(found: Origin, swaps: list[SwapConfig]) -> list[MoELayer]:
    """The layers with other swaps."""
    model = found.recipe.model.model_copy(update={"swaps": swaps})
    bare = found.recipe.model_copy(update={"model": model, "phases": []})
    return _layers(recipe_skeleton(bare, found.tokenizer), found)


def _routers_after(found: Origin, swaps: list[SwapConfig], routers: list[MethodUse]) -> list[SwapConfig]:
    """Swaps of the routers that are still others: of methods that bring a router of their own."""
    layers = _built(found, swaps)
    others = [index for index, layer in enumerate(layers) if not _is(layer, routers[index])]
    return entries(found, ROUTER, [routers[index].config for index in others], others) if others else []


def _balance(found: Origin, swaps: list[SwapConfig]) -> tuple[list[SwapConfig], dict[str, float]]:
    """A balance loss where there is none, and its weight."""
    layers = _built(found, swaps)
    for layer in layers:
        for name, loss in layer.losses.items():
            if _made(loss) not in KEPT:
                raise ConfigError(
                    f"{layer.site}: the loss {name!r} ({_made(loss)}) needs the method's own router, so top-k cannot "
                    "take its place; use dense, equal_flops or equal_parameters"
                )
    lacking = [index for index, layer in enumerate(layers) if not any(map(_balances, layer.losses.values()))]
    if not lacking:
        return [], {}
    was = any(name == "balance" and _balances(loss) for layer in layers for name, loss in layer.losses.items())
    weight = loss_weights(found.recipe, found.model).get("balance", WEIGHT) if was else WEIGHT
    return entries(found, BALANCE, [{} for _ in lacking], lacking), {"balance": weight}


def _balances(loss: nn.Module) -> bool:
    return isinstance(loss, RoutingLoss) and _made(loss) == BALANCE


def _words(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"
