"""Switch routing: one expert a token, weighted by its probability, with a capacity.

    p = softmax(x W^T (+ b)), e = argmax p, weight = p_e.

With a capacity c, the tokens of a batch row are counted in order; those that find their expert already asked c times in
this row are dropped: they pass by the mixture (its output is 0) and still count as demand in losses. The capacity is
given, or ceil(capacity_factor * S / E) for a row of S positions. Padding takes places, as in Transformers.

While training, ``jitter`` j multiplies the router's input by uniform noise in [1 - j, 1 + j].

Source: Switch Transformers (2101.03961, section 2.2 and eq. 3).
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError
from moestro.core.router import LinearRouter, choose_topk
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.capacity import fair_share, within_capacity


class Config(BaseConfig):
    """Settings.

    Attributes:
        capacity: tokens an expert takes of one row, or capacity_factor: as a multiple of the fair share; neither means
            that nothing is dropped. jitter: half width of the multiplicative noise on the router's input.
    """

    num_experts: int = Field(default=8, ge=1)
    capacity: int | None = Field(default=None, ge=1)
    capacity_factor: float | None = Field(default=None, gt=0)
    bias: bool = False
    jitter: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _one(self) -> "Config":
        if self.capacity is not None and self.capacity_factor is not None:
            raise ConfigError(f"capacity={self.capacity} and capacity_factor={self.capacity_factor}; give one of them")
        return self


class Switch(LinearRouter):
    """The router."""

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config.num_experts, top_k=1, bias=config.bias)
        self.config = config
        self.causal = config.capacity_factor is None  # a share of all positions: later tokens open places

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router."""
        jitter = self.config.jitter
        if self.training and jitter:
            x_TD = x_TD.float()  # a narrower type has few numbers around 1
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)
        logits_TC = self.logits(x_TD)
        probability_TC = logits_TC.softmax(-1)
        return Scores(logits_TC, probability_TC.detach(), probability_TC, probability_TC)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        expert_TK = choose_topk(scores.select_TC, 1)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        kept_TK = None
        capacity = self.capacity(ctx)
        if capacity is not None:
            tokens = ctx.tokens
            assert tokens is not None
            kept_TK = within_capacity(
                expert_TK[:, 0], tokens.row_T, tokens.num_rows, self.num_experts, capacity
            ).unsqueeze(1)
        return Routing.from_topk(
            expert_TK, weight_TK, num_experts=self.num_experts, scores=scores, causal=self.causal, kept_TK=kept_TK
        )

    def real_per_token(self, length: int) -> float | None:
        """See Router: 1 unless a capacity drops some."""
        return 1 if self.config.capacity is None and self.config.capacity_factor is None else None

    def capacity(self, ctx: RoutingContext) -> int | None:
        """Places an expert has in each row of this forward."""
        if self.config.capacity_factor is None or ctx.tokens is None:
            return self.config.capacity
        return fair_share(ctx.tokens.width, self.num_experts, self.config.capacity_factor)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a mixture whose input is as wide as the site's."""
    return Switch(site.dim, config)


CARD = MethodCard(
    title="Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
    year=2021,
    arxiv="2101.03961",
    summary="One expert a token, weighted by its probability, with a capacity per sequence.",
    taxonomy="gating/sparse/token-choice/top-1",
    deviations=("jitter touches the router's input only",),
)
