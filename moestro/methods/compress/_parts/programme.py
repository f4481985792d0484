"""The cheapest choice of one width for each expert under a budget: an integer programme, solved exactly.

Dynamic programming over experts; a state is how much of the budget is used, in units of the greatest common divisor of
the widths' sizes, and how many of the experts that must have some width have it. For E experts, J widths, U units and F
least numbers that is E J U prod(F + 1) additions, well under a second for 256 experts.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moestro.core.errors import PlanError


Array = np.ndarray[Any, np.dtype[np.float64]]


def allocate(
    cost_EJ: Array, size_J: Sequence[int], budget: int, *, exact: bool, least_J: Sequence[int] | None = None
) -> list[int]:
    """For each expert the index of its width: the cheapest that keeps the budget, by dynamic programming.

    Args:
        cost_EJ: what width j costs expert i, finite and not negative. size_J: what it takes of the budget, rising.
        exact: the budget must be used up; otherwise it is a bound. least_J: experts that have width j at least.

    Raises:
        PlanError: a cost that is negative or not finite, or no assignment keeps the budget; with the bounds that do.
    """
    experts, widths = cost_EJ.shape
    if not np.isfinite(cost_EJ).all() or (cost_EJ < 0).any():
        raise PlanError("a sensitivity, frequency or weight is negative or not a number; calibrate again")
    least = list(least_J or [0] * widths)
    forced = sum(count * (size - size_J[0]) for count, size in zip(least, size_J, strict=True))
    low = experts * size_J[0] + forced
    high = experts * size_J[-1] - sum(n * (size_J[-1] - size) for n, size in zip(least, size_J, strict=True))
    if sum(least) > experts or budget < low or (exact and budget > high):
        raise PlanError(
            f"a budget of {budget} for {experts} experts cannot be kept; with at least {least} experts at the widths "
            f"it lies between {low} and {high}"
        )
    unit = math.gcd(*(size - size_J[0] for size in size_J)) or 1
    steps = [(size - size_J[0]) // unit for size in size_J]
    spare = min(budget - experts * size_J[0], experts * (size_J[-1] - size_J[0]))
    if exact and spare % unit:
        raise PlanError(f"a budget of {budget} cannot be used up in steps of {unit}; {budget - spare % unit} can")
    best = _table(cost_EJ, steps, spare // unit, least)
    return _trace(best, cost_EJ, steps, spare // unit, least, exact)


def _states(least: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    """Shape of the counts that are followed (one more than each least number), and the widths they belong to."""
    followed = [index for index, count in enumerate(least) if count]
    return tuple(least[index] + 1 for index in followed), followed


def _table(cost_EJ: Array, steps: Sequence[int], top: int, least: Sequence[int]) -> list[Array]:
    """best[i][met..., b]: least cost of the first i experts that use b steps and have met these least numbers."""
    shape, followed = _states(least)
    start = np.full((*shape, top + 1), np.inf)
    start[(0,) * (len(shape) + 1)] = 0.0
    tables = [start]
    for row in cost_EJ:
        before, after = tables[-1], np.full_like(start, np.inf)
        for width, step in enumerate(steps):
            if step > top:
                continue
            moved = before[..., : top + 1 - step] + row[width]
            if width in followed:
                moved = _met(moved, followed.index(width))
            np.minimum(after[..., step:], moved, out=after[..., step:])
        tables.append(after)
    return tables


def _met(table: Array, axis: int) -> Array:
    """One more expert of a width whose number is followed along ``axis``; the last place means enough."""
    moved = np.full_like(table, np.inf)
    ahead, behind = [slice(None)] * table.ndim, [slice(None)] * table.ndim
    ahead[axis], behind[axis] = slice(1, None), slice(0, -1)
    moved[tuple(ahead)] = table[tuple(behind)]
    last = [slice(None)] * table.ndim
    last[axis] = slice(-1, None)
    moved[tuple(last)] = np.minimum(moved[tuple(last)], table[tuple(last)])
    return moved


def _trace(
    tables: list[Array], cost_EJ: Array, steps: Sequence[int], top: int, least: Sequence[int], exact: bool
) -> list[int]:
    """Walk back from the cheapest end; of equal ways the narrower width."""
    _, followed = _states(least)
    met = tuple(least[index] for index in followed)
    used = top if exact else int(np.argmin(tables[-1][met]))
    if not np.isfinite(tables[-1][(*met, used)]):
        raise PlanError(
            f"no assignment of {len(cost_EJ)} experts uses the budget with at least {list(least)} at the widths"
        )
    found = []
    for expert in range(len(cost_EJ) - 1, -1, -1):
        options = []
        for width, step in enumerate(steps):
            for earlier in _earlier(met, followed, width, least):
                if step <= used:
                    value = tables[expert][(*earlier, used - step)] + cost_EJ[expert, width]
                    options.append((value, width, earlier))
        value, width, met = min(options)
        used -= steps[width]
        found.append(width)
    return found[::-1]


def _earlier(met: tuple[int, ...], followed: Sequence[int], width: int, least: Sequence[int]) -> list[tuple[int, ...]]:
    """The counts before an expert of this width was added."""
    if width not in followed:
        return [met]
    axis = followed.index(width)
    fewer = (*met[:axis], met[axis] - 1, *met[axis + 1 :])
    enough = [met] if met[axis] == least[width] else []
    return ([fewer] if met[axis] else []) + enough
