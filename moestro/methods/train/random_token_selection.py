"""Random token selection: when an expert is asked by more tokens than it has places for, chance decides who stays.

    p = softmax(x W^T) [T, E],   e_t = argmax p_t,   weight = p_te (not renormalised)
    C = max(ceil(capacity_factor * n / E), min_capacity), at most n: places an expert has in a forward of n valid tokens

Of the tokens that chose an expert, the C first by ``order`` are served. The others pass by the mixture (its output is 0
for them) and still count as demand in losses:

    random       largest u_t first, u_t ~ U(0, 1) drawn anew in every forward: all tokens of an expert are equally
                 likely to be dropped
    position     first come, first served, in the order of the flattened batch: the late rows of a batch are dropped
                 again and again
    probability  largest p_te first

Draws come from PyTorch's global generator while training; evaluation draws nothing and goes by position instead.
Padding neither counts as a token nor takes a place. While training, ``jitter`` j multiplies the router's input by
uniform noise in [1 - j, 1 + j], and ``gumbel`` picks the expert by logits + Gumbel noise (a sample from p).

Source: Z-code M3 (2109.10465, random token selection) and the top-1 gate of DeepSpeed that was released with it.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.router import LinearRouter, choose_topk
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.capacity import fair_share, within_capacity
from moestro.methods.train._parts.noise import gumbel_like
from moestro.models.swap import Jitter


Order = Literal["random", "position", "probability"]


class Config(BaseConfig):
    """Settings.

    Attributes:
        order: who is served first. capacity_factor, eval_capacity_factor: places as a multiple of the fair share, while
            training and otherwise; None drops nothing. min_capacity: places an expert has at least.
        jitter: half width of the multiplicative noise on the router's input. gumbel: sample the expert.
    """

    num_experts: int = Field(default=8, ge=1)
    order: Order = "random"
    capacity_factor: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    eval_capacity_factor: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    min_capacity: int = Field(default=4, ge=0)
    jitter: float = Field(default=0.0, ge=0, lt=1)
    gumbel: bool = False


def places(num_tokens: int, num_experts: int, factor: float, min_capacity: int) -> int:
    """Tokens an expert takes: ``factor`` times its fair share rounded up, at least ``min_capacity``, at most all."""
    return min(max(fair_share(num_tokens, num_experts, factor), min_capacity), num_tokens)


def priority(order: Order, probability_T: Tensor) -> Tensor | None:
    """What tokens of one expert are served by, highest first [T]; None: their order.

    One number a token is enough: a token asks one expert only, so a number for every pair would be drawn to be ignored.
    """
    if order == "probability":
        return probability_T
    return torch.rand_like(probability_T) if order == "random" else None


class RandomTokenSelection(LinearRouter):
    """The router. ``causal`` says whether any forward may drop tokens; each Routing says so of itself."""

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config.num_experts, top_k=1)
        self.config = config
        self.noise = Jitter(config.jitter) if config.jitter else None
        self.causal = config.capacity_factor is None and config.eval_capacity_factor is None

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router."""
        logits_TC = self.logits(x_TD if self.noise is None else self.noise(x_TD.float()))
        probability_TC = logits_TC.softmax(-1)
        select_TC = probability_TC.detach()
        if self.training and self.config.gumbel:
            select_TC = logits_TC.detach() + gumbel_like(logits_TC)
        return Scores(logits_TC, select_TC, probability_TC, probability_TC)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        expert_TK = choose_topk(scores.select_TC, 1)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        factor = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        kept_TK = None
        if factor is not None:
            kept_TK = self.kept(expert_TK[:, 0], weight_TK.detach()[:, 0], factor, ctx).unsqueeze(1)
        return Routing.from_topk(
            expert_TK, weight_TK, num_experts=self.num_experts, scores=scores, causal=factor is None, kept_TK=kept_TK
        )

    def kept(self, expert_T: Tensor, probability_T: Tensor, factor: float, ctx: RoutingContext) -> Tensor:
        """Which tokens are served, bool [T]; padding never is."""
        tokens = ctx.tokens
        assert tokens is not None
        order = self.config.order if self.training or self.config.order != "random" else "position"
        priority_T = priority(order, probability_T)
        index_T = tokens.valid_T.nonzero().squeeze(1)
        expert_T = expert_T[index_T]
        served_T = within_capacity(
            expert_T,
            torch.zeros_like(expert_T),
            1,
            self.num_experts,
            places(len(index_T), self.num_experts, factor, self.config.min_capacity),
            None if priority_T is None else priority_T[index_T],
        )
        return torch.zeros_like(tokens.valid_T).index_put((index_T,), served_T)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a mixture whose input is as wide as the site's."""
    return RandomTokenSelection(site.dim, config)


CARD = MethodCard(
    title="Scalable and Efficient MoE Training for Multitask Multilingual Models",
    year=2021,
    arxiv="2109.10465",
    paper="zcode-m3",
    summary="One expert a token with a capacity; which tokens an overfull expert drops is left to chance.",
    taxonomy="gating/sparse/token-choice/top-1",
    deviations=(
        "evaluation draws nothing: it serves tokens by position where the released code goes on drawing",
        "padding neither counts towards the capacity nor takes a place",
        "min_capacity is cut to the number of tokens where the released code refuses to run, so that decoding works",
        "one random number a token, not one a token and expert; the distribution is the same",
    ),
    causal=False,
)
