"""Which of 2 T sequences run together, so that both halves touch few experts.

    R(group) = number of (layer, expert) pairs that any of its members touches;  minimise R(one) + R(other), T each

The exact answer is found for few sequences by trying all; else by a K-medoid loop with capacities: a centre is the
member most similar to its group, similarity 1 - Hamming / P, and sequences go to the centre that they favour most.
"""

import functools
import itertools
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError


Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[Any]

EXACT: Final = 12
"""Sequences up to which all splits are tried."""


def touched(paths: Bools, order: Ints) -> int:
    """R(one) + R(other) of bool [2 T, P] in an order whose first T rows are one group."""
    half = len(order) // 2
    return int(paths[order[:half]].any(0).sum() + paths[order[half:]].any(0).sum())


def split(paths: Bools, iterations: int = 10, seed: int = 0, exact: int = EXACT) -> Ints:
    """A permutation int64 [2 T] whose first T are one group; the identity unless something touches fewer pairs.

    Inside a group, and between the groups, the order stays as it was: the first group holds sequence 0.

    Args:
        paths: bool [2 T, P], the (layer, expert) pairs of each sequence. iterations: of the loop, from each start.
        seed: of the starts. exact: sequences up to which all splits are tried.

    Raises:
        ConfigError: an odd number of sequences, or none.
    """
    count = len(paths)
    if paths.ndim != 2 or count < 2 or count % 2:
        raise ConfigError(f"paths of shape {paths.shape}: two groups of equal size need an even number of sequences")
    identity = np.arange(count)
    if count <= exact:
        found = _all(paths)
    else:
        found = min(
            (_settled(paths, pair, iterations) for pair in _starts(paths, seed)), key=lambda o: touched(paths, o)
        )
    return found if touched(paths, found) < touched(paths, identity) else identity


def _ordered(first: Ints, count: int) -> Ints:
    """The permutation that puts one group first, the one with sequence 0."""
    inside = np.zeros(count, dtype=bool)
    inside[first] = True
    if not inside[0]:
        inside = ~inside
    return np.concatenate([np.flatnonzero(inside), np.flatnonzero(~inside)])


def _all(paths: Bools) -> Ints:
    """The best split by trying every one."""
    count = len(paths)
    member = _halves(count)
    ones = paths.astype(np.float32)
    cost = ((member @ ones) > 0).sum(1) + (((1 - member) @ ones) > 0).sum(1)
    return _ordered(np.flatnonzero(member[int(cost.argmin())]), count)


@functools.cache
def _halves(count: int) -> npt.NDArray[np.float32]:
    """Every group of half the sequences that holds sequence 0, float32 [splits, count]."""
    groups = [(0, *rest) for rest in itertools.combinations(range(1, count), count // 2 - 1)]
    member = np.zeros((len(groups), count), np.float32)
    member[np.arange(len(groups))[:, None], np.array(groups)] = 1
    return member


def _similarity(paths: Bools) -> npt.NDArray[np.float32]:
    """1 - Hamming / P of all pairs, [2 T, 2 T]."""
    ones = paths.astype(np.float32)
    size = ones.sum(1)
    differ = size[:, None] + size[None] - 2 * ones @ ones.T
    found: npt.NDArray[np.float32] = 1 - differ / np.float32(max(1, paths.shape[1]))
    return found


def _starts(paths: Bools, seed: int) -> list[tuple[int, int]]:
    """Pairs of centres: the two that are least alike, and three drawn."""
    alike = _similarity(paths)
    least = divmod(int(alike.argmin()), len(paths))
    draw = np.random.default_rng(seed)
    return [least, *((int(a), int(b)) for a, b in (draw.choice(len(paths), 2, replace=False) for _ in range(3)))]


def _settled(paths: Bools, centres: tuple[int, int], iterations: int) -> Ints:
    """The best split on the way of the loop from two centres."""
    alike, half = _similarity(paths), len(paths) // 2
    best: Ints | None = None
    for _ in range(iterations):
        favour = alike[centres[0]] - alike[centres[1]]
        groups = np.split(np.argsort(-favour, kind="stable"), [half])
        order = _ordered(groups[0], len(paths))
        if best is None or touched(paths, order) < touched(paths, best):
            best = order
        moved = tuple(int(group[alike[np.ix_(group, group)].mean(1).argmax()]) for group in groups)
        if moved == centres:
            break
        centres = (moved[0], moved[1])
    assert best is not None
    return best
