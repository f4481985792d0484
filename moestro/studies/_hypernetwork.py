"""A rival of mixed copies: a hypernetwork that writes a correction of low rank onto one copy for each architecture.

For an architecture a, a matrix E [O, I] of a feed-forward, and a code c(a) = ReLU(L enc(a)) [R] of the whole layer:

    W_a = E[:o, :i] + U(a)[:o] V(a)[:, :i]        U(a) [O, r], V(a) [r, I]: linear in c(a)

U starts at zero, so that it starts as the plain supernet, V as small as E, so that a step moves W_a about as far as it
moves E. The rank is chosen so that the weights behind U and V are as many as those of one more copy.
"""

from typing import Any

import torch
from torch import Tensor, nn


def rank_of(out: int, inner: int, code: int) -> int:
    """The rank for which factors [out, r] and [r, inner], linear in a code, take about out x inner weights."""
    return max(1, round(out * inner / ((code + 1) * (out + inner))))


class Code(nn.Module):
    """Stands in a layer's place of a router: the code of an architecture, float32 [R], whatever the rows."""

    def __init__(self, features: int, code: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, code)

    def forward(self, encoding_F: Tensor, rows: int) -> Tensor:
        """c(a)."""
        return torch.relu(self.first(encoding_F))


class Corrected(nn.Module):
    """One copy of a matrix and its correction. Takes a code where a mixed layer takes shares.

    Args:
        base: the elastic layer that holds the copy, [1, O, I]. code: R.
    """

    def __init__(self, base: Any, code: int) -> None:
        super().__init__()
        self.base = base
        _, self.out, self.inner = base.weight.shape
        self.rank = rank_of(self.out, self.inner, code)
        self.left = nn.Linear(code, self.out * self.rank)
        self.right = nn.Linear(code, self.rank * self.inner)
        for part, size in ((self.left, 0.0), (self.right, float(base.weight.detach().std()))):
            nn.init.normal_(part.weight, std=size)
            nn.init.normal_(part.bias, std=size)

    def forward(self, code_R: Tensor, out: int, inner: int) -> tuple[Tensor, Tensor | None]:
        """W_a [out, inner]; the bias is the plain one."""
        weight_OI, bias_O = self.base(None, out, inner)
        left, right = self.left(code_R).view(self.out, self.rank), self.right(code_R).view(self.rank, self.inner)
        return weight_OI + left[:out] @ right[:, :inner], bias_O


def correct(ffn: Any, code: int) -> None:
    """Turn the elastic feed-forward of a plain supernet into one that a hypernetwork corrects, in place."""
    shared = Code(len(ffn.space.module.constants), code)
    ffn.routers.update({"inner": shared, "out": shared})
    for name, part in list(ffn.parts.items()):
        ffn.parts[name] = Corrected(part, code)
