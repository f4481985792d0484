"""Mixture of depths: a router lets some tokens through a decoder block, the others skip it.

    g = sigmoid(x w^T), w [1, D];   the k = capacity b of the batch's b valid tokens with the largest x w^T go through
    y = x + g B(x) for them, y = x for the others

where B(x) is what the block adds to its input, attention and feed-forward (and a mixture there: depth comes before any
choice of experts). Attention runs among the chosen tokens of a row, at their original positions. k is rounded to an
integer, at least 1: the work of a batch is fixed, up to padding of rows to the one with most chosen tokens.

At an ``mlp`` site the same for the feed-forward alone: y = g FFN(x) or 0, and the block around adds x.

The choice reads the whole batch. An auxiliary router learns it, see ``_parts/batch_choice.py``, and ``train.moma`` for
the phases; with it evaluation and decoding take a token iff a(x) > threshold. The cache then keeps a place for every
position, so that positions stay what they were; places of skipped tokens are masked, and no memory is saved. A step in
which no row takes the block skips it.

Every second layer: ``swaps: [{sites: block, layers: [0, 2, 4], method: train.mixture_of_depths}]``, after the swaps of
what stands inside the blocks.

Source: MoMa (2407.21770, the part on depth routing) after Mixture-of-Depths (2404.02258).
"""

import dataclasses
import inspect
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.cache import cache_state
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext, layer_context
from moestro.core.cost import Work, cost
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import emit
from moestro.core.router import LinearRouter, topk_indices
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.batch_choice import (
    AUXILIARY,
    AuxiliaryRouters,
    Picked,
    SelectionLoss,
    Spread,
    chooses_over_batch,
    whole_share,
)


CACHE, MASK = "past_key_values", "attention_mask"
BY_POSITION = ("position_ids", "position_embeddings")


class Config(BaseConfig):
    """Settings.

    Attributes:
        capacity: share of the batch's tokens that go through. threshold: of the auxiliary router's answer, or
            ``calibrated``. bottleneck: its inner width, None for D / 2. allow_noncausal: without a trained auxiliary
            router let a prompt through with a cache; decoding stays refused.
    """

    capacity: float = Field(default=0.25, gt=0, le=1)
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["calibrated"] = 0.5
    bottleneck: int | None = Field(default=None, ge=1)
    allow_noncausal: bool = False


class DepthRouter(LinearRouter):
    """The router: one choice, the block. Parameters: ``weight`` [1, D]; ``auxiliary``."""

    causal = False

    def __init__(self, dim: int, config: Config, site: str) -> None:
        super().__init__(dim, 1, top_k=None)
        self.config, self.site = config, site
        self.auxiliary = AuxiliaryRouters(dim, (1,), config.bottleneck, config.threshold)

    def over_batch(self, ctx: RoutingContext) -> bool:
        """Whether the best tokens of the batch are taken; else the auxiliary router says which."""
        return chooses_over_batch(self.auxiliary, self.members(ctx), self.config.allow_noncausal, self.site, ctx)

    def members(self, ctx: RoutingContext) -> tuple[Tensor]:
        """The valid tokens, int64."""
        assert ctx.tokens is not None
        return (ctx.tokens.valid_T.nonzero().squeeze(1),)

    def score(self, x_TD: Tensor, bank: Bank | None, ctx: RoutingContext) -> Scores:
        """See Router; the bank is not looked at."""
        logits_TC = self.logits(x_TD)
        gate_TC = logits_TC.sigmoid()
        select_TC, members = logits_TC, self.members(ctx)
        if self.training and ctx.value(AUXILIARY, 1.0):
            ctx.put(self.site, AUXILIARY, self.auxiliary(x_TD, members))
        if not self.over_batch(ctx):
            select_TC = self.auxiliary(x_TD, members) - self.auxiliary.threshold.float()
        return Scores(logits_TC, select_TC.detach(), gate_TC)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        whole = self.over_batch(ctx)
        chosen_TC = scores.select_TC > 0
        if whole:
            (index_M,) = self.members(ctx)
            count = whole_share(len(index_M), Fraction(str(self.config.capacity)))
            best_X = topk_indices(scores.select_TC[index_M].T, count)[0]
            chosen_TC = torch.zeros_like(chosen_TC)
            chosen_TC[index_M[best_X]] = True
            chosen_TC &= scores.select_TC > float("-inf")
        return Routing.from_mask(chosen_TC, scores.gate_TC, num_experts=1, scores=scores, causal=not whole)

    def real_per_token(self, length: int) -> float | None:
        """See Router; over a batch, whose size is not known here, it is not rounded."""
        return self.config.capacity


class MixtureOfDepths(nn.Module):
    """The block with its router.

    Args:
        inner: the block, or the feed-forward. branch: it returns what is added, not the sum (a feed-forward).
        layer: the block's place in caches.
    """

    causal = False

    def __init__(self, router: DepthRouter, inner: nn.Module, *, site: str, branch: bool, layer: int | None) -> None:
        super().__init__()
        self.site, self.branch, self.layer = site, branch, layer
        self.router, self.inner = router, inner
        self.losses = nn.ModuleDict({AUXILIARY: SelectionLoss(router.auxiliary)})
        self.looks_back = any(getattr(part, "is_causal", False) is True for part in inner.modules())
        self.signature = inspect.signature(inner.forward)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the block that models look at."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(super().__getattr__("inner"), name)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states [B, S, D] of a block's call, or [..., D] of a feed-forward's.

        Raises:
            ContextError: the call holds something that cannot be cut to the chosen tokens, or a cache that is not
                dynamic; or what the router raises.
        """
        with layer_context(hidden, self.training) as ctx:
            flat_TD = hidden.reshape(-1, hidden.shape[-1])
            routing = self.route(flat_TD, ctx)
            weight_T = flat_TD.new_zeros(len(flat_TD)).index_add(0, routing.token_N, routing.weight_N.to(flat_TD))
            chosen_T = torch.bincount(routing.token_N, minlength=len(flat_TD)) > 0
            if self.branch:
                index_X = chosen_T.nonzero().squeeze(1)
                with ctx.subset(index_X):
                    y_XO: Tensor = self.inner(flat_TD[index_X])
                out = y_XO.new_zeros(len(flat_TD), y_XO.shape[-1])
                return out.index_add(0, index_X, weight_T[index_X, None] * y_XO).view(*hidden.shape[:-1], -1)
            call = self.named(hidden, *args, **kwargs)
            return self.through(flat_TD, weight_T, chosen_T.view(hidden.shape[:2]), call, ctx)

    def named(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of a block's call by name, without the hidden states."""
        call = self.signature.bind(*args, **kwargs).arguments
        kinds = {name: parameter.kind for name, parameter in self.signature.parameters.items()}
        more = {name: call.pop(name) for name in list(call) if kinds[name] is inspect.Parameter.VAR_KEYWORD}
        return {**dict(list(call.items())[1:]), **{k: v for rest in more.values() for k, v in rest.items()}}

    def route(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        """Scores, edits, choice, edits; emits and returns the routing."""
        scores = self.router.score(x_TD, None, ctx)
        for edit in ctx.session.edits:
            scores = edit.on_scores(self.site, scores, ctx)
        routing = self.router.choose(scores, ctx)
        for edit in ctx.session.edits:
            routing = edit.on_routing(self.site, routing, self.router, ctx)
        emit(self.site, routing, ctx, self.losses)
        return routing

    def through(
        self, flat_TD: Tensor, weight_T: Tensor, chosen_BS: Tensor, call: dict[str, Any], ctx: RoutingContext
    ) -> Tensor:
        """Run the block on the chosen tokens of a call; the hidden states [B, S, D] after it."""
        past, idle = call.get(CACHE), not bool(chosen_BS.any())
        shape = (*chosen_BS.shape, flat_TD.shape[1])
        if past is None and idle:
            return flat_TD.view(shape)
        picked = Picked.of(chosen_BS, least=int(past is not None))
        check_call(call, self.site)
        if past is None:
            call[MASK] = self.mask(picked, chosen_BS, call.get(MASK))
        else:
            key_BL = self.keys(chosen_BS, past, ctx)
            if idle and self.skip(past, chosen_BS):
                return flat_TD.view(shape)
            cached = key_BL.shape[1] - picked.width
            call[MASK] = picked.mask(call.get(MASK), key_BL, cached, self.looks_back)
            call[CACHE] = Spread(past, picked)
        call |= {name: picked.take(call[name]) for name in BY_POSITION if call.get(name) is not None}
        index_X, real_X = picked.token_X, picked.real_BM.reshape(-1)
        x_XD = flat_TD[index_X]
        with ctx.subset(index_X):
            assert ctx.tokens is not None
            ctx.tokens = dataclasses.replace(ctx.tokens, valid_T=ctx.tokens.valid_T & real_X)
            y_XD = self.inner(x_XD.view(*picked.place_BM.shape, -1), **call).reshape(x_XD.shape)
        added_XD = weight_T[index_X, None] * (y_XD - x_XD)
        return flat_TD.index_add(0, index_X[real_X], added_XD[real_X]).view(shape)

    def mask(self, picked: Picked, chosen_BS: Tensor, given: Tensor | None) -> Tensor | None:
        """The mask among the slots, [B, 1 or H, M, M]; None where none was given and none is needed."""
        if given is None and (self.looks_back or bool(picked.real_BM.all())):
            return None  # slots that were filled up come last: nobody looks ahead at them
        rows_BHML = picked.mask(given, chosen_BS, 0, self.looks_back)
        index = picked.place_BM[:, None, None, :].expand(*rows_BHML.shape[:3], -1)
        return rows_BHML.gather(3, index)

    def keys(self, chosen_BS: Tensor, past: Any, ctx: RoutingContext) -> Tensor:
        """Which positions have a key in this layer's cache after this forward, bool [B, L]; kept with the cache."""
        assert ctx.tokens is not None
        there = past.layers[self.layer] if self.layer is not None and len(past.layers) > self.layer else None
        if getattr(there, "is_sliding", False) or getattr(there, "is_compileable", False):
            raise ContextError(
                f"{self.site}: {type(there).__name__} keeps no place for each position; use DynamicCache"
            )
        state, name, cached = cache_state(past), f"{self.site}.keys", ctx.tokens.cached
        before_BL = state.get(name, chosen_BS[:, :0])[:, :cached]  # shorter if the cache was cropped
        if before_BL.shape[1] < cached:
            raise ContextError(f"{self.site}: the cache holds {cached} positions that did not come through this layer")
        state[name] = torch.cat([before_BL, chosen_BS], dim=1)
        return state[name]

    def skip(self, past: Any, chosen_BS: Tensor) -> bool:
        """Keep empty places in the cache for a step that nobody takes; False if its shape is not known yet."""
        there = past.layers[self.layer] if self.layer is not None and len(past.layers) > self.layer else None
        if there is None or not there.is_initialized:
            return False
        parts = [
            part.new_zeros(*part.shape[:2], chosen_BS.shape[1], part.shape[3]) for part in (there.keys, there.values)
        ]
        past.update(*parts, self.layer)
        return True

    def flops_per_token(self, work: Work) -> float:
        """Operations for one token: the router, and the block for a share of the tokens, among as many."""
        share = work.rows_of(self.site, self.router)[0]
        inside = dataclasses.replace(work, length=max(1, round(share * work.length)))
        return cost(self.router, work) + share * cost(self.inner, work if self.branch else inside)


def check_call(call: Mapping[str, Any], site: str) -> None:
    """Raise ContextError for a call of a block that cannot be cut to some of its tokens."""
    known = {MASK, CACHE, *BY_POSITION}
    odd = [name for name, value in call.items() if name not in known and isinstance(value, Tensor | tuple | list)]
    if odd:
        raise ContextError(f"{site}: the block is called with {odd[0]}, which depth routing cannot cut to some tokens")
    mask = call.get(MASK)
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
        raise ContextError(f"{site}: depth routing needs a 4-D attention mask; use attn_implementation sdpa or eager")


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The block or the feed-forward at the site, with a router before it.

    Raises:
        ConfigError: a site of another kind, a mixture at an mlp site, or a block of an encoder-decoder.
    """
    if site.kind not in ("block", "mlp"):
        raise ConfigError(f"{site.path}: tokens can pass by a block or an mlp, not by a site of kind {site.kind}")
    if site.kind == "mlp" and any(getattr(part, "is_mixture", False) for part in site.module.modules()):
        raise ConfigError(f"{site.path}: a mixture stands there, whose name the router would share; use kind block")
    if site.kind == "block" and getattr(site.model_config, "is_encoder_decoder", False):
        raise ConfigError(f"{site.path}: blocks of an encoder-decoder attend to another stack; use kind mlp")
    router = DepthRouter(site.dim, config, site.path)
    return MixtureOfDepths(router, site.module, site=site.path, branch=site.kind == "mlp", layer=site.layer)


CARD = MethodCard(
    title="MoMa: Efficient Early-Fusion Pre-training with Mixture of Modality-Aware Experts",
    year=2024,
    arxiv="2407.21770",
    paper="moma",
    summary="A router lets a share of the batch's tokens through a decoder block; the others skip it.",
    taxonomy="derivatives/mixture-of-depths",
    deviations=(
        "how a chosen token's output is scaled is not written in MoMa: g times what the block adds, as in 2404.02258",
        "rows are filled up to the one with most chosen tokens, so attention's projections also run on the filling",
        "the cache keeps masked places for skipped tokens: positions stay, no memory is saved",
        "generation without a cache looks like evaluation and is not refused",
    ),
    causal=False,
)
