"""The way from tokens to sorted rows and back, and the dtype rows are computed in."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.ops.rows import Segments


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products run in: float32 for half precisions, whose products crawl on CPUs without units for them."""
    return torch.float32 if dtype.itemsize < 4 else dtype


@dataclass(frozen=True)
class Route:
    """Where sorted rows come from and go to.

    bag_N: sorted rows by token, ascending within a token; bag_offsets_T: their starts.
    """

    segments: Segments
    token_N: Tensor
    bag_N: Tensor
    bag_offsets_T: Tensor

    @classmethod
    def of(cls, segments: Segments, token_N: Tensor, num_tokens: int) -> "Route":
        """token_N: tokens of the unsorted assignments."""
        token_sorted = token_N[segments.order_N]
        counts_T = torch.bincount(token_sorted, minlength=num_tokens)
        return cls(segments, token_sorted, torch.argsort(token_sorted, stable=True), counts_T.cumsum(0) - counts_T)

    def combine(self, rows_NO: Tensor, weight_N: Tensor | None) -> Tensor:
        """Sums of the rows of each token (times weights) in ascending order; exact zeros without rows."""
        if not len(rows_NO) or not len(self.bag_offsets_T):
            return rows_NO.new_zeros(len(self.bag_offsets_T), rows_NO.shape[1])
        per_sample = None if weight_N is None else weight_N[self.bag_N]
        return F.embedding_bag(self.bag_N, rows_NO, self.bag_offsets_T, mode="sum", per_sample_weights=per_sample)
