"""AdaMoE: null experts, so that the number of experts a token uses is the router's choice.

m nulls stand behind the n experts and k grows. For logits z = x W^T (+ b) [T, n + m]:

    S = the k largest z;  R = the experts in S, without nulls
    normalise="true":  w_i = exp z_i / sum over R of exp z_j     a token without experts gets 0 from the layer
    normalise="all":   w_i = exp z_i / sum over S of exp z_j     the nulls in S keep a share g of the weight
    y = sum over R of w_i E_i(x)   (+ g x with nulls="identity")

Nulls are never computed. At even load a token uses k n / (n + m) experts; ``train.null_balance_loss`` holds it there,
and its weight may fall in later phases. With normalise="true" a token that found one expert, or none, teaches the
router nothing: its weights are 1 or 0 whatever the logits are. ``real_per_token`` counts such tokens.

On a trained mixture, init="tile" keeps its router's rows and makes the nulls copies of them, c = m / n times over. A
copy ties with its expert and ties go to the expert, so the layer starts with the ceil(k / (1 + c)) best experts of each
token: where those are as many as before, it is what it was if its weights were a softmax that sums to 1.

``RandomDepth`` is the control: as many experts a token on average, their number drawn by chance.

Source: AdaMoE (2406.13233: null experts, the softmax over true experts only, router rows for Mixtral).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import Combine, MoELayer
from moestro.core.registry import method
from moestro.core.router import LinearRouter, Router, choose_topk, exact_linear
from moestro.core.routing import Routing, Scores
from moestro.core.session import Edit
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.selection import warn_if_dead


class Config(BaseConfig):
    """Settings.

    Attributes:
        num_experts: n. num_null: m. top_k: k, choices a token, nulls among them; may exceed n.
        normalise: over which of the chosen the weights are a softmax. nulls: what a null gives; identity needs "all".
        init: rows of the nulls where a mixture stands at the site: copies of its experts' rows, or random ones.
        bias: a bias on the logits.
    """

    num_experts: int = Field(default=8, ge=1)
    num_null: int = Field(default=8, ge=0)
    top_k: int = Field(default=3, ge=1)
    normalise: Literal["true", "all"] = "true"
    nulls: Literal["zero", "identity"] = "zero"
    init: Literal["tile", "random"] = "tile"
    bias: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        choices = self.num_experts + self.num_null
        if self.top_k > choices:
            raise ConfigError(f"top_k={self.top_k} but there are {choices} choices, {self.num_null} of them nulls")
        if self.nulls == "identity" and self.normalise != "all":
            raise ConfigError('nulls="identity" have no weight with normalise="true"; give normalise="all"')
        if self.nulls == "identity" and self.num_null == 0:
            raise ConfigError('nulls="identity" but num_null=0; give num_null, or nulls="zero"')
        return self

    @property
    def even_load(self) -> float:
        """Experts a token uses when all choices are equally frequent, k n / (n + m)."""
        return self.top_k * self.num_experts / (self.num_experts + self.num_null)


def live_softmax(gate_TK: Tensor) -> Tensor:
    """Softmax over the entries above -inf of each row, same shape; zeros, without gradient, where there is none."""
    none_T1 = torch.isneginf(gate_TK).all(-1, keepdim=True)
    return gate_TK.masked_fill(none_T1, 0.0).softmax(-1).masked_fill(none_T1, 0.0)


def real_per_token(routing: Routing) -> Tensor:
    """How many experts compute for each token, int64 [T]."""
    return torch.bincount(routing.real().token_N, minlength=routing.num_tokens)


def null_mass(routing: Routing) -> Tensor:
    """Weight that each token gives to nulls, [T]."""
    null_N = routing.expert_N >= routing.num_experts
    empty_T = routing.weight_N.new_zeros(routing.num_tokens)
    return empty_T.index_add(0, routing.token_N[null_N], routing.weight_N[null_N])


def keep(routing: Routing, kept_TK: Tensor, weight_TK: Tensor) -> Routing:
    """A top-k routing without nulls thinned out to the choices in ``kept_TK``, bool, under new weights."""
    kept_N = kept_TK.reshape(-1)
    return Routing(
        routing.token_N[kept_N],
        routing.expert_N[kept_N],
        weight_TK.reshape(-1)[kept_N],
        routing.num_tokens,
        routing.num_experts,
        scores=routing.scores,
        causal=routing.causal,
    )


class NullTopK(LinearRouter):
    """The router. Gates are logits, -inf for nulls that take no part in the weights."""

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config.num_experts, top_k=config.top_k, num_null=config.num_null, bias=config.bias)
        self.config = config

    def logits(self, x_TD: Tensor) -> Tensor:
        """Logits [T, C] in float32, n at a time: only products of one shape give copied rows the same bits."""
        weights = torch.split(self.weight, self.num_experts)
        biases = [None] * len(weights) if self.bias is None else torch.split(self.bias, self.num_experts)
        parts = [exact_linear(x_TD, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        return torch.cat(parts, -1)

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router."""
        logits_TC = self.logits(x_TD)
        gate_TC = logits_TC
        if self.config.normalise == "true" and self.num_null:
            null_C = torch.arange(self.num_choices, device=logits_TC.device) >= self.num_experts
            gate_TC = logits_TC.masked_fill(null_C, float("-inf"))
        return Scores(logits_TC, logits_TC.detach(), gate_TC)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router. Nulls are listed, with weight 0 where they take no part."""
        expert_TK = choose_topk(scores.select_TC, self.config.top_k)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        return Routing.from_topk(
            expert_TK, weight_TK, num_experts=self.num_experts, num_null=self.num_null, scores=scores
        )

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """See Router."""
        return live_softmax(gate_TK)


class WithIdentity(nn.Module):
    """A combine that first adds the nulls' part g x to the routed branch.

    Args:
        inner: how the branches join.
    """

    def __init__(self, inner: Combine) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, routed_TO: Tensor, shared_TO: Tensor | None, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, O] of the branches, the layer's input [T, D] with D = O, and the routing with its nulls."""
        mass_T1 = null_mass(routing).to(x_TD.dtype).unsqueeze(1)
        return self.inner(routed_TO + mass_T1 * x_TD, shared_TO, x_TD, routing)


class RandomDepth(Edit):
    """The control of adaptive depth: each token keeps its best experts, how many is drawn and not decided.

    A mean of a.b keeps a + 1 experts with probability 0.b and a otherwise; the router weighs what is left. Draws come
    from PyTorch's global generator, so a seed fixes them and replays repeat them.

    Args:
        mean: experts a token, for all sites or by site. The router chooses a fixed number at least as large.

    Raises:
        ConfigError: a mean below 0. ContextError: while routing, a site without mean, or one that cannot have it.
    """

    def __init__(self, mean: float | Mapping[str, float]) -> None:
        for value in mean.values() if isinstance(mean, Mapping) else [mean]:
            if not value >= 0:
                raise ConfigError(f"a mean of {value} experts a token; it must be at least 0")
        self.mean = mean

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        """See Edit."""
        mean = self.mean.get(site) if isinstance(self.mean, Mapping) else self.mean
        scores, top_k = routing.scores, routing.top_k
        if mean is None:
            raise ContextError(f"{site}: RandomDepth knows no mean for this site; give one for each")
        if scores is None or top_k is None or routing.num_null or mean > top_k:
            raise ContextError(
                f"{site}: RandomDepth draws {mean:g} experts a token from a fixed number of scored ones; this router "
                f"chose {top_k or 'varying numbers'} with {routing.num_null} nulls"
            )
        few = math.floor(mean)
        many = min(few + 1, top_k)
        gate_TK = scores.gate_TC.gather(1, routing.expert_TK)
        more_T1 = torch.rand(routing.num_tokens, 1, device=gate_TK.device) < mean - few
        weight_TK = torch.where(more_T1, _best(router, gate_TK, many), _best(router, gate_TK, few))
        kept_TK = torch.arange(top_k, device=gate_TK.device) < torch.where(more_T1, many, few)
        return keep(routing, kept_TK, weight_TK)


def _best(router: Router, gate_TK: Tensor, count: int) -> Tensor:
    """Weights when a token keeps its ``count`` best, [T, K] with zeros behind them."""
    padded_TK = torch.zeros_like(gate_TK)
    if count:
        padded_TK = nn.functional.pad(router.weigh(gate_TK[:, :count]), (0, gate_TK.shape[1] - count))
    return padded_TK


def _inherit(router: NullTopK, site: Site, old: Router) -> None:
    """Take over the rows of the router at the site; nulls it does not have yet begin as ``init`` says."""
    num_experts, num_null = router.num_experts, router.num_null
    if old.num_experts != num_experts:
        return  # surgery changes the experts and brings their rows
    if old.num_null not in (0, num_null):
        raise ConfigError(f"{site.path} has {old.num_null} nulls already; give num_null={old.num_null}")
    tile = router.config.init == "tile" and old.num_null < num_null
    if tile and num_null % num_experts:
        raise ConfigError(
            f"num_null={num_null} is no multiple of num_experts={num_experts}, so the rows of {site.path} cannot be "
            'tiled; change it, or give init="random"'
        )
    for name in ("weight", "bias"):
        there, mine = getattr(old, name, None), getattr(router, name)
        if not isinstance(there, Tensor):
            if name == "weight" and tile:
                raise ConfigError(f'{site.path}: a {type(old).__name__} has no rows to tile; give init="random"')
            continue
        if mine is None:
            raise ConfigError(f"{site.path}: the logits of the router there have a bias; give bias=true")
        if there.is_meta and not mine.is_meta:
            if tile:
                raise ConfigError(f"{site.path}: its rows are not loaded; open the model and swap the router there")
            continue
        with torch.no_grad():
            rows = there.repeat(1 + num_null // num_experts, *[1] * (there.ndim - 1)) if tile else there
            mine[: len(rows)].copy_(rows)


def _mixture(there: MoELayer, router: Router, combine: Combine) -> MoELayer:
    """The mixture with another router and combine."""
    layer = MoELayer(
        router,
        there.bank,
        site=there.site,
        shared=there.shared,
        combine=combine,
        pre=there.pre,
        post=there.post,
        noise=there.noise,
    )
    layer.losses = there.losses
    layer.dispatcher = there.dispatcher
    return layer


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a mixture whose input is as wide as the site's; the mixture itself when identity nulls come or go.

    Raises:
        ConfigError: rows of the mixture at the site that cannot be taken over or tiled; no mixture for identity nulls.
    """
    there, identity = site.module, config.nulls == "identity"
    if identity and not isinstance(there, MoELayer):
        raise ConfigError(f'{site.path}: nulls="identity" need a mixture there; swap train.moe in first')
    if identity and site.out not in (None, site.dim):
        raise ConfigError(f"{site.path} makes {site.out} values of {site.dim}; an identity cannot be added to them")
    if isinstance(there, MoELayer) and isinstance(there.combine, WithIdentity) != identity:
        old = there.combine
        combine = old.inner if isinstance(old, WithIdentity) else WithIdentity(old)
        ready = dataclasses.replace(site, module=_mixture(there, there.router, combine))
        # Made through the registry, so that surgery knows how to make the router again.
        return _mixture(there, method("train.adamoe").build(ready, config, shared), combine)
    warn_if_dead(config.top_k, True, "train.adamoe")
    router = NullTopK(site.dim, config)
    if isinstance(there, MoELayer):
        _inherit(router, site, there.router)
    return router


CARD = MethodCard(
    title="AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models",
    year=2024,
    arxiv="2406.13233",
    paper="adamoe",
    summary="Null experts that cost nothing: top-k over more choices, fewer experts where a token needs fewer.",
    taxonomy="gating/sparse/token-choice/null-experts",
    deviations=(
        "weights come from a softmax over the chosen experts' logits, which equals dividing their probabilities",
        "identity nulls are an option; the paper leaves them open",
    ),
)
