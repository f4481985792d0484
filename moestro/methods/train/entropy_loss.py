"""The router entropy loss: makes a router decide, so that top-p routing needs fewer experts.

    loss = mean over valid tokens of -sum_i P_i log P_i, P the router's probabilities, in nats.

Equal logits give log E, a router that is certain 0, where the gradient vanishes too (0 log 0 = 0). It pulls against the
balance loss: that wants the mean of P over tokens flat, this wants each token's P sharp. Too large a weight sends all
tokens to one expert; watch ``token_entropy`` and ``load_entropy`` of the monitor together.

Source: Huang et al. 2024 (2403.07652, section 2.3).
"""

import torch
from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ContextError
from moestro.core.losses import RoutingLoss
from moestro.core.routing import Routing
from moestro.core.site import Shared, Site


class Config(BaseConfig):
    """No settings; the recipe gives the weight (paper: 1e-4 over the mean of the layers)."""


def entropy_total(probability_TC: Tensor, valid_T: Tensor) -> Tensor:
    """Sum over valid tokens of -sum_i P_i log P_i; float32 in, scalar out.

    The logarithm stops at the smallest normal number, so that P = 0 has a finite gradient, which softmax turns into 0.
    """
    log_TC = probability_TC.clamp(min=torch.finfo(probability_TC.dtype).tiny).log()
    return -(probability_TC * log_TC).sum(-1).masked_fill(~valid_T, 0.0).sum()


class EntropyLoss(RoutingLoss):
    """The loss."""

    unit = "token"

    def forward(self, site: str, routing: Routing, ctx: RoutingContext) -> Tensor:
        """See RoutingLoss.

        Raises:
            ContextError: the routing carries no scores.
        """
        if routing.scores is None or ctx.tokens is None:
            raise ContextError(f"{site}: the entropy loss needs scores, this router gave none; take the loss out")
        return entropy_total(routing.scores.probabilities(), ctx.tokens.valid_T)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The loss, for a mixture's ``losses``."""
    return EntropyLoss()


CARD = MethodCard(
    title="Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
    year=2024,
    arxiv="2403.07652",
    paper="dynamic-moe",
    summary="Entropy of each token's router probabilities, mean over tokens: few experts under top-p.",
    taxonomy="losses/entropy",
    deviations=("the loop adds the losses of layers up where the paper takes their mean",),
)
