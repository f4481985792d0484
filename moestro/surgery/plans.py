"""Plans of the common shapes: prune, permute, merge, segment, aggregate; pure functions of a model's shape.

A planner decides what (which experts stay, who is merged with whom); these say it in the form that surgery applies.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from moestro.core.errors import PlanError
from moestro.core.inputs import LayerShape, ModelShape, with_gate
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, MethodUse


def prune(shape: ModelShape, kept: Mapping[int, Sequence[int]], *, method: str, **fields: Any) -> ExpertPlan:
    """Layers with only some of their experts, in the order given; their router rows go with them.

    Args:
        kept: layer -> experts that stay; all of them in another order is a permutation. method: who decided.
        fields: further fields of the plan, such as ``config``, ``seed`` and ``model_hash``.
    """
    layers = [
        LayerExperts(layer=layer, experts=[[ExpertSource(layer=layer, expert=expert)] for expert in experts])
        for layer, experts in kept.items()
    ]
    for entry in layers:
        _mixture(shape, entry.layer)
    return ExpertPlan(method=method, layers=layers, **fields)


def merge(
    shape: ModelShape,
    groups: Mapping[int, Sequence[Mapping[int, float]]],
    *,
    method: str,
    router: Literal["rows", "mean", "remap"] = "mean",
    permutations: Mapping[int, Mapping[int, Sequence[int]]] | None = None,
    **fields: Any,
) -> ExpertPlan:
    """Groups of experts, each replaced by a weighted mean.

    Args:
        groups: layer -> groups of {expert: weight}; weights are divided by their sum. The first expert of a group
            gives the router row under ``rows``.
        permutations: layer -> expert -> order of its inner units that aligns it with its group.

    Raises:
        PlanError: the weights of a group do not sum to a positive number.
    """
    layers = []
    for layer, members in groups.items():
        _mixture(shape, layer)
        orders = (permutations or {}).get(layer, {})
        experts = []
        for group in members:
            total = sum(group.values())
            if total <= 0:
                raise PlanError(
                    f"layer {layer}: the weights of experts {sorted(group)} sum to {total}; give use counts"
                )
            experts.append(
                [
                    ExpertSource(
                        layer=layer,
                        expert=expert,
                        permutation=list(orders[expert]) if expert in orders else None,
                        weight=weight / total,
                    )
                    for expert, weight in group.items()
                ]
            )
        layers.append(LayerExperts(layer=layer, experts=experts, router=router))
    return ExpertPlan(method=method, layers=layers, **fields)


def segment(
    shape: ModelShape, segments: int, layers: Sequence[int], *, method: str, scale_down: float, **fields: Any
) -> ExpertPlan:
    """Every expert cut into equal runs of inner units, each with its parent's router row; m times as many are chosen.

    Args:
        segments: m. scale_down: factor on the down projections, see ``convert.segment``.

    Raises:
        PlanError: m does not divide the inner width, or the router does not choose a fixed number.
    """
    entries = []
    for layer in layers:
        there = _mixture(shape, layer)
        if there.inner % segments:
            raise PlanError(f"layer {layer}: {segments} segments do not divide {there.inner} inner units")
        width = there.inner // segments
        cuts = [list(range(first, first + width)) for first in range(0, there.inner, width)]
        experts = [
            [ExpertSource(layer=layer, expert=expert, rows=rows, scale_down=scale_down)]
            for expert in range(there.num_experts or 0)
            for rows in cuts
        ]
        entries.append(LayerExperts(layer=layer, experts=experts, module=_with_choices(there, segments, len(experts))))
    return ExpertPlan(method=method, layers=entries, **fields)


def aggregate(
    shapes: Mapping[str, ModelShape], layers: Sequence[int], *, method: str, rest: str = "keep", **fields: Any
) -> ExpertPlan:
    """The experts of several mixtures side by side in each layer, router rows stacked in the same order.

    Args:
        shapes: the models by name, ``self`` among them; experts come in this order. rest: see ExpertPlan.
    """
    entries = []
    for layer in layers:
        experts = [
            [ExpertSource(donor=donor, layer=layer, expert=expert)]
            for donor, shape in shapes.items()
            for expert in range(_mixture(shape, layer).num_experts or 0)
        ]
        entries.append(LayerExperts(layer=layer, experts=experts))
    return ExpertPlan(method=method, layers=entries, rest=rest, **fields)


def _mixture(shape: ModelShape, layer: int) -> LayerShape:
    """The layer, which must be a mixture."""
    there = shape.layer(layer)
    if there.num_experts is None:
        mixtures = [index for index, other in shape.layers.items() if other.num_experts is not None]
        raise PlanError(f"{shape.name} layer {layer} is dense; mixtures are layers {mixtures or 'none'}")
    return there


def _with_choices(there: LayerShape, factor: int, num_experts: int) -> MethodUse:
    """The layer's module with ``factor`` times as many choices a token."""
    if there.module is None or there.top_k is None:
        raise PlanError(
            f"layer {there.layer}: its router chooses no fixed number of experts, so it cannot choose {factor} times "
            "as many; a router with top_k can"
        )
    router = with_gate(there.module.config["router"], top_k=there.top_k * factor)
    width = there.inner // factor
    return MethodUse(
        method=there.module.method,
        config={**there.module.config, "num_experts": num_experts, "expert_size": width, "router": router},
    )
