"""Read-ME: a dense model as a smaller mixture, one expert a domain, made of the units that the domain uses most.

Domain i, layer l, unit h: importance = mean over the domain's tokens of |a_h|, a the input of the down projection.
Expert i has the round(keep H) most important units, ties to the lower unit; units of every expert are *permanent*. The
same index means the same domain in each layer, no weight is changed, a chosen expert weighs 1. With ``keep`` = 1 the
mixture is the dense model.

Units of several experts are one weight while experts are trained, so the published form is index lists on one pool:
``refactorize(..., storage="shared_pool")``, which holds the dense feed-forward once. A plan, as every plan, copies:
``storage="copied"`` is the plan, applied. One router, ``train.read_me``, decides for all layers from token ids alone.

Source: Read-ME (2410.19123, section 3) and its released code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from moestro import surgery
from moestro.core.bank import PooledFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import PlanError
from moestro.core.inputs import LayerShape, PlanInputs
from moestro.core.layer import MoELayer
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, MethodUse
from moestro.methods.convert._parts.layers import Layers, choose, mixture, router_use
from moestro.models.load import adopt
from moestro.models.sites import sites_by_layer
from moestro.models.swap import swap
from moestro.surgery.opened import OpenModel, bank_slot


ROUTER = MethodUse(method="train.read_me", config={"router_dim": 64})


class Config(BaseConfig):
    """Settings.

    Attributes:
        layers: which dense layers: all, first:N, last:N, every:N or a list.
        keep: share of a layer's units in each expert. domains: their names, in the order of the experts; None takes
            those of the data, sorted. min_tokens: a domain measured on fewer is refused; the paper has 65,536.
        router: a router method that chooses one expert.
    """

    layers: Layers = "all"
    keep: float = Field(default=0.5, gt=0, le=1)
    domains: list[str] | None = Field(default=None, min_length=1)
    min_tokens: int = Field(examples=[1], ge=1)
    router: MethodUse = ROUTER


@dataclass(frozen=True)
class Masks:
    """Which units the experts of a layer have: ``rows_EW`` int64, ascending in each expert."""

    rows_EW: Tensor

    @property
    def permanent(self) -> list[int]:
        """Units of every expert."""
        count_H = torch.bincount(self.rows_EW.flatten())
        return [int(unit) for unit in (count_H == len(self.rows_EW)).nonzero()]


def width_of(keep: float, inner: int) -> int:
    """Units of an expert: round(keep H), at least 1."""
    return max(1, round(keep * inner))


def masks_of(importance_EH: Tensor, keep: float) -> Masks:
    """The most important units of each domain, exactly as many for each."""
    width = width_of(keep, importance_EH.shape[1])
    order_EH = importance_EH.argsort(dim=1, descending=True, stable=True)
    return Masks(order_EH[:, :width].sort(1).values)


def domain_masks(
    activity: Mapping[int, Mapping[str, tuple[Tensor, int]]],
    keep: float,
    domains: Sequence[str] | None = None,
    min_tokens: int = 1000,
) -> dict[int, Masks]:
    """Masks by layer from ``observe.neurons.domain_activity``.

    Raises:
        PlanError: a domain that was not measured, or on too few tokens.
    """
    found = {}
    for layer, measured in activity.items():
        names = sorted(measured) if domains is None else list(domains)
        for name in names:
            if name not in measured:
                raise PlanError(f"domain {name!r} was not measured; the data have {', '.join(sorted(measured))}")
            if measured[name][1] < min_tokens:
                raise PlanError(
                    f"domain {name!r} was measured on {measured[name][1]} tokens, min_tokens={min_tokens}; give more"
                )
        found[layer] = masks_of(torch.stack([measured[name][0] for name in names]), keep)
    return found


def entry(there: LayerShape, masks: Masks, router: MethodUse) -> LayerExperts:
    """One layer whose experts are copies of their units."""
    count, width = masks.rows_EW.shape
    return LayerExperts(
        layer=there.layer,
        experts=[[ExpertSource(layer=there.layer, rows=rows)] for rows in masks.rows_EW.tolist()],
        router="new",
        module=mixture(there, count, width, router_use(router, 1), {}, 0),
    )


def refactorize(
    model: Any,
    masks: Mapping[int, Masks],
    *,
    storage: Literal["shared_pool", "copied"] = "shared_pool",
    router: MethodUse = ROUTER,
    seed: int = 0,
) -> None:
    """Change an open dense model in place.

    Args:
        masks: by layer, see ``domain_masks``. storage: one pool with index lists, or a matrix for each expert.
        seed: of the router's first values.

    Raises:
        PlanError: a layer that is not dense. ConfigError: settings of the router.
    """
    opened = OpenModel(model)
    shapes = {there.layer: there for there in choose(opened.shape, sorted(masks), dense=True)}
    if storage == "copied":
        layers = [entry(shapes[layer], masks[layer], router) for layer in sorted(masks)]
        surgery.apply(model, ExpertPlan(method="convert.read_me", seed=seed, layers=layers))
        return
    before = {
        layer: {name: opened.tensor(layer, None, name).clone() for name in there.names}
        for layer, there in shapes.items()
    }
    if not getattr(model, "is_moestro", False):
        adopt(model)
    counts, widths = zip(*(masks[layer].rows_EW.shape for layer in sorted(masks)), strict=True)
    config = {
        "num_experts": {"per_layer": list(counts)},
        "expert_size": {"per_layer": list(widths)},
        "router": router_use(router, 1),
    }
    config |= {
        name: {"per_layer": [getattr(shapes[layer], field) for layer in sorted(masks)]}
        for name, field in (("pool_size", "inner"), ("activation", "activation"), ("gated", "gated"), ("bias", "bias"))
    }
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        swap(model, "train.index_pool", config, layers=sorted(masks))
    for layer, site in sites_by_layer(model, "mlp").items():
        if layer in masks:
            assert isinstance(site.module, MoELayer)
            assert isinstance(site.module.bank, PooledFFN)
            _fill(site.module.bank, before[layer], masks[layer])


@torch.no_grad()
def _fill(bank: PooledFFN, tensors: Mapping[str, Tensor], masks: Masks) -> None:
    """Write the dense feed-forward into the pool."""
    for name, value in tensors.items():
        parameter, index = bank_slot(bank.pool, 0, name)
        parameter[index].copy_(value)
    bank.set_rows(masks.rows_EW)


def statistics(config: Config) -> tuple[str, ...]:
    """Mean absolute activations by domain."""
    return ("domain_activity",)


def plan(inputs: PlanInputs, config: Config) -> ExpertPlan:
    """Copied experts for every chosen layer.

    Raises:
        PlanError: no such layers, activations that were not measured, or a domain with too few tokens.
    """
    chosen = choose(inputs.shape, config.layers, dense=True)
    activity = {there.layer: inputs.statistic("domain_activity", there.layer) for there in chosen}
    masks = domain_masks(activity, config.keep, config.domains, config.min_tokens)
    names = sorted(activity[chosen[0].layer]) if config.domains is None else config.domains
    return ExpertPlan(
        method="convert.read_me",
        config=config.model_dump(mode="json"),
        seed=inputs.seed,
        model_hash=inputs.subject.fingerprint(),
        layers=[entry(there, masks[there.layer], config.router) for there in chosen],
        notes={
            "keeps": "nothing",
            "domains": list(names),
            "permanent": {str(layer): len(mask.permanent) for layer, mask in masks.items()},
        },
    )


CARD = MethodCard(
    title="Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
    year=2024,
    arxiv="2410.19123",
    paper="read-me",
    summary="One expert a domain from the units it uses most; one router on token ids for all layers.",
    taxonomy="scheme/dense-to-sparse",
    needs=("model",),
    deviations=(
        "experts have exactly round(keep H) units; the released code compares with the threshold and loses one",
        "plans copy the experts; refactorize keeps one pool with index lists",
    ),
)
