"""The ambiguity loss: a router should be sure, so that an expert means one thing.

For the weights g_t [n] that a routing head gives the choices of token t, over T valid tokens and H heads,

    loss = scale * mean over t and h of (1 - max_i g_thi)        0 when one choice has it all, 1 - 1/n when all tie

The choices of a routing are H equal runs, one for each head; an ordinary router has one. Weights are taken as they are:
for a router whose weights do not sum to 1 the floor is not 0.

Source: Monet (2412.04139, section 3.3).
"""

from pydantic import Field
from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ContextError
from moestro.core.losses import RoutingLoss
from moestro.core.routing import Routing
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.assignments import headed_weights


class Config(BaseConfig):
    """Settings. heads: H. scale: 1/2 where each of two axes has a loss of its own and their mean is meant."""

    heads: int = Field(default=1, ge=1)
    scale: float = Field(default=1.0, gt=0)


def ambiguity(weight_THC: Tensor) -> Tensor:
    """1 - max_i g, mean over heads, [T]."""
    return (1.0 - weight_THC.amax(-1)).mean(-1)


class AmbiguityLoss(RoutingLoss):
    """The loss, summed over valid tokens."""

    unit = "token"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, site: str, routing: Routing, ctx: RoutingContext) -> Tensor:
        """See RoutingLoss.

        Raises:
            ContextError: the heads do not divide the choices, or the forward has no tokens.
        """
        if ctx.tokens is None:
            raise ContextError(f"{site}: the ambiguity loss leaves padding out and needs the tokens of the forward")
        ambiguity_T = ambiguity(headed_weights(routing, self.config.heads).float())
        return self.config.scale * ambiguity_T.masked_fill(~ctx.tokens.valid_T, 0.0).sum()


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The loss, for a mixture's ``losses``."""
    return AmbiguityLoss(config)


CARD = MethodCard(
    title="Monet: Mixture of Monosemantic Experts for Transformers",
    year=2024,
    arxiv="2412.04139",
    paper="monet",
    summary="One minus the largest weight of each routing head, mean over tokens: sure routers.",
    taxonomy="losses",
)
