"""Duo-LLM: a big and a small feed-forward network in every layer, one of them for each token, or nothing at all.

    y = FFN_r(x),   r = big (inner width D), small (D / small_ratio) or skip (0, so that the residual stream passes)

The modules are trained to be interchangeable by random routing, independent for each token and layer. A router
can then be trained on top: P = softmax(x W^T / tau) over the choices, and while training y = sum_r P_r FFN_r(x), both
computed; tau falls and in evaluation the likeliest choice runs alone with weight 1. The loss ``budget`` holds

    (mean over layers and tokens of P_big - budget)^2

so that a layer may be always big. How far such a router is from the best choices, `inspect.route_oracle` measures.

``route``: ``random``, ``fixed`` (one choice for all tokens; a list over layers in a recipe) or ``learned``. The
temperature is the session's value ``duo_tau``, which phases ramp.

Source: Duo-LLM (2410.10846, sections 3 and 4). The printed softmax divides exp(h) by tau, which cancels; here h is
divided.
"""

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank, HeterogeneousBank, StackedFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.losses import RoutingLoss
from moestro.core.router import Router, exact_linear, topk_indices
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site
from moestro.surgery.opened import form_at


CHOICES = ("big", "small", "skip")
TAU = "duo_tau"


class Config(BaseConfig):
    """Settings.

    Attributes:
        big: inner width D of the big module, None for that of the feed-forward at the site. small_ratio: D over the
            small module's width. skip: a third choice that costs nothing.
        route: how a token's module is found. probabilities: of big, small and skip, for random routing; None for equal
            ones, or 0.45, 0.45, 0.1 with skip. fixed: the choice of fixed routing.
        budget: share of big modules that the loss ``budget`` asks for; None for no such loss.
    """

    big: int | None = Field(default=None, ge=1)
    small_ratio: int = Field(default=16, ge=1)
    skip: bool = False
    route: Literal["random", "fixed", "learned"] = "random"
    probabilities: list[float] | None = None
    fixed: Literal["big", "small", "skip"] = "big"
    budget: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.probabilities is not None:
            wanted = 2 + self.skip
            if len(self.probabilities) != wanted:
                raise ConfigError(f"probabilities has {len(self.probabilities)} entries for {wanted} choices")
            if min(self.probabilities) < 0 or abs(sum(self.probabilities) - 1) > 1e-6:
                raise ConfigError(f"probabilities={self.probabilities} must be >= 0 and sum to 1")
        if self.fixed == "skip" and not self.skip:
            raise ConfigError("fixed='skip' needs skip=True")
        if self.budget is not None and self.route != "learned":
            raise ConfigError(f"budget={self.budget} but route={self.route!r} has nothing to learn; leave it out")
        if self.big is not None:
            small_width(self.big, self.small_ratio)
        return self

    @property
    def chances(self) -> list[float]:
        """Probabilities of random routing."""
        return self.probabilities or ([0.45, 0.45, 0.1] if self.skip else [0.5, 0.5])


def small_width(big: int, ratio: int) -> int:
    """Inner width of the small module, D / ratio to the nearest integer.

    Raises:
        ConfigError: nothing is left of it.
    """
    if ratio > big:
        raise ConfigError(f"small_ratio={ratio} leaves nothing of big={big}; at most {big}")
    return round(big / ratio)


class DuoRouter(Router):
    """Choices 0 big, 1 small, 2 skip (a null). Parameters: ``weight`` [C, D] where the route is learned.

    A soft mixture (learned, training) has C assignments a token; all else has one.
    """

    choice_rows = ("weight",)

    def __init__(self, dim: int, config: Config) -> None:
        soft = config.route == "learned"
        super().__init__(2, top_k=None if soft else 1, num_null=int(config.skip))
        self.config = config
        self.weight = nn.Parameter(torch.empty(self.num_choices, dim)) if soft else None
        if self.weight is not None and not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.02)

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """Logits over tau, one at the fixed choice, or one at a choice drawn by its probability."""
        shape = (x_TD.shape[0], self.num_choices)
        if self.weight is not None:
            logits_TC = exact_linear(x_TD, self.weight) / ctx.value(TAU, 1.0)
            probability_TC = logits_TC.softmax(-1)
            return Scores(logits_TC, logits_TC, probability_TC, probability_TC)
        if self.config.route == "fixed":
            choice_T = torch.full((shape[0],), CHOICES.index(self.config.fixed), device=x_TD.device)
        else:
            edge_C = torch.tensor(self.config.chances, device=x_TD.device).cumsum(0)
            draw_T = torch.rand(shape[0], device=x_TD.device)
            choice_T = torch.searchsorted(edge_C, draw_T, right=True).clamp(max=shape[1] - 1)
        zeros_TC = torch.zeros(shape, device=x_TD.device)
        chosen_TC = zeros_TC.scatter(1, choice_T[:, None], 1.0)
        return Scores(zeros_TC, chosen_TC, torch.ones(shape, device=x_TD.device))

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """All choices with their probabilities while a learned route trains, else the best alone with weight 1."""
        if self.weight is not None and self.training:
            count, width = scores.gate_TC.shape
            expert_TK = torch.arange(width, device=scores.gate_TC.device).expand(count, width)
            weight_TK = scores.gate_TC
        else:
            expert_TK = topk_indices(scores.select_TC, 1)
            weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        return Routing.from_topk(
            expert_TK, weight_TK, num_experts=self.num_experts, num_null=self.num_null, scores=scores
        )

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """A module that runs alone counts fully."""
        return torch.ones_like(gate_TK)


class BudgetLoss(RoutingLoss):
    """(mean over layers and valid tokens of P_big - budget)^2, once a forward of a stack, told by its last layer."""

    unit = "batch"

    def __init__(self, budget: float) -> None:
        super().__init__()
        self.budget = budget

    def forward(self, site: str, routing: Routing, ctx: RoutingContext) -> Tensor:
        """See RoutingLoss.

        Raises:
            ContextError: the routing carries no scores.
        """
        if routing.scores is None or ctx.tokens is None:
            raise ContextError(f"{site}: the budget loss needs the router's scores")
        valid_T = ctx.tokens.valid_T
        total = routing.scores.probabilities()[:, 0].masked_fill(~valid_T, 0.0).sum()
        count = valid_T.sum()
        ctx.put(site, "duo_budget", (total, count))
        owners = self._owners(ctx) or (site,)
        if site != owners[-1]:
            return total * 0.0
        earlier = [ctx.get(other, "duo_budget") for other in owners[:-1]]
        sums = [*(entry for entry in earlier if entry is not None), (total, count)]
        mean = torch.stack([s[0] for s in sums]).sum() / torch.stack([s[1] for s in sums]).sum().clamp(min=1)
        return (mean - self.budget).square()

    def _owners(self, ctx: RoutingContext) -> tuple[str, ...]:
        """Sites of the stack with the same loss."""
        layers = {} if ctx.module is None else mixture_layers(ctx.module)
        return tuple(
            layer.site
            for layer in layers.values()
            if any(isinstance(loss, BudgetLoss) and loss.budget == self.budget for loss in layer.losses.values())
        )


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The layer for a feed-forward site.

    Raises:
        ConfigError: the site does not tell the big width, or ``small_ratio`` is larger.
    """
    found = form_at(site)
    big = config.big or (found.inner if found else getattr(site.model_config, "intermediate_size", None))
    if big is None:
        raise ConfigError(f"{site.path}: {type(site.module).__name__} does not tell the inner width; give big")
    parts = [StackedFFN(1, site.dim, width, out=site.out) for width in (big, small_width(big, config.small_ratio))]
    losses = {} if config.budget is None else {"budget": BudgetLoss(config.budget)}
    return MoELayer(DuoRouter(site.dim, config), HeterogeneousBank(parts), site=site.path, losses=losses)


CARD = MethodCard(
    title="Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models",
    year=2024,
    arxiv="2410.10846",
    paper="duo-llm",
    summary="A big and a small module in every layer, or none: random, fixed or learned for each token.",
    taxonomy="experts/hyper-parameters/size",
    deviations=("the temperature divides the logits, not their exponentials, where it would cancel",),
    stochastic=True,
)
