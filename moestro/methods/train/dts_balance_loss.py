"""The balance loss of the dense-to-sparse gate: it sees only the experts that are active.

With m_ti = 1 where expert i is active for token t, and w_ti its weight there (0 elsewhere), means over tokens

    me_i = mean_t m_ti w_ti,   ce_i = mean_t m_ti,   loss = E * sum_i me_i ce_i.

Unlike the loss of GShard, neither factor has to sum to 1: ce sums to the mean number of active experts, me to the mean
weight that survives the threshold. Under a hard gate it is GShard's with P taken over the chosen entries alone. While
every expert is active it is the constant E (the weights sum to 1) and pulls on nothing.

``scope`` says what the means are over: all tokens of one forward, as in the released code, or each sequence.

Source: EvoMoE (2112.14397), the gate of the code released with it.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ContextError
from moestro.core.losses import RoutingLoss, balance, load_per_row
from moestro.core.routing import Routing
from moestro.core.site import Shared, Site


class Config(BaseConfig):
    """Settings; see the top of the file."""

    scope: Literal["batch", "sequence"] = "batch"


class ActiveBalanceLoss(RoutingLoss):
    """The loss; works on any routing, with or without scores."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.unit = config.scope

    def forward(self, site: str, routing: Routing, ctx: RoutingContext) -> Tensor:
        """See RoutingLoss.

        Raises:
            ContextError: the context does not know its tokens.
        """
        tokens = ctx.tokens
        if tokens is None:
            raise ContextError(f"{site}: a balance loss needs to know the tokens of the forward")
        row_T, rows = tokens.row_T, tokens.num_rows
        if self.config.scope == "batch":
            row_T, rows = torch.zeros_like(row_T), 1
        valid_T = tokens.valid_T
        active_BC = load_per_row(routing, valid_T, row_T, rows)
        weight_N = routing.weight_N.masked_fill(~valid_T[routing.token_N], 0.0)
        place_N = row_T[routing.token_N] * routing.num_choices + routing.expert_N
        mass_BC = weight_N.new_zeros(active_BC.numel()).index_add(0, place_N, weight_N).view_as(active_BC)
        count_B = torch.bincount(row_T[valid_T], minlength=rows).clamp(min=1).unsqueeze(1)
        return balance(active_BC / count_B, mass_BC / count_B).sum()


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The loss, for a mixture's ``losses``."""
    return ActiveBalanceLoss(config)


CARD = MethodCard(
    title="EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate",
    year=2021,
    arxiv="2112.14397",
    paper="evomoe",
    summary="E * sum of mean active weight times mean activity, for gates whose number of experts varies.",
    taxonomy="losses/balance",
    deviations=("means leave padding out", "can be taken over each sequence instead of the whole forward"),
)
