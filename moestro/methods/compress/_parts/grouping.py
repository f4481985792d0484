"""Who is merged with whom: how alike experts are, and groups of those that are alike.

Affinities lie in [0, 1], 1 for experts that cannot be told apart:

    router_logits   (1 + r) / 2 with Pearson's r of two experts' raw logits over the calibration tokens
    router_weight   (1 + cos) / 2 of their router rows
    expert_output   (1 + cos) / 2 of their outputs on the same tokens, sum_t <f_e, f_f> over the square roots of the
                    sums of squares

Raw logits, since a softmax makes all experts compete and hence look unlike; centred over tokens, since a row's mean
says how often an expert is liked and not by whom. An expert whose logits never vary on the data has no correlation; its
affinities are those of its router row.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moestro.core.errors import PlanError
from moestro.core.inputs import LayerShape, PlanInputs
from moestro.observe.statistics import LayerStats


Similarity = Literal["router_logits", "router_weight", "expert_output"]
Grouping = Literal["spectral", "agglomerative", "dominant", "random"]
Array = np.ndarray
RESTARTS = 20


def affinity(inputs: PlanInputs, there: LayerShape, similarity: Similarity) -> Array:
    """How alike the experts of a layer are, float64 [E, E], diagonal 1.

    Raises:
        PlanError: the statistics were collected without what the similarity needs.
    """
    if similarity == "router_weight":
        return by_rows(inputs, there)
    stats: LayerStats = inputs.statistic("experts", there.layer)
    if similarity == "expert_output":
        if stats.output_gram_EE is None:
            raise PlanError("expert_output needs the outputs' inner products; calibrate with output_gram=true")
        return (1.0 + cosine(stats.output_gram_EE)) / 2.0
    if stats.logits is None:
        raise PlanError(f"layer {there.layer}: its router gives no logits; use similarity=expert_output")
    own = there.num_experts or 0
    correlation: Array = stats.logits.correlation_DD[:own, :own].numpy()  # without nulls
    found: Array = (1.0 + correlation) / 2.0
    flat = ~stats.logits.varies_D[:own].numpy() & np.isfinite(found).all(1)
    if not flat.any():
        return found
    try:
        beside = by_rows(inputs, there)
    except PlanError:  # no row for each expert: half way between alike and opposite
        return found
    return np.where(flat[:, None] | flat, beside, found)


def by_rows(inputs: PlanInputs, there: LayerShape) -> Array:
    """(1 + cos) / 2 of router rows, float64 [E, E].

    Raises:
        PlanError: a router without a row for each expert.
    """
    rows = [inputs.subject.router_row(there.layer, expert, "weight") for expert in range(there.num_experts or 0)]
    weight_ED = torch.stack(rows).double()
    return (1.0 + cosine(weight_ED @ weight_ED.T)) / 2.0


def cosine(gram_EE: Tensor) -> Array:
    """Cosines from inner products, float64 [E, E], diagonal 1; a zero vector is at right angles to all others."""
    length_E = gram_EE.double().diagonal().clamp(min=0).sqrt()
    scale_E = torch.where(length_E > 0, 1.0 / length_E.clamp(min=1e-300), 0.0)
    found = (gram_EE.double() * scale_E[:, None] * scale_E).clamp(-1.0, 1.0)
    found.fill_diagonal_(1.0)
    values: Array = ((found + found.T) / 2.0).cpu().numpy()
    return values


def group(alike: Array, count: int, method: Grouping, usage: Array, seed: int = 0) -> list[list[int]]:
    """Experts in ``count`` groups, none empty.

    Args:
        alike: affinities [E, E]. usage: tokens of each expert [E], for the dominant ones. seed: of k-means and of
            random groups.

    Returns:
        Members in ascending order; groups in the order of their smallest member.

    Raises:
        PlanError: more groups than experts, or affinities that are not finite.
    """
    experts = len(alike)
    if not 1 <= count <= experts:
        raise PlanError(f"{experts} experts cannot be {count} groups; give 1 to {experts}")
    if not np.isfinite(alike).all():
        raise PlanError("affinities of experts hold NaN or infinity; look at the calibration data and the weights")
    if count == experts:
        return [[expert] for expert in range(experts)]
    if method == "spectral":
        label = spectral(alike, count, np.random.default_rng(seed))
    elif method == "agglomerative":
        label = agglomerative(alike, count)
    elif method == "dominant":
        label = dominant(alike, count, usage)
    else:
        draw = np.random.default_rng(seed)
        label = np.empty(experts, dtype=np.int64)
        order = draw.permutation(experts)
        label[order[:count]] = np.arange(count)
        label[order[count:]] = draw.integers(count, size=experts - count)
    return sorted(np.flatnonzero(label == each).tolist() for each in range(count))


def agglomerative(alike: Array, count: int) -> Array:
    """Average linkage on 1 - affinity, cut at ``count`` groups; exact and without a seed."""
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    tree = linkage(squareform(1.0 - alike, checks=False), method="average")
    label: Array = cut_tree(tree, n_clusters=count)[:, 0]
    return label


def dominant(alike: Array, count: int, usage: Array) -> Array:
    """The ``count`` most used experts lead; each other one joins the leader it is most like (MC-SMoE)."""
    leads = np.argsort(-usage, kind="stable")[:count]
    label: Array = alike[:, leads].argmax(1)
    label[leads] = np.arange(count)
    return label


def spectral(alike: Array, count: int, draw: np.random.Generator) -> Array:
    """Spectral clustering: leading eigenvectors of D^-1/2 S D^-1/2, rows of length 1, k-means.

    Source: Ng, Jordan and Weiss (2001).
    """
    scale = 1.0 / np.sqrt(np.maximum(alike.sum(1), 1e-300))
    _, vectors = np.linalg.eigh(alike * scale[:, None] * scale)
    rows = vectors[:, -count:]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    found = [k_means(rows, count, draw) for _ in range(RESTARTS)]
    # Rounding must not choose between restarts that are equally good.
    least = min(cost for cost, _ in found)
    return next(label for cost, label in found if cost <= least + 1e-9)


def k_means(rows: Array, count: int, draw: np.random.Generator, rounds: int = 100) -> tuple[float, Array]:
    """Lloyd's rounds from k-means++ means: (sum of squared distances, label of each row). No group is left empty."""
    means = rows[[int(draw.integers(len(rows)))]]
    while len(means) < count:
        near = np.maximum(squares(rows, means).min(1), 0.0)
        near[near < 1e-14] = 0.0
        total = near.sum()
        pick = int(draw.choice(len(rows), p=near / total)) if total > 0 else int(draw.integers(len(rows)))
        means = np.concatenate([means, rows[[pick]]])
    label = np.full(len(rows), -1)
    for _ in range(rounds):
        away = squares(rows, means)
        after = away.argmin(1)
        for empty in set(range(count)) - set(after.tolist()):
            sizes = np.bincount(after, minlength=count)
            own = np.where(sizes[after] > 1, away[np.arange(len(rows)), after], -1.0)
            after[int(own.argmax())] = empty
        if (after == label).all():
            break
        label = after
        means = np.stack([rows[label == each].mean(0) for each in range(count)])
    return float(squares(rows, means)[np.arange(len(rows)), label].sum()), label


def squares(rows: Array, means: Array) -> Array:
    """Squared distance of each row to each mean."""
    found: Array = np.square(rows[:, None] - means[None]).sum(-1)
    return found
