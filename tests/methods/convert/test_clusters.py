"""Balanced k-means from a Gram matrix, against brute force and against distances of real points."""

import itertools

import numpy as np
import pytest
import torch

from moestro.core.errors import PlanError
from moestro.methods.convert._parts.clusters import assign, balanced_clusters, distances


def test_distances_from_a_gram_matrix_are_those_of_the_points() -> None:
    draw = np.random.default_rng(0)
    points, cluster = draw.normal(size=(12, 5)), np.arange(12) % 3
    means = np.stack([points[cluster == c].mean(0) for c in range(3)])
    direct = ((points[:, None] - means) ** 2).sum(-1)
    np.testing.assert_allclose(distances(points @ points.T, cluster, 3), direct, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_assignment_is_the_best_balanced_one(seed: int) -> None:
    cost = np.random.default_rng(seed).normal(size=(6, 3))
    best = min(
        cost[np.arange(6), list(way)].sum()
        for way in itertools.product(range(3), repeat=6)
        if np.bincount(way, minlength=3).tolist() == [2, 2, 2]
    )
    found = assign(cost)
    assert np.bincount(found).tolist() == [2, 2, 2]
    assert cost[np.arange(6), found].sum() == pytest.approx(best)


def test_planted_clusters_are_found() -> None:
    draw = torch.Generator().manual_seed(0)
    member = torch.arange(60) % 5
    points = 10 * torch.randn(5, 8, generator=draw)[member] + 0.1 * torch.randn(60, 8, generator=draw)
    groups = balanced_clusters(points @ points.T, 5, seed=3)
    assert groups == [list(range(first, 60, 5)) for first in range(5)]


def test_sizes_are_equal_and_the_result_no_worse_than_its_start() -> None:
    points = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    gram = (points @ points.T).double().numpy()

    def within(groups: list[list[int]]) -> float:
        cluster = np.empty(64, dtype=np.int64)
        for index, group in enumerate(groups):
            cluster[group] = index
        return float(distances(gram, cluster, 8)[np.arange(64), cluster].sum())

    start = within(balanced_clusters(points @ points.T, 8, seed=0, rounds=0))
    end = within(balanced_clusters(points @ points.T, 8, seed=0))
    assert end < start
    groups = balanced_clusters(points @ points.T, 8, seed=0)
    assert [len(group) for group in groups] == [8] * 8
    assert groups == balanced_clusters(points @ points.T, 8, seed=0)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)


def test_points_that_are_all_alike_are_cut_all_the_same() -> None:
    groups = balanced_clusters(torch.ones(12, 12), 4, seed=0)
    assert sorted(unit for group in groups for unit in group) == list(range(12))
    assert [len(group) for group in groups] == [3] * 4


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(PlanError, match="10 inner units cannot be cut into 4"):
        balanced_clusters(torch.eye(10), 4, seed=0)
    with pytest.raises(PlanError, match="NaN or infinity"):
        balanced_clusters(torch.full((4, 4), float("nan")), 2, seed=0)
