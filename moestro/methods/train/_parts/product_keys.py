"""Product keys: two small routers whose scores multiply, so that n + n logits choose among n^2 experts.

    z = x W^T [H, n], float32, one W an axis;  keep i where z^_hi >= min(max_i z^_hi, sigma), P(N(0, 1) > sigma) = k / n
    g_h = softmax of z_h over the kept

with z^ normalised over all tokens and choices of a head: in training by the batch (padding left out), in evaluation by
running averages, so that a token then goes its way whatever stands beside it. About k of n are kept, at least one; no
sort is needed.
"""

from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.router import LinearRouter
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site


AXES = ("first", "second")
MOMENTUM, EPS = 0.1, 1e-5  # of the running averages, and of the variance


def threshold(axis: int, top_k: int) -> float:
    """sigma that a standard normal exceeds with probability k / n."""
    return float("-inf") if top_k == axis else NormalDist().inv_cdf(1 - top_k / axis)


def keep(normal_THC: Tensor, sigma: float) -> Tensor:
    """Which choices a head keeps, bool: above sigma, or its best ones when none is; never one at -inf."""
    return (normal_THC >= normal_THC.amax(-1, keepdim=True).clamp(max=sigma)) & (normal_THC > float("-inf"))


class AxisRouter(LinearRouter):
    """The router of one axis: C = H n choices, each head choosing among its n.

    Buffers ``mean`` and ``variance`` [H], float32 whatever the model's type.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, dim: int, axis: int, heads: int, top_k: int) -> None:
        super().__init__(dim, heads * axis, top_k=None)
        self.heads = heads
        self.sigma = threshold(axis, top_k)
        self.register_buffer("mean", torch.zeros(heads, dtype=torch.float32))
        self.register_buffer("variance", torch.ones(heads, dtype=torch.float32))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Move like any module, but keep the averages exact."""
        exact = self.mean, self.variance
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.mean.dtype != torch.float32:
            self.mean, self.variance = (buffer.to(self.mean.device) for buffer in exact)
        return self

    def score(self, x_TD: Tensor, bank: Any, ctx: RoutingContext) -> Scores:
        """See Router; reads no bank."""
        logits_TC = self.logits(x_TD)
        z_THC = logits_TC.view(len(x_TD), self.heads, -1)
        normal_THC = self.normalise(z_THC.detach(), ctx)
        prob_THC = z_THC.softmax(-1) / self.heads
        return Scores(logits_TC, normal_THC.flatten(1), logits_TC, prob_THC.flatten(1))

    @torch.no_grad()
    def normalise(self, z_THC: Tensor, ctx: RoutingContext) -> Tensor:
        """z^; in training the running averages move too, except in a replay."""
        assert ctx.tokens is not None
        mean, variance = self.mean, self.variance
        valid_T = ctx.tokens.valid_T
        if self.training and valid_T.any():
            live_THC = z_THC if valid_T.all() else z_THC[valid_T]
            # First over what lies side by side in memory; over tokens and choices at once takes far longer.
            inner_TH, mean_TH = torch.var_mean(live_THC, -1, correction=0)
            outer, mean = torch.var_mean(mean_TH, 0, correction=0)
            variance = inner_TH.mean(0) + outer
            if not ctx.replaying:
                count = live_THC.numel() // self.heads
                self.mean.lerp_(mean, MOMENTUM)
                self.variance.lerp_(variance * (count / (count - 1)), MOMENTUM)
        return (z_THC - mean[:, None]) * (variance + EPS).rsqrt()[:, None]

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router.

        Raises:
            ContextError: edits closed all choices of a head.
        """
        shape = (len(scores.select_TC), self.heads, -1)
        kept_THC = keep(scores.select_TC.view(shape), self.sigma)
        some_TH = scores.select_TC.view(shape).amax(-1) > float("-inf")  # then the best one is kept
        if not some_TH.all():
            token, head = (~some_TH).nonzero()[0].tolist()
            raise ContextError(f"token {token} may choose nothing in routing head {head}; close fewer of its choices")
        weight_THC = scores.gate_TC.view(shape).masked_fill(~kept_THC, float("-inf")).softmax(-1)
        return Routing.from_mask(
            kept_THC.flatten(1),
            weight_THC.flatten(1),
            num_experts=self.num_experts,
            scores=scores,
            causal=not self.training,  # the statistics of a training batch come from all its tokens
        )

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """Raises ContextError: gates alone do not tell to which heads they belong."""
        raise ContextError("a choice of product keys is weighed within its head; edit the scores and choose again")


class ProductKeyRouter(nn.Module):
    """Both axes, for a group of layers of one stack: the first of ``sites`` scores, the others use its scores."""

    def __init__(self, dim: int, axis: int, heads: int, top_k: int, group_size: int) -> None:
        super().__init__()
        self.shape = (dim, axis, heads, top_k, group_size)
        self.first = AxisRouter(dim, axis, heads, top_k)
        self.second = AxisRouter(dim, axis, heads, top_k)
        self.sites: list[str] = []
        self._last: tuple[str, int | None] = ("", None)

    @property
    def axes(self) -> tuple[AxisRouter, AxisRouter]:
        """First and second."""
        return self.first, self.second

    def join(self, site: Site, shape: tuple[int, ...]) -> bool:
        """Take a site into the group, if it is routed alike, comes later in the same stack, and there is room."""
        stack = site.path if site.layer is None else site.path.partition(f".{site.layer}.")[0]
        before_stack, before = self._last
        later = before is not None and site.layer is not None and before < site.layer and before_stack == stack
        fits = shape == self.shape and len(self.sites) < shape[-1] and (later or not self.sites)
        if fits:
            self.sites.append(site.path)
            self._last = stack, site.layer
        return fits


def router_of_group(site: Site, shared: Shared, *shape: int) -> ProductKeyRouter:
    """The router of the group that a site belongs to: the last one made, or a new one where that one is full.

    Args:
        shape: dim, axis n, heads H, top_k, group_size.
    """
    known = [module for module in shared.modules.values() if isinstance(module, ProductKeyRouter)]
    if known and known[-1].join(site, shape):
        return known[-1]
    router = shared(f"product_keys_{len(known)}", lambda: ProductKeyRouter(*shape))
    if not isinstance(router, ProductKeyRouter) or not router.join(site, shape):
        raise ConfigError(f"{site.path}: the shared part product_keys_{len(known)} belongs to another method")
    return router
