"""Splitting sequences into two groups that touch few experts."""

import itertools

import numpy as np
import pytest

from moestro.core.errors import ConfigError
from moestro.methods.serve._parts import token_split
from moestro.methods.serve._parts.token_split import split, touched


def random_paths(seed: int, count: int, pairs: int = 24, rate: float = 0.15) -> np.ndarray:
    return np.random.default_rng(seed).random((count, pairs)) < rate


def clustered(seed: int, count: int) -> np.ndarray:
    """Two kinds of sequences over halves of the experts, shuffled."""
    draw = np.random.default_rng(seed)
    paths = draw.random((count, 40)) < 0.3
    kind = draw.permutation(count) % 2
    paths[kind == 0, 20:] = False
    paths[kind == 1, :20] = False
    return paths


def test_touched_by_hand() -> None:
    paths = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=bool)
    assert touched(paths, np.array([0, 1, 2, 3])) == 2 + 2
    assert touched(paths, np.array([0, 2, 1, 3])) == 3 + 2


@pytest.mark.parametrize("count", [2, 4, 6, 8, 12, 16, 32, 64])
def test_a_permutation_of_two_halves_never_worse_than_as_it_was(count: int) -> None:
    for seed in range(6):
        paths = random_paths(seed, count)
        order = split(paths, seed=seed)
        assert sorted(order.tolist()) == list(range(count))
        assert touched(paths, order) <= touched(paths, np.arange(count))
        half = count // 2
        assert order[0] == 0, "the group of the first goes first"
        assert (np.diff(order[:half]) > 0).all()
        assert (np.diff(order[half:]) > 0).all()
        np.testing.assert_array_equal(split(paths, seed=seed), order)


def test_the_loop_never_leaves_what_is_better_as_it_was() -> None:
    for seed in range(20):
        paths = random_paths(seed + 90, 12, pairs=48)
        paths = paths[split(paths)]  # as it is, it is as good as can be
        order = split(paths, exact=0)
        assert touched(paths, order) == touched(paths, np.arange(12))


@pytest.mark.parametrize("count", [4, 6, 8, 10])
def test_few_are_split_as_well_as_can_be(count: int) -> None:
    for seed in range(8):
        paths = random_paths(seed + 50, count)
        best = min(
            touched(paths, np.array([*group, *(set(range(count)) - set(group))]))
            for group in itertools.combinations(range(count), count // 2)
        )
        assert touched(paths, split(paths)) == best


@pytest.mark.parametrize("count", [16, 32, 64])
def test_kinds_that_share_nothing_come_apart(count: int) -> None:
    paths = clustered(count, count)
    order = split(paths)
    first = paths[order[: count // 2]].any(0)
    assert not (first[:20].any() and first[20:].any())


def test_many_are_split_nearly_as_well_as_few_exactly() -> None:
    cases = [random_paths(seed, 12, pairs=48) for seed in range(30)]
    exact = sum(touched(paths, split(paths)) for paths in cases)
    plain = sum(touched(paths, np.arange(12)) for paths in cases)
    loop = sum(touched(paths, split(paths, exact=0)) for paths in cases)
    assert exact < loop < plain
    assert plain - loop > 0.4 * (plain - exact)


def slow_loop(paths: np.ndarray, centres: tuple[int, int], iterations: int) -> list[int]:
    """The K-medoid loop with capacities, one sequence after another; the best split it comes by."""
    count, half = len(paths), len(paths) // 2

    def alike(a: int, b: int) -> float:
        return 1 - float((paths[a] != paths[b]).mean())

    met = []
    for _ in range(iterations):
        favour = [alike(one, centres[0]) - alike(one, centres[1]) for one in range(count)]
        ranked = sorted(range(count), key=lambda one: -favour[one])
        groups = sorted(ranked[:half]), sorted(ranked[half:])
        met.append([*groups[0], *groups[1]] if 0 in groups[0] else [*groups[1], *groups[0]])
        first, second = (
            max(group, key=lambda one, group=group: np.mean([alike(one, other) for other in group]))
            for group in (ranked[:half], ranked[half:])
        )
        centres = (first, second)
    return min(met, key=lambda order: touched(paths, np.array(order)))


@pytest.mark.parametrize("count", [8, 16])
def test_the_loop_moves_centres_to_the_most_similar_member(count: int) -> None:
    """Pairs and members are powers of two, so that all means are exact and ties are ties."""
    results = []
    for seed in range(12):
        paths = random_paths(seed, count, pairs=32, rate=0.3)
        for iterations in (1, 3, 10):
            found = token_split._settled(paths, (1, 2), iterations)
            assert found.tolist() == slow_loop(paths, (1, 2), iterations)
            results.append(touched(paths, found))
    assert sum(results[1::3]) < sum(results[0::3]), "moving the centres changed nothing"


def test_as_it_was_where_nothing_is_better() -> None:
    paths = np.ones((20, 5), dtype=bool)
    assert split(paths).tolist() == list(range(20))


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_two_equal_groups_need_an_even_number(count: int) -> None:
    with pytest.raises(ConfigError, match="even number"):
        split(np.zeros((count, 4), dtype=bool))


def test_one_axis_is_no_paths() -> None:
    with pytest.raises(ConfigError):
        split(np.zeros(4, dtype=bool))
