"""Top-p routing: as many experts as the router needs to be sure.

    P = softmax(x W^T)                              [T, N], float32
    i_1, i_2, ... = experts by falling P            (equal P: the lower id first)
    t = min{ j : P_{i_1} + ... + P_{i_j} > p }      (the expert that crosses p is in; all N when no sum exceeds p)
    y = sum over j <= t of P_{i_j} E_{i_j}(x)

One expert serves a token the router is certain about, several one it is undecided about: from 1 (p = 0) to N (p = 1).
The weights are not renormalised, so a token that stops early gets a smaller output; ``renormalise`` divides by their
sum. P sums to 1, hence p below 1/N always means one expert, and uniform P means floor(p N) + 1: a fresh router with
p = 0.4 uses 7 of 16 experts, and costs accordingly, until it has learned to decide. Add ``train.balance_loss`` (paper:
1e-2), and ``train.entropy_loss`` (paper: 1e-4) so that the router does not stay undecided to buy itself more experts.

The value ``top_p`` of a session or of a recipe's phase overrides p; ``calibrate_p`` finds the p of a wanted mean number
of experts; the edit ``TopP`` gives any router's choice to p:

    with moestro.session(collect=True) as opened, torch.no_grad():
        model(**batch)
    seen = [r.scores.probabilities()[c.tokens.valid_T] for c in opened.take() for r in c.routings.values()]
    with moestro.session(values={"top_p": calibrate_p(seen, 2.0)}):
        model.generate(...)

Source: Huang et al. 2024 (2403.07652, section 2.2 for the choice, 2.3 for the losses) and its released code, which
compares strictly and keeps the crossing expert.
"""

import functools
import logging
from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.router import LinearRouter, Router
from moestro.core.routing import Routing, Scores
from moestro.core.session import Edit
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.selection import normalise


class Config(BaseConfig):
    """Settings.

    Attributes:
        p: the probability that the chosen experts must exceed together. min_experts, max_experts: bounds on their
            number, whatever p says; None means all. renormalise: divide the weights by their sum.
    """

    num_experts: int = Field(default=16, ge=1)
    p: float = Field(default=0.4, ge=0, le=1)
    min_experts: int = Field(default=1, ge=1)
    max_experts: int | None = Field(default=None, ge=1)
    renormalise: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        most = self.num_experts if self.max_experts is None else self.max_experts
        if most > self.num_experts:
            raise ConfigError(f"max_experts={most} but num_experts={self.num_experts}; leave max_experts out for all")
        if self.min_experts > most:
            raise ConfigError(f"min_experts={self.min_experts} is more than the {most} experts a token may use")
        return self


def running_mass(probability_TC: Tensor) -> Tensor:
    """c_j, the sum of each token's first j probabilities, never above 1: rounding must not count as mass."""
    return probability_TC.cumsum(-1).clamp(max=1.0)


def prefix_lengths(mass_TC: Tensor, p: float, least: int = 1, most: int | None = None) -> Tensor:
    """t = min{ j : c_j > p }, C where there is none, within [least, most]; int64 [T].

    Args:
        mass_TC: running sums c_j of probabilities in falling order.
    """
    return (1 + (mass_TC[:, :-1] <= p).sum(-1)).clamp(least, most)


def rank(scores: Scores) -> Tensor:
    """Choices of each token, best first, int64 [T, C]; equal scores go to the lower id."""
    return torch.sort(scores.select_TC, dim=-1, descending=True, stable=True).indices


def count_choices(scores: Scores, order_TC: Tensor, p: float, least: int = 1, most: int | None = None) -> Tensor:
    """How many of its best choices each token uses, int64 [T]; choices closed by -inf are never among them.

    Args:
        order_TC: what ``rank`` gives.

    Raises:
        ContextError: a token has fewer than ``least`` open choices.
    """
    mass_TC = running_mass(scores.probabilities().detach().gather(1, order_TC))
    open_T = (scores.select_TC != float("-inf")).sum(-1)
    if open_T.numel() and int(open_T.min()) < least:
        row = int(open_T.argmin())
        raise ContextError(
            f"token {row} may choose among {int(open_T[row])} experts but needs {least}; close fewer of them"
        )
    return torch.minimum(prefix_lengths(mass_TC, p, least, most), open_T)


def take_first(order_TC: Tensor, weight_TC: Tensor, count_T: Tensor, like: Routing | Router, scores: Scores) -> Routing:
    """The routing in which each token uses the first ``count_T`` choices of its order, listed best first.

    Args:
        order_TC, weight_TC: choices and their weights, best first. like: gives the numbers of experts and nulls, and
            whether the scores may have read later tokens.
    """
    used_TC = torch.arange(order_TC.shape[1], device=order_TC.device) < count_T[:, None]
    return Routing(
        torch.arange(len(count_T), device=count_T.device).repeat_interleave(count_T),
        order_TC.masked_select(used_TC),
        weight_TC.masked_select(used_TC),
        len(count_T),
        like.num_experts,
        like.num_null,
        scores,
        like.causal,
    )


def check_bounds(least: int, most: int | None) -> None:
    """Raise ConfigError unless 1 <= least <= most."""
    if least < 1 or (most is not None and most < least):
        raise ConfigError(f"min_experts={least}, max_experts={most}; need 1 <= min <= max")


def calibrate_p(
    probabilities: Sequence[Tensor], mean_experts: float, *, min_experts: int = 1, max_experts: int | None = None
) -> float:
    """The largest p that gives at most ``mean_experts`` experts a token, by bisection to 2^-40.

    The mean is over all given tokens, and exact for the forwards these probabilities come from. Under another p a layer
    hands on other states, so the mean of a whole model moves a little: calibrate again with what the new p shows.

    Args:
        probabilities: router probabilities [T, C] of valid tokens, one tensor a layer or forward; summed in float32.

    Raises:
        ConfigError: no token, rows that are no probabilities, impossible bounds, or a mean that no p can give.
    """
    check_bounds(min_experts, max_experts)
    if not sum(len(probability_TC) for probability_TC in probabilities):
        raise ConfigError("calibrate_p: no token was given; collect the routings of some text first")
    for one in probabilities:
        total_T = one.float().sum(-1)
        wrong_T = ~((total_T - 1).abs() <= 0.02) | (one < 0).any(-1)  # bfloat16 rows are off by up to a hundredth
        if wrong_T.any():
            raise ConfigError(f"calibrate_p: a row sums to {float(total_T[wrong_T][0]):.4g}; give probabilities, >= 0")
    masses = [running_mass(torch.sort(one.float(), dim=-1, descending=True).values) for one in probabilities]

    def mean(p: float) -> float:
        return float(torch.cat([prefix_lengths(mass, p, min_experts, max_experts) for mass in masses]).double().mean())

    low, high = 0.0, 1.0
    if not mean(low) <= mean_experts <= mean(high):
        raise ConfigError(
            f"mean_experts={mean_experts:g}: these probabilities give {mean(low):.4g} (p=0) to {mean(high):.4g} (p=1) "
            "experts a token"
        )
    if mean(high) == mean_experts:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) <= mean_experts else (low, middle)
    return low


@functools.cache
def _warn_once(text: str) -> None:
    logging.getLogger("moestro").warning("train.dynamic_moe: %s", text)


class DynamicRouter(LinearRouter):
    """The router. Nothing but ``weight`` [N, D] is saved; the p it was trained with stands in its settings."""

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config.num_experts, top_k=None)
        self.config = config

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router.

        Raises:
            ContextError: the logits of a token that is no padding are NaN or infinite.
        """
        logits_TC = self.logits(x_TD)
        probability_TC = logits_TC.softmax(-1)
        lost_T = probability_TC.isnan().any(-1)
        if ctx.tokens is not None:
            lost_T = lost_T & ctx.tokens.valid_T
        if lost_T.any():
            token = int(lost_T.nonzero()[0])
            raise ContextError(f"router logits of token {token} are NaN or infinite; check weights and inputs")
        return Scores(logits_TC, probability_TC.detach(), probability_TC, probability_TC)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router.

        Raises:
            ContextError: the session's ``top_p`` is outside [0, 1], or too few choices are open.
        """
        config = self.config
        order_TC = rank(scores)
        count_T = count_choices(scores, order_TC, self.threshold(ctx), config.min_experts, config.max_experts)
        weight_TC = scores.gate_TC.gather(1, order_TC)
        if config.renormalise:
            place_C = torch.arange(self.num_choices, device=count_T.device)
            weight_TC = self.weigh(weight_TC.masked_fill(place_C >= count_T[:, None], 0.0))
        return take_first(order_TC, weight_TC, count_T, self, scores)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """See Router."""
        return normalise(gate_TK) if self.config.renormalise else gate_TK

    def threshold(self, ctx: RoutingContext) -> float:
        """The p in force: the settings', or the session's ``top_p``; another p than trained with is told once."""
        p = ctx.value("top_p", self.config.p)
        if not 0 <= p <= 1:
            raise ContextError(f"top_p={p:g} must lie between 0 (one expert) and 1 (all experts)")
        if p != self.config.p and not self.training:
            _warn_once(f"top_p={p:g}, but the router was trained with p={self.config.p:g}: cost and outputs differ")
        return p


class TopP(Edit):
    """Whatever router stands there, give each token the shortest prefix of its choices that exceeds p together.

    Scores need not be a softmax: the mass is the router's own probabilities, which sum to 1. The router weighs the
    choices as it would weigh so many. On a model trained with top-k this is a knob of quality, not of cost: the
    paper's top-2 model does worse than top-2 at two experts a token, and better only with more.

    Args:
        p: in [0, 1]. min_experts, max_experts: bounds on the number of choices.

    Raises:
        ConfigError: p or the bounds are impossible.
    """

    def __init__(self, p: float, *, min_experts: int = 1, max_experts: int | None = None) -> None:
        if not 0 <= p <= 1:
            raise ConfigError(f"p={p:g} must lie between 0 (one expert) and 1 (all experts)")
        check_bounds(min_experts, max_experts)
        self.p, self.least, self.most = p, min_experts, max_experts

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        """See Edit.

        Raises:
            ContextError: the routing has no scores of its choices, or a capacity that a new choice would pass over.
        """
        scores = routing.scores
        if scores is None or scores.select_TC.shape[1] != routing.num_choices:
            raise ContextError(f"{site}: top-p needs a score of each of the {routing.num_choices} choices")
        if routing.kept_N is not None:
            raise ContextError(f"{site}: the router drops tokens by capacity, which top-p would pass over")
        if not isinstance(router, DynamicRouter):
            _warn_once(f"{type(router).__name__} was not trained for top-p: p sets quality here, it saves nothing")
        order_TC = rank(scores)
        count_T = count_choices(scores, order_TC, self.p, self.least, self.most)
        gate_TC = scores.gate_TC.gather(1, order_TC)
        weight_TC = torch.zeros_like(gate_TC)
        for count in torch.unique(count_T).tolist():  # at most C numbers; a router weighs rows of one length
            rows_T = count_T == count
            weight_TC[rows_T, :count] = router.weigh(gate_TC[rows_T, :count])
        return take_first(order_TC, weight_TC, count_T, routing, scores)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a mixture whose input is as wide as the site's."""
    return DynamicRouter(site.dim, config)


CARD = MethodCard(
    title="Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
    year=2024,
    arxiv="2403.07652",
    paper="dynamic-moe",
    summary="Top-p: each token takes its best experts until their probability together exceeds p.",
    taxonomy="inference/model/algorithm/dynamic-gating",
    deviations=(
        "softmax, order and sums are float32; the released code takes them in the model's type, where sums are off "
        "by up to a hundredth",
        "the loop adds the losses of layers up where the paper takes their mean: divide the weights by the layers",
        "the balance loss takes f over all assignments, so that even routing gives 1 for any number of experts a token",
        "bounds on the number of experts and renormalised weights are options of our own, off unless asked for",
    ),
)
