"""Softmax top-k: the router of most open mixtures.

For logits z = x W^T (+ b) [T, E]:

    softmax="all":     p = softmax(z), S = the k largest p, weight_i = p_i
    softmax="chosen":  S = the k largest z, weight = softmax over z in S

then, with ``renormalise``, weight_i / (sum of S + renorm_eps), and always times ``scale``. With ``num_groups`` > 1 only
experts of the ``groups_kept`` groups whose best member scores highest may be chosen.

Sources: Shazeer et al. 2017 (1701.06538) for softmax over the chosen; Mixtral, OLMoE, Qwen-MoE, GPT-OSS and Granite for
the variants; DeepSeek-V2 (2405.04434, section 2.2.2) for groups and scale.
"""

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.router import LinearRouter, choose_topk
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.selection import check_groups, keep_best_groups, normalise, warn_if_dead


class Config(BaseConfig):
    """Settings.

    Attributes:
        softmax: over all experts before the choice, or over the chosen after it.
        renormalise, renorm_eps: divide the chosen weights by their sum (plus eps). scale: factor on the weights.
        num_groups, groups_kept: group-limited choice; 1 group means no limit. bias: a bias on the logits.
    """

    num_experts: int = Field(default=8, ge=1)
    top_k: int = Field(default=2, ge=1)
    softmax: Literal["all", "chosen"] = "all"
    renormalise: bool = True
    renorm_eps: float = Field(default=0.0, ge=0)
    scale: float = 1.0
    num_groups: int = Field(default=1, ge=1)
    groups_kept: int = Field(default=1, ge=1)
    bias: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        check_groups(self.num_experts, self.top_k, self.num_groups, self.groups_kept)
        return self


class SoftmaxTopK(LinearRouter):
    """The router."""

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config.num_experts, top_k=config.top_k, bias=config.bias)
        self.config = config

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router."""
        logits_TC = self.logits(x_TD)
        if self.config.softmax == "chosen":
            select_TC, gate_TC, prob_TC = logits_TC, logits_TC, None
        else:
            select_TC = gate_TC = prob_TC = logits_TC.softmax(-1)
        select_TC = keep_best_groups(select_TC.detach(), self.config.num_groups, self.config.groups_kept, "max")
        return Scores(logits_TC, select_TC, gate_TC, prob_TC)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        expert_TK = choose_topk(scores.select_TC, self.config.top_k)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        return Routing.from_topk(expert_TK, weight_TK, num_experts=self.num_experts, scores=scores)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """See Router."""
        weight_TK = gate_TK.softmax(-1) if self.config.softmax == "chosen" else gate_TK
        if self.config.renormalise and self.config.softmax == "all":
            weight_TK = normalise(weight_TK, self.config.renorm_eps)
        return weight_TK if self.config.scale == 1.0 else weight_TK * self.config.scale


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a mixture whose input is as wide as the site's."""
    warn_if_dead(config.top_k, config.renormalise or config.softmax == "chosen", "train.softmax_topk")
    return SoftmaxTopK(site.dim, config)


CARD = MethodCard(
    title="Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    year=2017,
    arxiv="1701.06538",
    summary="Softmax over logits, the k best experts, weights as they are, renormalised or scaled.",
    taxonomy="gating/sparse/token-choice",
    deviations=("no noise on the logits; train.noisy_topk has it",),
)
