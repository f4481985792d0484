"""Streaming moments: exact in one pass, mergeable across batches and ranks.

Mean and sum of squared deviations of a batch are computed in two passes over the batch and joined to what came before
by the parallel rule of Chan, Golub and LeVeque (1979), Welford's update for batches:

    n = a + b,  d = mean_b - mean_a,  mean = mean_a + d b / n,  M2 = M2_a + M2_b + d^2 a b / n

Everything is kept in float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moestro.core.errors import ConfigError


class GroupMoments:
    """Count, mean, variance, minimum and maximum for each of G groups of a quantity of some shape.

    Attributes:
        count_G: int64. mean, m2, low, high: float64 [G, *shape]; low is +inf and high -inf for a group without rows.
    """

    def __init__(self, num_groups: int, shape: Sequence[int] = ()) -> None:
        size = (num_groups, *shape)
        self.count_G = torch.zeros(num_groups, dtype=torch.int64)
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.m2 = torch.zeros(size, dtype=torch.float64)
        self.low = torch.full(size, torch.inf, dtype=torch.float64)
        self.high = torch.full(size, -torch.inf, dtype=torch.float64)

    @torch.no_grad()
    def add(self, group_N: Tensor, value: Tensor) -> None:
        """Take rows.

        Args:
            group_N: int64, the group of each row. value: [N, *shape].
        """
        value = value.detach().to(torch.float64).cpu()
        group_N = group_N.detach().cpu()
        other = GroupMoments(len(self.count_G), self.mean.shape[1:])
        other.count_G = torch.bincount(group_N, minlength=len(self.count_G))
        count = _spread(other.count_G, self.mean)
        other.mean.index_add_(0, group_N, value).div_(count.clamp(min=1))
        other.m2.index_add_(0, group_N, (value - other.mean[group_N]).square())
        index = _spread(group_N, value).expand_as(value)
        other.low.scatter_reduce_(0, index, value, "amin")
        other.high.scatter_reduce_(0, index, value, "amax")
        self.merge(other)

    def merge(self, other: "GroupMoments") -> None:
        """Join what another one of the same shape has seen."""
        if other.mean.shape != self.mean.shape:
            raise ConfigError(f"moments of {tuple(other.mean.shape)} do not join {tuple(self.mean.shape)}")
        a, b = _spread(self.count_G, self.mean), _spread(other.count_G, self.mean)
        total = (a + b).clamp(min=1)
        delta = other.mean - self.mean
        self.m2 += other.m2 + delta.square() * a * b / total
        self.mean += delta * b / total
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)
        self.count_G = self.count_G + other.count_G

    @property
    def total(self) -> Tensor:
        """Sums of the rows, float64 [G, *shape]."""
        return self.mean * _spread(self.count_G, self.mean)

    @property
    def variance(self) -> Tensor:
        """Population variances, float64 [G, *shape]; 0 for a group without rows."""
        return self.m2 / _spread(self.count_G, self.m2).clamp(min=1)


class Moments(GroupMoments):
    """Moments of rows without groups: ``count``, ``mean``, ``variance`` of ``shape``."""

    def __init__(self, shape: Sequence[int] = ()) -> None:
        super().__init__(1, shape)

    def update(self, value: Tensor) -> None:
        """Take rows [N, *shape]."""
        self.add(torch.zeros(len(value), dtype=torch.int64), value)

    @property
    def count(self) -> int:
        """Rows seen."""
        return int(self.count_G[0])


class SecondMoments:
    """X^T X of the rows of each group: what GPTQ and low-rank methods calibrate on.

    A group's matrix is made at its first row, so groups that never get rows cost nothing.

    Attributes:
        count_G: int64 rows of each group. gram: group -> float32 or float64 [D, D], not divided by the count.
    """

    def __init__(self, num_groups: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        self.count_G = torch.zeros(num_groups, dtype=torch.int64)
        self.dim = dim
        self.dtype = dtype
        self.gram: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, group: int, rows_ND: Tensor) -> None:
        """Take rows [N, D] of one group."""
        if not len(rows_ND):
            return
        rows_ND = rows_ND.detach().to(self.dtype)
        self.count_G[group] += len(rows_ND)
        known = self.gram.get(group)
        if known is None:
            self.gram[group] = rows_ND.T @ rows_ND
        else:
            known.addmm_(rows_ND.T, rows_ND)

    def merge(self, other: "SecondMoments") -> None:
        """Join what another one has seen."""
        if (other.dim, len(other.count_G)) != (self.dim, len(self.count_G)):
            raise ConfigError(f"second moments of width {other.dim} do not join those of width {self.dim}")
        self.count_G = self.count_G + other.count_G
        for group, gram in other.gram.items():
            self.gram[group] = gram.clone() if group not in self.gram else self.gram[group] + gram

    def of(self, group: int) -> Tensor:
        """X^T X [D, D] of a group; zeros for one without rows."""
        return self.gram.get(group, torch.zeros(self.dim, self.dim, dtype=self.dtype))


def _spread(value_G: Tensor, like: Tensor) -> Tensor:
    """[G] as [G, 1, ...] against ``like`` [G, *shape]."""
    return value_G.view(-1, *([1] * (like.ndim - 1)))
