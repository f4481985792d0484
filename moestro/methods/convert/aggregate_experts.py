"""Aggregation of experts: several trained mixtures become one that holds the experts of all of them.

Models A, B, ... of equal shapes with E_A, E_B, ... experts a layer give layers of E_A + E_B + ... experts:

    experts = [experts of A; experts of B; ...],   W_g = [W_g of A; W_g of B; ...]   [sum of E, D]

A token is then routed over all of them with the same number of choices as before, and training goes on. With the
logits of all rows but A's at -inf the model is A, as long as everything outside the experts is A's. A router that first
chooses among G groups of experts has the groups of all models afterwards, G of each, and keeps as many as before.

What stands outside the experts is A's (``shared = "first"``) or the mean over the models (``"mean"``). The mean makes
sense only for models that grew out of one initialisation: independent ones have no units in common. ``"auto"`` looks:
parameters of one origin stay correlated, those of independent draws have a cosine of about 1/sqrt(n).

Source: Z-code M3 (2109.10465). Its text says neither which weights outside the experts are kept nor whether router
rows are scaled; both rules for the first are here, and rows are taken as they are.
"""

from collections.abc import Mapping
from typing import Literal

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import PlanError
from moestro.core.inputs import LayerShape, PlanInputs, Subject, with_gate
from moestro.core.plan import ExpertPlan, MethodUse
from moestro.methods.convert._parts.layers import Layers, choose
from moestro.methods.convert._parts.origin import related
from moestro.surgery.plans import aggregate


class Config(BaseConfig):
    """Settings.

    Attributes:
        layers: which mixtures: all, first:N, last:N, every:N or a list; the others follow ``shared`` whole.
        shared: what stands outside the joined experts: that of the ``first`` model, the ``mean`` over all, or ``auto``:
            the mean for models of one initialisation, otherwise the first model's.
    """

    layers: Layers = "all"
    shared: Literal["auto", "first", "mean"] = "auto"


def of_one_origin(first: Subject, second: Subject, layers: list[int]) -> bool:
    """Whether two models descend from one initialisation, by the up projections of their experts of equal number."""
    votes = [
        related(first.tensor(layer, expert, "up"), second.tensor(layer, expert, "up"))
        for layer in layers
        for expert in range(min(_count(first, layer), _count(second, layer)))
    ]
    return sum(votes) * 2 > len(votes)


def _count(model: Subject, layer: int) -> int:
    return model.shape.layer(layer).num_experts or 0


def _check_router(name: str, mine: LayerShape, theirs: LayerShape) -> None:
    """Raise PlanError unless both routers are made by the same method with the same settings."""
    if theirs.num_experts is None:
        raise PlanError(f"{name} layer {theirs.layer} is dense; aggregation joins mixtures, see convert.upcycle")
    routers = [None if there.module is None else there.module.config.get("router") for there in (mine, theirs)]
    remaps = [None if there.module is None else there.module.config.get("remap") for there in (mine, theirs)]
    if any(remap is not None for remap in remaps):
        raise PlanError(f"layer {mine.layer}: a remapped router has no row for each expert; aggregate before merging")
    if routers[0] != routers[1]:
        raise PlanError(f"{name} layer {theirs.layer} routes by {routers[1]}, the first model by {routers[0]}")


def _grouped(layer: int, experts: int, models: Mapping[str, Subject]) -> MethodUse | None:
    """The module of a layer whose router holds the groups of all models; None where it has no groups."""
    there = models["self"].shape.layer(layer)
    module, groups = there.module, there.gate.get("num_groups", 1)
    if module is None or groups == 1:
        return None
    counts = [_count(model, layer) for model in models.values()]
    if len(set(counts)) > 1:
        raise PlanError(
            f"layer {layer}: its router chooses among {groups} groups of equal size, and the models have "
            f"{' and '.join(map(str, counts))} experts; join models of as many"
        )
    router = with_gate(module.config["router"], num_groups=groups * len(models))
    return MethodUse(method=module.method, config={**module.config, "num_experts": experts, "router": router})


def plan(inputs: PlanInputs, config: Config) -> ExpertPlan:
    """The experts of the model and of its donors side by side, in the order in which the models are given.

    Raises:
        PlanError: no donor, a donor whose layer is dense, one whose router works in another way, or groups of unequal
            size.
    """
    if not inputs.donors:
        raise PlanError("aggregation joins two or more mixtures and got one; give the others as donors")
    layers = [there.layer for there in choose(inputs.shape, config.layers, dense=False)]
    models: dict[str, Subject] = {"self": inputs.subject, **inputs.donors}
    for name, donor in inputs.donors.items():
        for layer in layers:
            _check_router(name, inputs.shape.layer(layer), donor.shape.layer(layer))
    one_origin = all(of_one_origin(inputs.subject, donor, layers) for donor in inputs.donors.values())
    mean = config.shared == "mean" or (config.shared == "auto" and one_origin)
    plan = aggregate(
        {name: model.shape for name, model in models.items()},
        layers,
        method="convert.aggregate_experts",
        rest="mean" if mean else "keep",
        config=config.model_dump(mode="json"),
        seed=inputs.seed,
        notes={"keeps": "nothing", "one_origin": one_origin, "models": list(models)},
    )
    entries = [
        entry.model_copy(update={"module": _grouped(entry.layer, len(entry.experts), models)}) for entry in plan.layers
    ]
    return plan.model_copy(update={"layers": entries})


CARD = MethodCard(
    title="Scalable and Efficient MoE Training for Multitask Multilingual Models",
    year=2021,
    arxiv="2109.10465",
    paper="zcode-m3",
    summary="The experts of several trained mixtures side by side under one router.",
    taxonomy="scheme/expert-model-merging",
    needs=("models",),
    deviations=(
        "what stands outside the experts follows a rule of ours, since the paper's is not known",
        "training that goes on starts with a fresh optimiser",
    ),
)
