"""The router z-loss: keeps logits small, so that the softmax stays accurate.

    loss = mean over valid tokens of (log sum_i exp z_i)^2, from the raw logits before any noise.

E equal logits of 0 give (ln E)^2. Source: ST-MoE (2202.08906, eq. 5).
"""

from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ContextError
from moestro.core.losses import RoutingLoss, z_total
from moestro.core.routing import Routing
from moestro.core.site import Shared, Site


class Config(BaseConfig):
    """No settings; the recipe gives the weight (ST-MoE: 1e-3)."""


class ZLoss(RoutingLoss):
    """The loss."""

    unit = "token"

    def forward(self, site: str, routing: Routing, ctx: RoutingContext) -> Tensor:
        """See RoutingLoss.

        Raises:
            ContextError: the routing carries no scores.
        """
        if routing.scores is None or ctx.tokens is None:
            raise ContextError(f"{site}: the z-loss needs scores, this router gave none; take the loss out")
        return z_total(routing.scores.logits_TC, ctx.tokens.valid_T)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The loss, for a mixture's ``losses``."""
    return ZLoss()


CARD = MethodCard(
    title="ST-MoE: Designing Stable and Transferable Sparse Expert Models",
    year=2022,
    arxiv="2202.08906",
    summary="Squared log-partition of the router's logits, mean over tokens.",
    taxonomy="losses/z",
)
