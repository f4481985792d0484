"""Sigmoid scores with a selection bias: DeepSeek-V3's router and its balancing without an auxiliary loss.

    s = sigmoid(x W^T)                        [T, E]
    chosen: the k largest s + b among the groups whose two best members' (s + b) sum is largest
    weight_i = scale * s_i / (sum of the chosen s + renorm_eps)        (s, never s + b)

After each optimiser step, with the step's assignment counts over all micro-batches and ranks,

    b_i += gamma * sign(mean load - load_i).

The balance loss reads P = s / sum_i s. Source: DeepSeek-V3 (2412.19437, section 2.1.2) and 2408.15664.
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.router import LinearRouter, choose_topk
from moestro.core.routing import Routing, Scores
from moestro.core.session import current_session
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.selection import check_groups, keep_best_groups, normalise, warn_if_dead


class Config(BaseConfig):
    """Settings.

    Attributes:
        gamma: step of the bias; 0 freezes it. A scheduled value ``bias_speed`` overrides it.
        renormalise, renorm_eps, scale: of the weights. num_groups, groups_kept: node-limited choice.
    """

    num_experts: int = Field(default=8, ge=1)
    top_k: int = Field(default=2, ge=1)
    renormalise: bool = True
    renorm_eps: float = Field(default=1e-20, ge=0)
    scale: float = 1.0
    num_groups: int = Field(default=1, ge=1)
    groups_kept: int = Field(default=1, ge=1)
    gamma: float = Field(default=1e-3, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        check_groups(self.num_experts, self.top_k, self.num_groups, self.groups_kept)
        return self


class SigmoidBias(LinearRouter):
    """The router. ``selection_bias`` [E] is a buffer: saved, without gradient, float32 whatever the model's type."""

    choice_rows = (*LinearRouter.choice_rows, "selection_bias")
    selection_bias: Tensor

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config.num_experts, top_k=config.top_k)
        self.config = config
        self.register_buffer("selection_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Move like any module, but never round the bias: steps of 1e-3 vanish in bfloat16 once it exceeds 0.5."""
        exact = self.selection_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.selection_bias.dtype != exact.dtype:
            self.selection_bias = exact.to(self.selection_bias.device)
        return self

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router."""
        logits_TC = self.logits(x_TD)
        sigmoid_TC = logits_TC.sigmoid()
        biased_TC = sigmoid_TC.detach() + self.selection_bias
        select_TC = keep_best_groups(biased_TC, self.config.num_groups, self.config.groups_kept, "top2_sum")
        return Scores(logits_TC, select_TC, sigmoid_TC, normalise(sigmoid_TC, 1e-20))

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        expert_TK = choose_topk(scores.select_TC, self.config.top_k)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        return Routing.from_topk(expert_TK, weight_TK, num_experts=self.num_experts, scores=scores)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """See Router."""
        weight_TK = normalise(gate_TK, self.config.renorm_eps) if self.config.renormalise else gate_TK
        return weight_TK if self.config.scale == 1.0 else weight_TK * self.config.scale

    @torch.no_grad()
    def after_step(self, load_C: Tensor) -> None:
        """Push the bias of overloaded experts down and of underloaded ones up by gamma."""
        gamma = current_session().values.get("bias_speed", self.config.gamma)
        load_C = load_C.to(self.selection_bias)
        if gamma and load_C.sum() > 0:
            self.selection_bias += gamma * torch.sign(load_C.mean() - load_C)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a mixture whose input is as wide as the site's."""
    warn_if_dead(config.top_k, config.renormalise, "train.sigmoid_bias")
    return SigmoidBias(site.dim, config)


CARD = MethodCard(
    title="DeepSeek-V3 Technical Report",
    year=2024,
    arxiv="2412.19437",
    paper="deepseekmoe",
    summary="Sigmoid scores, choice by score plus a bias that balances load without an auxiliary loss.",
    taxonomy="losses/bias-update",
)
