"""Expert pruning: leave out the experts that matter least on calibration data, with their router rows.

What is left routes by a softmax (or sigmoid) over the rows that are left; under a router that merging has remapped, all
rows that lead to an expert go with it. An expert e of a layer scores, over the tokens t in T_e that are routed to it,
with weight w_te, gate g_te before renormalisation, output f_e(x_t):

    random           a random number
    router_norm      |W_g[e]|, the length of its router row
    frequency        |T_e|                                       (utilisation)
    router_weight    sum_t g_te
    output_norm      mean_t |f_e(x_t)|
    reap             mean_t w_te |f_e(x_t)|
    reconstruction   greedy: the expert goes whose removal, with those already gone, changes the block's output least,
                     sum_t |y_t - y'_t|^2 on a sample of tokens; y' is what the router makes of the experts left

``keep`` is a number or share for every layer, or with ``budget="global"`` on average: each layer keeps at least
``floor`` experts, the rest of the budget goes to the best scores of all layers. Scores are compared as they are or as
parts of their layer's sum (``compare``; errors of the reconstruction always as parts of the squared output of the
block's routed experts).

Sources: Z-code M3 (2109.10465: random and by utilisation); REAP (2510.13999, router-weighted activation); NAEE
(2402.14800, section 3.1: least reconstruction loss, here greedy instead of over all subsets).
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moestro.core.card import MethodCard
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import LayerShape, PlanInputs
from moestro.core.plan import ExpertPlan
from moestro.methods.compress._parts.calibration import (
    Calibrated,
    Keep,
    check_choices,
    check_groups,
    count_of,
    groups_of,
    least_of,
    refuse_remapped,
)
from moestro.observe.sample import BlockSample
from moestro.observe.statistics import LayerStats
from moestro.surgery.choice import choose
from moestro.surgery.experts import generator
from moestro.surgery.plans import prune


Criterion = Literal["random", "router_norm", "frequency", "router_weight", "output_norm", "reap", "reconstruction"]


class Config(Calibrated):
    """Settings.

    Attributes:
        layers: which mixtures: all, first:N, last:N, every:N or a list.
        criterion: who goes first, see the top of the file; utilisation is frequency.
        keep: experts a layer has afterwards: a whole number, or a share such as 0.75 of those it has.
        budget: keep in every layer, or on average over the chosen layers.
        floor: least experts of a layer under budget=global; None means as many as a token chooses.
        compare: scores of several layers: as parts of their layer's sum, or as they are.
        sample: tokens that reconstruction looks at.
        policy, raise_to: whom a calibration token counts for: natural, raised (to raise_to experts) or all.
        least: tokens below which an expert is starved. allow_starved: go on with half or more of them starved.
    """

    criterion: Criterion = "reap"
    keep: Keep = 0.75
    budget: Literal["layer", "global"] = "layer"
    floor: int | None = Field(default=None, ge=1)
    compare: Literal["share", "raw"] = "share"
    sample: int = Field(default=512, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.floor is not None and self.budget == "layer":
            raise ConfigError(
                f"floor={self.floor} with budget=layer, where every layer keeps {self.keep}; leave it out"
            )
        return self


def statistics(config: Config) -> dict[str, dict[str, object]]:
    """What is measured on data; nothing for a random choice and for the lengths of router rows."""
    if config.criterion in ("random", "router_norm"):
        return {}
    sample = config.sample if config.criterion == "reconstruction" else 0
    return config.measured(outputs=config.criterion in ("output_norm", "reap"), sample=sample)


def scores(stats: LayerStats, criterion: Criterion) -> Tensor:
    """Score of each expert, float64 [E], higher is better; 0 for one that no token counted for.

    Raises:
        PlanError: the statistics were collected without what the criterion needs.
    """
    if criterion == "router_weight" and stats.logits is None:
        raise PlanError("router_weight needs gates, which this router does not give; use criterion=frequency")
    part = {
        "frequency": stats.count_E.double(),
        "router_weight": stats.gate.total,
        "output_norm": None if stats.output_norm is None else stats.output_norm.mean,
        "reap": None if stats.gated_norm is None else stats.gated_norm.mean,
    }[criterion]
    if part is None:
        raise PlanError(f"{criterion} needs the lengths of expert outputs; calibrate with outputs=true")
    return part


def reconstruction(sample: BlockSample | None, least: int) -> Tensor:
    """Score of each expert, float64 [E]: the error when it goes, as a part of the squared output
    of the routed experts.

    Errors of later steps count at least as much as those of earlier ones, so that the lowest scores are always a set
    that the greedy choice went through. The last ``least`` experts score infinity.

    Raises:
        PlanError: no sample, or a router that cannot choose again.
    """
    if sample is None or not len(sample.weight_TE):
        raise PlanError("reconstruction needs sampled tokens; calibrate with sample=512")
    experts = sample.weight_TE.shape[1]
    energy = float(torch.einsum("te,tef,tf->", sample.weight_TE, sample.gram_TEE, sample.weight_TE))
    found_E = torch.full((experts,), torch.inf, dtype=torch.float64)
    kept_E = torch.ones(experts, dtype=torch.bool)
    before = torch.tensor(-1.0, dtype=torch.float64)
    for _ in range(experts - least):
        errors = {}
        for expert in kept_E.nonzero().squeeze(1).tolist():
            kept_E[expert] = False
            errors[expert] = sample.error_of(kept_E) / max(energy, 1e-30)
            kept_E[expert] = True
        gone = min(errors, key=lambda expert: (errors[expert], -expert))
        kept_E[gone] = False
        error = torch.tensor(errors[gone], dtype=torch.float64)
        before = torch.maximum(error, torch.nextafter(before, torch.tensor(torch.inf, dtype=torch.float64)))
        found_E[gone] = before
    return found_E


def best(score_E: Tensor, count: int, groups: int = 1) -> list[int]:
    """The ``count`` best experts in ascending order, as many of each group of neighbours; ties go to the lower id."""
    by_group = score_E.view(groups, -1)
    order = torch.sort(by_group, dim=1, descending=True, stable=True).indices[:, : count // groups]
    first = torch.arange(groups)[:, None] * by_group.shape[1]
    return sorted((order + first).flatten().tolist())


def global_counts(
    scores_by_layer: dict[int, Tensor], total: int, floors: dict[int, int], share: bool
) -> dict[int, int]:
    """How many experts each layer keeps: its floor, then the best scores of all layers until ``total`` are kept.

    Raises:
        PlanError: the floors alone are more than ``total``.
    """
    if sum(floors.values()) > total:
        raise PlanError(
            f"{total} experts in {len(floors)} layers, but the floors ({sorted(set(floors.values()))} a layer) already "
            f"take {sum(floors.values())}; keep more"
        )
    rest = []
    for layer, score_E in scores_by_layer.items():
        ranked = torch.sort(score_E, descending=True, stable=True).values
        whole = float(score_E.sum()) if share else 1.0
        for place, score in enumerate(ranked.tolist()[floors[layer] :]):
            rest.append((-(score / whole if whole > 0 else 0.0), place, layer))
    counts = dict(floors)
    for _, _, layer in sorted(rest)[: total - sum(floors.values())]:
        counts[layer] += 1
    return counts


def limits(layers: list[LayerShape], config: Config) -> tuple[dict[int, int], dict[int, int]]:
    """Experts of each layer afterwards (on average, under one budget for all), and the least that each must have.

    Raises:
        PlanError: fewer than a token chooses, or not as many in each of a router's groups.
    """
    counts = {there.layer: count_of(there, config.keep) for there in layers}
    for there in layers:
        count, groups, least = counts[there.layer], groups_of(there), least_of(there)
        if groups > 1:
            refuse_remapped(there, "its groups could not stay equal, start from the model before merging")
        if groups > 1 and config.budget == "global":
            raise PlanError(f"layer {there.layer}: its router has {groups} groups of equal size; use budget=layer")
        if config.floor is not None and config.floor < least:
            raise PlanError(
                f"floor={config.floor}, but layer {there.layer} needs {least}, since each token chooses {there.top_k}"
            )
        if count < least:
            raise PlanError(
                f"layer {there.layer}: keep={config.keep} leaves {count} of {there.num_experts} experts, but each "
                f"token chooses {there.top_k}; keep at least {least}"
            )
        check_groups(there, count)
    floors = {there.layer: max(config.floor or 1, least_of(there)) for there in layers}
    return counts, {there.layer: min(floors[there.layer], there.num_experts or 0) for there in layers}


def check(inputs: PlanInputs, config: Config) -> None:
    """Refuse what needs no measurement to be refused.

    Raises:
        PlanError: no mixtures, fewer experts than a token chooses, a router that the criterion cannot ask.
    """
    layers = choose(inputs.shape, config.layers, dense=False)
    limits(layers, config)
    for there in layers:
        if config.criterion in ("router_norm", "reconstruction"):
            refuse_remapped(there, f"criterion={config.criterion} asks for it, use criterion=reap")
        if config.criterion == "reconstruction" and groups_of(there) > 1:
            raise PlanError(
                f"layer {there.layer}: its router first chooses among {groups_of(there)} groups, and reconstruction "
                "cannot tell which it would choose with fewer experts; use criterion=reap"
            )


def scores_of(inputs: PlanInputs, there: LayerShape, criterion: Criterion) -> Tensor:
    """Score of each expert of a layer, float64 [E], higher is better.

    Raises:
        PlanError: statistics that were not measured, or scores that are NaN.
    """
    experts = range(there.num_experts or 0)
    if criterion == "random":
        return torch.rand(len(experts), generator=generator(inputs.seed, there.layer, "prune"), dtype=torch.float64)
    if criterion == "router_norm":
        rows = [inputs.subject.router_row(there.layer, expert, "weight") for expert in experts]
        found_E = torch.stack([row.double().norm().cpu() for row in rows])
    elif criterion == "reconstruction":
        found_E = reconstruction(inputs.statistic("experts", there.layer).sample, least_of(there))
    else:
        found_E = scores(inputs.statistic("experts", there.layer), criterion)
    wrong = found_E.isnan().nonzero().squeeze(1).tolist()
    if wrong:
        raise PlanError(
            f"layer {there.layer}: the {criterion} of {len(wrong)} of {len(experts)} experts is NaN (first expert "
            f"{wrong[0]}); look at its weights and at the calibration data"
        )
    return found_E


def plan(inputs: PlanInputs, config: Config) -> ExpertPlan:
    """Which experts of each chosen layer stay.

    Raises:
        PlanError: no mixtures, fewer experts than a token chooses, statistics that were not measured.
    """
    check(inputs, config)
    layers = choose(inputs.shape, config.layers, dense=False)
    found = {there.layer: scores_of(inputs, there, config.criterion) for there in layers}
    counts, floors = limits(layers, config)
    if config.budget == "global":
        share = config.compare == "share" and config.criterion != "reconstruction"
        counts = global_counts(found, sum(counts.values()), floors, share)
    kept = {there.layer: best(found[there.layer], counts[there.layer], groups_of(there)) for there in layers}
    for there in layers:
        check_choices(there, kept[there.layer])
    gone = sum((there.num_experts or 0) - counts[there.layer] for there in layers)
    listed = {
        layer: [value if value < torch.inf else None for value in score_E.tolist()] for layer, score_E in found.items()
    }
    return prune(
        inputs.shape,
        kept,
        method="compress.prune_experts",
        config=config.model_dump(mode="json"),
        seed=inputs.seed,
        model_hash=inputs.subject.fingerprint(),
        notes={
            "keeps": "nothing" if gone else "as_routed",
            "removed": gone,
            "kept": {str(layer): experts for layer, experts in kept.items()},
            "scores": {str(layer): values for layer, values in listed.items()},
        },
    )


CARD = MethodCard(
    title="Scalable and Efficient MoE Training for Multitask Multilingual Models",
    year=2021,
    arxiv="2109.10465",
    paper="zcode-m3",
    summary="Leave out the experts that matter least on calibration data, per layer or by one budget for all.",
    taxonomy="inference/model/compression/expert-pruning",
    needs=("model",),
    deviations=(
        "utilisation is counted over all data, not by language; calibrate on one language's texts for that",
        "reconstruction removes experts greedily instead of trying all subsets",
    ),
)
