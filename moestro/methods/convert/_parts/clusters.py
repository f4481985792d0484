"""Clusters of equal size: k-means in the space of a Gram matrix, with an exactly balanced assignment.

With K the Gram matrix of the points (K_ij = <x_i, x_j>) the squared distance of point i to the mean of cluster c is

    d(i, c) = K_ii - 2 / |c| sum_{j in c} K_ij + 1 / |c|^2 sum_{j, j' in c} K_jj'

so the points themselves are not needed: rows of weights give K = X X^T, co-activation counts are a Gram matrix already.
Each round assigns all points at once so that every cluster gets exactly n / k of them and the sum of distances is the
least possible (a linear assignment problem with n / k places for each cluster, solved by SciPy), then moves the means.
The sum of squared distances never grows, so the rounds end.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moestro.core.errors import PlanError


def distances(gram: np.ndarray, cluster: np.ndarray, count: int) -> np.ndarray:
    """Squared distance of each point to each cluster's mean, [n, k], from a Gram matrix [n, n] and members [n]."""
    share = np.zeros((len(gram), count))
    share[np.arange(len(gram)), cluster] = 1.0
    share /= share.sum(0)
    cross = gram @ share
    found: np.ndarray = np.diag(gram)[:, None] - 2.0 * cross + (share * cross).sum(0)
    return found


def assign(cost: np.ndarray) -> np.ndarray:
    """The cluster of each point [n] that makes the sum of ``cost`` [n, k] least with n / k points in each cluster."""
    points, count = cost.shape
    rows, places = linear_sum_assignment(np.repeat(cost, points // count, axis=1))
    cluster = np.empty(points, dtype=np.int64)
    cluster[rows] = places // (points // count)
    return cluster


def first_means(gram: np.ndarray, count: int, draw: np.random.Generator) -> np.ndarray:
    """Distances [n, k] to k points drawn far from each other (k-means++: in proportion to the squared distance)."""
    square = np.diag(gram)
    chosen = [int(draw.integers(len(gram)))]
    found = [np.maximum(square - 2.0 * gram[:, chosen[0]] + square[chosen[0]], 0.0)]
    while len(chosen) < count:
        near = np.minimum.reduce(found)
        near[chosen] = 0.0
        total = near.sum()
        free = np.setdiff1d(np.arange(len(gram)), chosen)
        pick = int(draw.choice(len(gram), p=near / total)) if total > 0 else int(draw.choice(free))
        chosen.append(pick)
        found.append(np.maximum(square - 2.0 * gram[:, pick] + square[pick], 0.0))
    return np.stack(found, 1)


def balanced_clusters(gram_II: Tensor, count: int, seed: int, *, rounds: int = 50) -> list[list[int]]:
    """Cut points into ``count`` clusters of equal size.

    Args:
        gram_II: Gram matrix of the points. seed: of the first means. rounds: at most so many.

    Returns:
        The members of each cluster in ascending order; clusters ordered by their smallest member.

    Raises:
        PlanError: ``count`` does not divide the number of points, or the matrix holds a value that is not finite.
    """
    gram = gram_II.detach().to("cpu", torch.float64).numpy()
    if len(gram) % count:
        raise PlanError(f"{len(gram)} inner units cannot be cut into {count} equal clusters")
    if not np.isfinite(gram).all():
        raise PlanError("the similarities of inner units hold NaN or infinity; look at the weights or the statistics")
    cluster = assign(first_means(gram, count, np.random.default_rng(seed)))
    least = np.inf
    for _ in range(rounds):
        cost = distances(gram, cluster, count)
        within = cost[np.arange(len(gram)), cluster].sum()
        if within >= least - 1e-12 * max(abs(least), 1.0) and np.isfinite(least):
            break
        least = within
        cluster = assign(cost)
    members = [np.flatnonzero(cluster == c).tolist() for c in range(count)]
    return sorted(members)
