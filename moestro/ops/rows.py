"""Assignments sorted by expert, and the two halves odd banks are written from:

a linear layer per expert, and the way back to tokens.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """N' assignments sorted by expert, stably, so that within an expert they keep their order.

    order_N: int64, position of each sorted row in the flat assignments. Ids >= num_experts (nulls, padding)
    are left out. expert_offsets_E1: int64; the rows of expert e are expert_offsets_E1[e] :
    expert_offsets_E1[e + 1]. expert_offsets: the same on the host.
    """

    order_N: Tensor
    expert_offsets_E1: Tensor
    expert_offsets: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.expert_offsets) - 1

    @property
    def num_rows(self) -> int:
        """N', assignments to real experts."""
        return self.expert_offsets[-1]

    @cached_property
    def hit(self) -> list[int]:
        """Experts with at least one row, ascending."""
        return [expert for expert, (start, end) in enumerate(pairwise(self.expert_offsets)) if end > start]

    @cached_property
    def largest(self) -> int:
        """Rows of the busiest expert."""
        return max((self.count(expert) for expert in self.hit), default=0)

    def count(self, expert: int) -> int:
        """Rows of one expert."""
        return self.expert_offsets[expert + 1] - self.expert_offsets[expert]

    def slice(self, expert: int) -> slice:
        """Where the rows of one expert stand."""
        return slice(self.expert_offsets[expert], self.expert_offsets[expert + 1])


def sort_rows(expert_N: Tensor, num_experts: int) -> Segments:
    """Sort flat assignments by expert, stably.

    expert_N: integer [N], any N >= 0. Ids >= num_experts stand for no expert and are dropped. Raises
    ValueError for a negative id.
    """
    order_N = torch.argsort(expert_N, stable=True)
    if len(order_N) and int(expert_N[order_N[0]]) < 0:
        raise ValueError(f"expert ids must be >= 0; got {int(expert_N[order_N[0]])}")
    counts_E = torch.bincount(expert_N.clamp(max=num_experts), minlength=num_experts + 1)[:num_experts]
    offsets_E1 = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_N.device)
    torch.cumsum(counts_E, 0, out=offsets_E1[1:])
    offsets = tuple(offsets_E1.tolist())
    return Segments(order_N[: offsets[-1]], offsets_E1, offsets)


def scatter_rows(rows_ND: Tensor, token_N: Tensor, weight_N: Tensor | None, num_tokens: int) -> Tensor:
    """y[t] = sum over the rows n of token t of weight_n * rows_n, [num_tokens, D]; tokens without rows get
    exact zeros.

    Rows are added in the order they stand, one after another: with rows sorted by expert a token's sum runs
    over ascending experts, then slots, and its bits do not depend on the other tokens. Half precisions are
    summed in float32. Plain autograd.
    """
    if weight_N is not None:
        rows_ND = rows_ND * weight_N.to(rows_ND.dtype).unsqueeze(-1)
    total = torch.float32 if rows_ND.dtype.itemsize < 4 else rows_ND.dtype
    y_TD = torch.zeros(num_tokens, rows_ND.shape[1], dtype=total, device=rows_ND.device)
    return y_TD.index_add(0, token_N, rows_ND.to(total)).to(rows_ND.dtype)
