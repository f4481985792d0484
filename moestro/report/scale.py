"""One colour scale for the whole page: how a count compares with what an even or independent choice would give.

Ratios fall into seven steps around 1, plus one for "nothing at all"; the page's script holds the same edges.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray


EDGES: Final = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
LABELS: Final = ("under ¼×", "¼ to ½×", "½ to 0.8×", "0.8 to 1.25×", "1.25 to 2×", "2 to 4×", "over 4×")
NOTHING: Final = len(LABELS)  # the step of a count of 0 where something was expected
BLANK: Final = -1  # no expectation, or not applicable: nothing is drawn

_ROUNDS: Final = 300

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def row_ratio(count_RC: Ints) -> Floats:
    """Each count over the mean of its row; NaN in rows without counts."""
    mean_R1 = count_RC.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(mean_R1 > 0, count_RC / mean_R1, np.nan)


def transition_ratio(count_RC: Ints) -> Floats:
    """Each count over what rows and columns chosen independently would give; NaN without expectation."""
    expected = count_RC.sum(1, keepdims=True) * count_RC.sum(0, keepdims=True) / max(int(count_RC.sum()), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, count_RC / expected, np.nan)


def share_ratio(count_RC: Ints, expected_RC: Ints) -> Floats:
    """A part's counts over its share of the whole's, row by row; NaN where the whole has none."""
    part_R1, whole_R1 = count_RC.sum(1, keepdims=True), expected_RC.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        due = expected_RC * (part_R1 / whole_R1)
        return np.where(due > 0, count_RC / due, np.nan)


def pair_factors(count_EE: Ints) -> Floats:
    """Factors a [E] such that a_i a_j, i != j, is expected of partners drawn by load: every expert's pairs add up.

    A token does not use an expert twice, so plain independence would expect too much of busy experts.
    Quasi-independence leaves the diagonal out: sum over j != i of a_i a_j equals expert i's pairs, found by iteration.
    """
    pairs_E = (count_EE.sum(1) - np.diag(count_EE)).astype(np.float64)
    factor_E = pairs_E / np.sqrt(max(pairs_E.sum(), 1.0))
    for _ in range(_ROUNDS):
        rest_E = factor_E.sum() - factor_E
        with np.errstate(invalid="ignore", divide="ignore"):
            factor_E = np.where(pairs_E > 0, np.sqrt(factor_E * pairs_E / rest_E), 0.0)
    return factor_E


def pair_ratio(count_EE: Ints) -> Floats:
    """Co-activation over ``pair_factors``; NaN on the diagonal and without expectation."""
    factor_E = pair_factors(count_EE)
    due = np.outer(factor_E, factor_E)
    np.fill_diagonal(due, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(due > 0, count_EE / due, np.nan)


def ratio(rule: str, count_RC: Ints, expected_RC: Ints | None = None) -> Floats:
    """The ratios of a rule: ``row``, ``transition``, ``pair``, or ``share`` with ``expected_RC``."""
    if rule == "share":
        assert expected_RC is not None
        return share_ratio(count_RC, expected_RC)
    return {"row": row_ratio, "transition": transition_ratio, "pair": pair_ratio}[rule](count_RC)


def steps(ratio: Floats) -> NDArray[Any]:
    """The step of each ratio: 0 .. 6, ``NOTHING`` for 0, ``BLANK`` for NaN."""
    step = np.searchsorted(EDGES, np.nan_to_num(ratio, nan=1.0), side="right")
    step[ratio == 0] = NOTHING
    step[np.isnan(ratio)] = BLANK
    return step


def information(count_RC: Ints) -> float:
    """Mutual information of rows and columns in bits, less the Miller-Madow bias, never below 0.

    The bias of a plug-in estimate from n counts is about (rows - 1)(columns - 1) / (2 n ln 2), with the rows and
    columns that occur.
    """
    total = int(count_RC.sum())
    if not total:
        return 0.0
    seen = count_RC[count_RC.sum(1) > 0][:, count_RC.sum(0) > 0]
    joint = seen / total
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    found = joint > 0
    bits = float((joint[found] * np.log2(joint[found] / apart[found])).sum())
    bias = (seen.shape[0] - 1) * (seen.shape[1] - 1) / (2 * total * np.log(2))
    return max(0.0, bits - bias)
