"""From groups of experts to a plan that merges each into one."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from moestro import surgery
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import LayerShape, PlanInputs
from moestro.core.plan import ExpertPlan
from moestro.methods.compress._parts.alignment import EXACT, Align, permutations
from moestro.methods.compress._parts.calibration import (
    Calibrated,
    Keep,
    check_groups,
    count_of,
    least_of,
    refuse_remapped,
)
from moestro.methods.compress._parts.grouping import Array, Grouping, Similarity, affinity, group
from moestro.observe import calibrate
from moestro.surgery.choice import choose
from moestro.surgery.experts import generator
from moestro.surgery.plans import merge, prune


class Merging(Calibrated):
    """Settings of a merger; see the methods for what each means."""

    keep: Keep = 0.5
    similarity: Similarity = "router_logits"
    grouping: Grouping = "spectral"
    align: Align = "weights"
    weighting: Literal["usage", "equal"] = "usage"
    router: Literal["remap", "mean", "rows"] = "remap"
    sample: int = Field(default=512, ge=2)
    sequential: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Merging":
        if self.grouping == "random" and self.similarity != "router_logits":
            raise ConfigError(f"grouping=random looks at no similarity; leave similarity={self.similarity} out")
        return self

    def wishes(self) -> dict[str, dict[str, Any]]:
        """What the merger measures on data."""
        sample = self.sample if self.align == "activations" else 0
        return self.measured(output_gram=self.similarity == "expert_output", sample=sample)


def usage_of(inputs: PlanInputs, there: LayerShape) -> Array:
    """Tokens of each expert, float64 [E]."""
    counts: Array = inputs.statistic("experts", there.layer).count_E.double().numpy()
    return counts


def check_merging(inputs: PlanInputs, config: Merging) -> None:
    """Refuse what needs no measurement to be refused.

    Raises:
        PlanError: no mixtures, more experts than there are, or fewer than the router chooses and rows to choose them.
    """
    for there in choose(inputs.shape, config.layers, dense=False):
        count = count_of(there, config.keep)
        if config.similarity == "router_weight" and config.grouping != "random":
            refuse_remapped(there, "similarity=router_weight asks for it, use similarity=router_logits")
        if config.router == "remap":
            continue
        refuse_remapped(there, f"router={config.router} has no meaning there, use router=remap")
        if count < least_of(there):
            raise PlanError(
                f"layer {there.layer}: keep={config.keep} leaves {count} experts, but each token chooses "
                f"{there.top_k}; keep at least {least_of(there)}, or use router=remap"
            )
        check_groups(there, count)


def merged(inputs: PlanInputs, config: Merging, method: str) -> ExpertPlan:
    """The plan of a merger: the most used member of each group is the reference that the others are aligned to.

    Raises:
        PlanError: no mixtures, fewer experts than the router chooses, statistics that were not measured.
    """
    check_merging(inputs, config)
    chosen = choose(inputs.shape, config.layers, dense=False)
    weights: dict[int, list[dict[int, float]]] = {}
    orders: dict[int, dict[int, list[int]]] = {}
    for there, seen, behind in _walk(inputs, config, chosen):
        layer = there.layer
        weights[layer], orders[layer] = _groups(seen, config, there)
        if behind is not None:
            now = _plan(inputs, config, method, [there], {layer: weights[layer]}, {layer: orders[layer]})
            surgery.apply(behind, now.model_copy(update={"model_hash": None}))
    return _plan(inputs, config, method, chosen, weights, orders)


def _walk(
    inputs: PlanInputs, config: Merging, chosen: list[LayerShape]
) -> Iterator[tuple[LayerShape, PlanInputs, nn.Module | None]]:
    """Every layer with the statistics its groups come from: those of the model as it is, or with ``sequential`` those
    of a copy, which comes along so that the layer is merged there before the next one is measured.
    """
    if not config.sequential:
        yield from ((there, inputs, None) for there in chosen)
        return
    if inputs.model is None or inputs.batches is None:
        raise PlanError("sequential=true measures each layer behind merged ones; give an open model and data")
    behind, seen = copy.deepcopy(inputs.model), inputs
    for number, there in enumerate(chosen):
        if number:
            found = calibrate(behind, inputs.batches, **config.wishes()["experts"])
            seen = dataclasses.replace(inputs, statistics={**inputs.statistics, "experts": found})
        yield there, seen, behind


def _groups(
    inputs: PlanInputs, config: Merging, there: LayerShape
) -> tuple[list[dict[int, float]], dict[int, list[int]]]:
    """Groups of a layer with the weights of their members, and the order of each expert's inner units."""
    count, usage = count_of(there, config.keep), usage_of(inputs, there)
    alike = np.eye(len(usage)) if config.grouping == "random" else affinity(inputs, there, config.similarity)
    seed = int(torch.randint(2**31, (1,), generator=generator(inputs.seed, there.layer, "merge")))
    groups = [
        sorted(members, key=lambda expert: (-usage[expert], expert))
        for members in group(alike, count, config.grouping, usage, seed)
    ]
    sample = inputs.statistic("experts", there.layer).sample
    input_TD = None if sample is None else sample.input_TD
    orders = permutations(inputs.subject, there, groups, config.align, input_TD)
    return [shares(members, usage, config.weighting) for members in groups], orders


def shares(members: list[int], usage: Array, weighting: Literal["usage", "equal"]) -> dict[int, float]:
    """Weight of each member in its group's mean; equal ones for a group that no token used."""
    total = float(usage[members].sum())
    if weighting == "equal" or total <= 0:
        return dict.fromkeys(members, 1.0 / len(members))
    return {expert: float(usage[expert]) / total for expert in members}


def _plan(
    inputs: PlanInputs,
    config: Merging,
    method: str,
    chosen: list[LayerShape],
    weights: dict[int, list[dict[int, float]]],
    orders: dict[int, dict[int, list[int]]],
) -> ExpertPlan:
    # A layer that keeps all of its experts is copied as it is, under its own router.
    whole = {there.layer for there in chosen if len(weights[there.layer]) == there.num_experts}
    groups = {str(layer): [sorted(members) for members in found] for layer, found in weights.items()}
    aligned = config.align if all(there.inner <= EXACT for there in chosen) else f"{config.align}, in runs of {EXACT}"
    fields: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "seed": inputs.seed,
        "model_hash": inputs.subject.fingerprint(),
        "notes": {
            "keeps": "as_routed" if len(whole) == len(chosen) else "nothing",
            "groups": groups,
            "aligned": aligned,
        },
    }
    kept = {layer: sorted(expert for members in weights[layer] for expert in members) for layer in whole}
    same = prune(inputs.shape, kept, method=method, **fields)
    parts = {layer: found for layer, found in weights.items() if layer not in whole}
    plan = merge(inputs.shape, parts, method=method, router=config.router, permutations=orders, **fields)
    layers = sorted([*same.layers, *plan.layers], key=lambda entry: entry.layer)
    return plan.model_copy(update={"layers": layers})
