"""Random and forced routing: the controls every learned router is measured against.

``random``: k different experts drawn uniformly for each token and forward, weights 1 / k (THOR trains so).
``forced``: a tag of the session names the expert of each token; weight 1.

Source: Zuo et al. 2021 (2110.04260) for random routing; forced routing is how domain experts (DEMix, 2108.05036) route.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.router import Router, choose_topk
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site


class Config(BaseConfig):
    """Settings. mode: how experts are found. tag: the session's tag that forced mode reads."""

    num_experts: int = Field(default=8, ge=1)
    top_k: int = Field(default=2, ge=1)
    mode: Literal["random", "forced"] = "random"
    tag: str = "expert"

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} but num_experts={self.num_experts}")
        if self.mode == "forced" and self.top_k != 1:
            raise ConfigError(f"top_k={self.top_k}; forced routing names one expert a token, so top_k must be 1")
        return self


class RandomRouter(Router):
    """The router. Random draws come from PyTorch's global generator, so a seed fixes them and replays repeat them."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.num_experts, top_k=config.top_k)
        self.config = config

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """Uniform noise, or one at the tag's expert."""
        shape = (x_TD.shape[0], self.num_experts)
        flat_TC = torch.zeros(shape, device=x_TD.device)
        if self.config.mode == "random":
            return Scores(flat_TC, torch.rand(shape, device=x_TD.device), flat_TC)
        expert_T = ctx.tag_T(self.config.tag)
        if expert_T.numel() and not 0 <= int(expert_T.min()) <= int(expert_T.max()) < self.num_experts:
            raise ContextError(
                f"tag {self.config.tag!r} names experts {int(expert_T.min())} to {int(expert_T.max())}; "
                f"this layer has 0 to {self.num_experts - 1}"
            )
        return Scores(flat_TC, flat_TC.scatter(1, expert_T[:, None], 1.0), flat_TC)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        expert_TK = choose_topk(scores.select_TC, self.config.top_k)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        return Routing.from_topk(expert_TK, weight_TK, num_experts=self.num_experts, scores=scores)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """Equal weights."""
        return torch.full_like(gate_TK, 1.0 / gate_TK.shape[-1])


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router."""
    return RandomRouter(config)


CARD = MethodCard(
    title="Taming Sparsely Activated Transformer with Stochastic Experts",
    year=2021,
    arxiv="2110.04260",
    summary="Uniformly random experts, or the expert a tag names: controls for learned routing.",
    taxonomy="gating/sparse/non-trainable/random",
    stochastic=True,
)
