"""Expert choice: each expert takes the tokens that suit it best, so the load is equal by construction.

    p = softmax(x W^T) over experts [T, E];  expert i takes the c tokens with the largest p_ti;  weight = p_ti
    c = ceil(capacity_factor * n / E) for n valid tokens, at most n.

Tokens are picked among those of the whole batch or of each sequence. Either way a pick reads later tokens: the routing
is not causal and generation with it is not the function that was trained. Padding is never picked.

Source: Zhou et al. 2022 (2202.09368, eq. 1 and section 3.2).
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.router import LinearRouter, topk_indices
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site


class Config(BaseConfig):
    """Settings.

    Attributes:
        capacity_factor: mean number of experts a token gets. over: pick among the tokens of the batch or of a sequence.
    """

    num_experts: int = Field(default=8, ge=1)
    capacity_factor: float = Field(default=2.0, gt=0)
    over: Literal["batch", "sequence"] = "sequence"


def take_tokens(select_TE: Tensor, group_T: Tensor, valid_T: Tensor, num_groups: int, factor: float) -> Tensor:
    """Which tokens each expert takes, bool [T, E]: the best ``ceil(factor * n / E)`` of each group's n valid tokens."""
    chosen_TE = torch.zeros_like(select_TE, dtype=torch.bool)
    num_experts = select_TE.shape[1]
    for group in range(num_groups):
        index_M = ((group_T == group) & valid_T).nonzero().squeeze(1)
        count = places(len(index_M), num_experts, factor)
        if count:
            picked_EX = topk_indices(select_TE[index_M].T, count)
            chosen_TE[index_M[picked_EX], torch.arange(num_experts, device=index_M.device)[:, None]] = True
    return chosen_TE & (select_TE > float("-inf"))


def places(tokens: int, num_experts: int, factor: float) -> int:
    """How many of ``tokens`` an expert takes."""
    return min(math.ceil(factor * tokens / num_experts), tokens)


class ExpertChoice(LinearRouter):
    """The router."""

    causal = False

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config.num_experts, top_k=None)
        self.config = config

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router."""
        logits_TC = self.logits(x_TD)
        probability_TC = logits_TC.softmax(-1)
        return Scores(logits_TC, probability_TC.detach(), probability_TC, probability_TC)

    def real_per_token(self, length: int) -> float | None:
        """See Router; for sequences without padding. Over a batch, whose size is not known here, it is not rounded."""
        if self.config.over == "batch":
            return min(self.config.capacity_factor, float(self.num_experts))
        return places(length, self.num_experts, self.config.capacity_factor) * self.num_experts / length

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        tokens = ctx.tokens
        assert tokens is not None
        whole = self.config.over == "batch"
        group_T = torch.zeros_like(tokens.row_T) if whole else tokens.row_T
        chosen_TE = take_tokens(
            scores.select_TC, group_T, tokens.valid_T, 1 if whole else tokens.num_rows, self.config.capacity_factor
        )
        return Routing.from_mask(chosen_TE, scores.gate_TC, num_experts=self.num_experts, scores=scores, causal=False)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a mixture whose input is as wide as the site's."""
    return ExpertChoice(site.dim, config)


CARD = MethodCard(
    title="Mixture-of-Experts with Expert Choice Routing",
    year=2022,
    arxiv="2202.09368",
    summary="Experts pick tokens: equal load by construction, not causal.",
    taxonomy="gating/sparse/expert-choice",
    deviations=("no cap on the number of experts a token may get (section 3.3 of the paper)",),
    causal=False,
)
