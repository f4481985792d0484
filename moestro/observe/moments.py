"""Streaming moments: exact in one pass, mergeable across batches and ranks.

Mean and sum of squared deviations of a batch are computed in two passes over the batch and joined to what came before
by the parallel rule of Chan, Golub and LeVeque (1979), Welford's update for batches:

    n = a + b,  d = mean_b - mean_a,  mean = mean_a + d b / n,  M2 = M2_a + M2_b + d^2 a b / n

Everything is kept in float64.
"""

from collections.abc import Sequence
from typing import Final

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


class JointMoments:
    """Mean and centred second moments of rows [N, D], in float64: what covariances and correlations are made of.

    Batches are joined by the rule at the top of the file with d d^T in the place of d^2, so a large common offset of
    the rows costs no digits.

    Attributes:
        count: rows seen. mean_D: their mean. comoment_DD: sum of (x - mean)(x - mean)^T.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean_D = torch.zeros(dim, dtype=torch.float64)
        self.comoment_DD = torch.zeros(dim, dim, dtype=torch.float64)

    @torch.no_grad()
    def add(self, rows_ND: Tensor) -> None:
        """Take rows [N, D]."""
        if not len(rows_ND):
            return
        rows_ND = rows_ND.detach().to(torch.float64).cpu()
        other = JointMoments(len(self.mean_D))
        other.count, other.mean_D = len(rows_ND), rows_ND.mean(0)
        away_ND = rows_ND - other.mean_D
        other.comoment_DD = away_ND.T @ away_ND
        self.merge(other)

    def merge(self, other: "JointMoments") -> None:
        """Join what another one of the same width has seen."""
        if other.mean_D.shape != self.mean_D.shape:
            raise ConfigError(f"joint moments of width {len(other.mean_D)} do not join those of {len(self.mean_D)}")
        total = self.count + other.count
        if not total:
            return
        delta_D = other.mean_D - self.mean_D
        share = self.count * other.count / total
        self.comoment_DD = self.comoment_DD + other.comoment_DD + share * torch.outer(delta_D, delta_D)
        self.mean_D = self.mean_D + delta_D * (other.count / total)
        self.count = total

    @property
    def gram_DD(self) -> Tensor:
        """X^T X, not centred, float64 [D, D]."""
        return self.comoment_DD + self.count * torch.outer(self.mean_D, self.mean_D)

    @property
    def varies_D(self) -> Tensor:
        """Which columns vary, bool [D]. The rounding of a mean of equal numbers is no variation."""
        floor_D = max(self.count, 1) * (1e-12 * self.mean_D.abs()).square()
        return self.comoment_DD.diagonal() > floor_D

    @property
    def correlation_DD(self) -> Tensor:
        """Pearson's correlations, float64 [D, D], diagonal 1. A column that never varies correlates 0 with others."""
        variance_D = self.comoment_DD.diagonal()
        scale_D = torch.where(self.varies_D, variance_D.clamp(min=1e-300).rsqrt(), 0.0)
        found_DD = (self.comoment_DD * scale_D[:, None] * scale_D).clamp(-1.0, 1.0)
        found_DD.fill_diagonal_(1.0)
        return found_DD


class RankRatios:
    """How a token's lesser weights compare with its largest: w_r / w_0 for each rank r >= 1, as histograms over [0, 1].

    A histogram joins over batches and ranks; its median is exact to half a bin.

    Attributes:
        bins: of [0, 1]. histogram_RB: int64 [ranks, bins]; as many ranks as were seen.
    """

    bins: Final = 4096

    def __init__(self) -> None:
        self.histogram_RB = torch.zeros(0, self.bins, dtype=torch.int64)

    def add(self, rank_N: Tensor, ratio_N: Tensor) -> None:
        """Take ratios in [0, 1] of ranks from 1 on, both [N]."""
        if not rank_N.numel():
            return
        bin_N = (ratio_N.double() * self.bins).long().clamp(0, self.bins - 1)
        ranks = int(rank_N.max())
        flat = torch.bincount((rank_N - 1) * self.bins + bin_N, minlength=ranks * self.bins)
        self._join(flat.view(ranks, self.bins).cpu())

    def merge(self, other: "RankRatios") -> None:
        """Join what another one has seen."""
        self._join(other.histogram_RB)

    def _join(self, other_RB: Tensor) -> None:
        total = torch.zeros(max(len(self.histogram_RB), len(other_RB)), self.bins, dtype=torch.int64)
        for part in (self.histogram_RB, other_RB):
            total[: len(part)] += part
        self.histogram_RB = total

    @property
    def median_R(self) -> Tensor:
        """The (lower) median ratio of each rank from 1 on, float64 [ranks], to half a bin; 0 for a rank without any."""
        seen_RB = self.histogram_RB.cumsum(1)
        half_R = (seen_RB[:, -1:] + 1) // 2
        place_R = (seen_RB < half_R).sum(1)
        return torch.where(seen_RB[:, -1] > 0, (place_R.double() + 0.5) / self.bins, 0.0)


def _spread(value_G: Tensor, like: Tensor) -> Tensor:
    """[G] as [G, 1, ...] against ``like`` [G, *shape]."""
    return value_G.view(-1, *([1] * (like.ndim - 1)))
