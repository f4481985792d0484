"""Noisy top-k gating: trained noise on the logits spreads the load.

    h = x W^T + n * softplus(x W_noise^T),  n ~ N(0, 1) while training, 0 otherwise
    chosen: the k largest h;  weight = softmax of h over the chosen.

``logits_TC`` stay the clean x W^T; losses read those. Source: Shazeer et al. 2017 (1701.06538, eq. 3 to 5).
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.cost import Work
from moestro.core.errors import ConfigError
from moestro.core.router import LinearRouter, choose_topk, exact_linear
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.selection import warn_if_dead


class Config(BaseConfig):
    """Settings."""

    num_experts: int = Field(default=8, ge=1)
    top_k: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} but num_experts={self.num_experts}")
        return self


class NoisyTopK(LinearRouter):
    """The router. ``noise_weight`` [E, D] starts at 0, so the noise starts with scale softplus(0) = ln 2."""

    choice_rows = (*LinearRouter.choice_rows, "noise_weight")

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config.num_experts, top_k=config.top_k)
        self.config = config
        self.noise_weight = nn.Parameter(torch.zeros(config.num_experts, dim))

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router."""
        logits_TC = self.logits(x_TD)
        noisy_TC = logits_TC
        if self.training:
            scale_TC = nn.functional.softplus(exact_linear(x_TD, self.noise_weight))
            noisy_TC = logits_TC + torch.randn_like(logits_TC) * scale_TC
        return Scores(logits_TC, noisy_TC.detach(), noisy_TC)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        expert_TK = choose_topk(scores.select_TC, self.config.top_k)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        return Routing.from_topk(expert_TK, weight_TK, num_experts=self.num_experts, scores=scores)

    def flops_per_token(self, work: Work) -> float:
        """Operations for one token: the noise has a matrix of its own, which only training uses."""
        return 2.0 * self.weight.numel() * (2 if work.training else 1)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """See Router."""
        return gate_TK.softmax(-1)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a mixture whose input is as wide as the site's."""
    warn_if_dead(config.top_k, True, "train.noisy_topk")
    return NoisyTopK(site.dim, config)


CARD = MethodCard(
    title="Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    year=2017,
    arxiv="1701.06538",
    summary="Top-k of logits with trained Gaussian noise, weights by softmax over the chosen.",
    taxonomy="gating/sparse/token-choice/noisy-top-k",
)
