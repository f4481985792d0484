"""The uniformity loss: every choice should be somebody's, so that few of many small experts die.

For the weights g [T, H, n] that routing heads give to choices, and p_hi = mean over valid tokens of g_thi,

    loss = - scale * mean over h and i of log max(p_hi, 1e-12)        ln n when the mean is uniform and sums to 1

p is a mean over the tokens of one forward: a choice that one token leaves out is no loss if others take it. The value
depends on how a step is cut into forwards. A choice that all tokens leave out costs the floor, 27.6 / n a head, but has
no gradient (a router's weights of exactly 0 have none): the loss keeps rare choices in use and cannot bring back one
that nobody keeps. The choices of a routing are H equal runs, one for each head; an ordinary router has one.

Source: Monet (2412.04139, section 3.3), where the logarithm is printed token by token. Choices that a token leaves out
weigh 0 there, and only the mean over the batch gives the values the paper reports, just above ln n.
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


FLOOR = 1e-12


class Config(BaseConfig):
    """Settings. heads: H. scale: 1/2 where each of two axes has a loss of its own and their mean is meant."""

    heads: int = Field(default=1, ge=1)
    scale: float = Field(default=1.0, gt=0)


def uniformity(weight_THC: Tensor) -> Tensor:
    """- mean over h and i of the logarithm of the mean over tokens, a scalar."""
    return -weight_THC.mean(0).clamp(min=FLOOR).log().mean()


class UniformityLoss(RoutingLoss):
    """The loss of one forward."""

    unit = "batch"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, site: str, routing: Routing, ctx: RoutingContext) -> Tensor:
        """See RoutingLoss. 0 for a forward without a valid token.

        Raises:
            ContextError: the heads do not divide the choices, or the forward has no tokens.
        """
        if ctx.tokens is None:
            raise ContextError(f"{site}: the uniformity loss leaves padding out and needs the tokens of the forward")
        weight_THC = headed_weights(routing, self.config.heads).float()[ctx.tokens.valid_T]
        return self.config.scale * uniformity(weight_THC) if len(weight_THC) else weight_THC.sum()


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The loss, for a mixture's ``losses``."""
    return UniformityLoss(config)


CARD = MethodCard(
    title="Monet: Mixture of Monosemantic Experts for Transformers",
    year=2024,
    arxiv="2412.04139",
    paper="monet",
    summary="Minus the mean log of the batch's mean weights: no choice is left without tokens.",
    taxonomy="losses",
    deviations=("the mean over the batch stands inside the logarithm, as the reported values need",),
)
