"""What a routing loss is, and the closed forms the loss methods are built from.

All of them read raw logits and the validity mask, and return sums over their unit (tokens or sequences), so that the
training loop can divide by the units of a whole optimiser step: one batch of eight rows and eight of one row give the
same gradient.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moestro.core.context import Unit
from moestro.core.routing import Routing


if TYPE_CHECKING:
    from moestro.core.context import RoutingContext


class RoutingLoss(nn.Module, ABC):
    """A loss on one layer's routing.

    Attributes:
        unit: what ``forward`` sums over. causal: whether the loss can be used with causal models without leaking later
            tokens into a decision (a loss only shapes training, so True unless it changes the forward).
    """

    unit: Unit = "token"
    causal: bool = True

    @abstractmethod
    def forward(self, site: str, routing: Routing, ctx: "RoutingContext") -> Tensor:
        """The loss of ``site`` summed over its units, a scalar with gradient."""


def load_per_row(routing: Routing, valid_T: Tensor, row_T: Tensor, num_rows: int) -> Tensor:
    """Assignments of each row's valid tokens to each choice, int64 [B, C]; dropped ones count as demand."""
    live_N = valid_T[routing.token_N]
    place_N = row_T[routing.token_N[live_N]] * routing.num_choices + routing.expert_N[live_N]
    return torch.bincount(place_N, minlength=num_rows * routing.num_choices).view(num_rows, -1)


def balance(fraction_C: Tensor, probability_C: Tensor) -> Tensor:
    """E * sum_i f_i P_i over the last axis: 1 when either is uniform, E when both stand on one choice.

    Args:
        fraction_C: f, shares of the assignments, summing to 1. probability_C: P, mean router probability, summing to 1.

    Source: GShard (2006.16668, section 2.2) and Switch Transformers (2101.03961, eq. 4), with f over the k * T slots.
    """
    return fraction_C.shape[-1] * (fraction_C * probability_C).sum(-1)


def z_total(logits_TC: Tensor, valid_T: Tensor) -> Tensor:
    """Sum over valid tokens of (log sum_i exp z_i)^2. Source: ST-MoE (2202.08906, eq. 5)."""
    return torch.logsumexp(logits_TC, -1).square().masked_fill(~valid_T, 0.0).sum()
