"""Places of an expert: how many it has, and which of the tokens that asked for it are served."""

import math
from fractions import Fraction

import torch
from torch import Tensor


def fair_share(num_tokens: int, num_experts: int, factor: float) -> int:
    """``factor`` times an expert's fair share of the tokens, rounded up.

    Of the factor as it is written: 1.1 * 100 tokens over 10 experts are 11 places, though 1.1 * 100 is above 110 in
    floating point.
    """
    return math.ceil(Fraction(str(factor)) * num_tokens / num_experts)


def within_capacity(
    expert_T: Tensor, row_T: Tensor, num_rows: int, num_experts: int, capacity: int, priority_T: Tensor | None = None
) -> Tensor:
    """Which tokens find a place, bool [T]: the first ``capacity`` of each (row, expert).

    Args:
        expert_T, row_T: int64 [T]; experts count their places anew in every row.
        priority_T: any float [T]: the highest comes first, equal ones in the order of tokens. None: order of tokens.
    """
    key_T = row_T * num_experts + expert_T
    if priority_T is None:
        order_T = torch.sort(key_T, stable=True).indices
    else:
        first_T = torch.sort(priority_T, descending=True, stable=True).indices
        order_T = first_T[torch.sort(key_T[first_T], stable=True).indices]
    count_X = torch.bincount(key_T, minlength=num_rows * num_experts)
    start_X = count_X.cumsum(0) - count_X
    place_T = torch.empty_like(key_T)
    place_T[order_T] = torch.arange(len(key_T), device=key_T.device) - start_X[key_T[order_T]]
    return place_T < capacity
