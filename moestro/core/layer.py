"""The mixture layer: scores, edits, choose, edits, emit, pre, dispatch, bank, combine, post."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.context import RoutingContext, layer_context
from moestro.core.cost import Work, cost, over_experts
from moestro.core.dispatch import Dispatcher, LocalDispatcher
from moestro.core.errors import ConfigError, ContextError
from moestro.core.losses import RoutingLoss
from moestro.core.router import Router
from moestro.core.routing import Routing


Combine = Callable[[Tensor, Tensor | None, Tensor, Routing], Tensor]


def add_shared(routed_TO: Tensor, shared_TO: Tensor | None, x_TD: Tensor, routing: Routing) -> Tensor:
    """The usual combine: the routed branch plus the shared one."""
    return routed_TO if shared_TO is None else routed_TO + shared_TO


def emit(site: str, routing: Routing, ctx: RoutingContext, losses: nn.ModuleDict | None = None) -> None:
    """Tell the world what a site decided: recorders, losses, counts. Every module that routes calls it once a Routing.

    Nothing is recorded in a replay; losses run again there (a replay must do the same operations) and are dropped.
    """
    session = ctx.session
    if not ctx.replaying:
        ctx.routings[site] = routing if session.collect else None
        for recorder in session.recorders:
            recorder.record(site, routing, ctx)
    if session.collect and losses:
        for name, loss in losses.items():
            assert isinstance(loss, RoutingLoss)
            ctx.add_loss(site, name, loss(site, routing, ctx), loss.unit)


class MoELayer(nn.Module):
    """A mixture at a site: takes and returns what the module it replaced did.

    Args:
        router, bank: siblings with the same number of experts.
        site: the module path the layer stands at; names its losses, records and slots.
        shared: a module every token runs through, or None.
        combine: joins the branches; a function or a module, called with (routed [T, O], shared [T, O] or None,
            x [T, D], the routing with nulls).
        pre, post: projections of the routed branch only; router and shared branch see the site's input.
        noise: changes the site's input for router and routed branch alike (input jitter while training).
        losses: name -> RoutingLoss.

    Raises:
        ConfigError: router and bank disagree on the number of experts.
    """

    is_mixture = True

    def __init__(
        self,
        router: Router,
        bank: Bank,
        *,
        site: str,
        shared: nn.Module | None = None,
        dispatcher: Dispatcher | None = None,
        combine: Combine = add_shared,
        pre: nn.Module | None = None,
        post: nn.Module | None = None,
        noise: nn.Module | None = None,
        losses: Mapping[str, RoutingLoss] | None = None,
    ) -> None:
        super().__init__()
        if dispatcher is None and router.num_experts != bank.num_experts:
            raise ConfigError(
                f"{site or 'layer'}: the router chooses among {router.num_experts} experts but the bank holds "
                f"{bank.num_experts}"
            )
        self.site = site
        self.router = router
        self.bank = bank
        self.dispatcher = dispatcher or LocalDispatcher()
        self.shared = shared
        self.combine = combine
        self.pre = pre
        self.post = post
        self.noise = noise
        self.losses = nn.ModuleDict(losses or {})

    def around(self, router: Router, bank: Bank) -> "MoELayer":
        """Other experts under a router, with all that surrounds those of this layer."""
        layer = MoELayer(
            router,
            bank,
            site=self.site,
            shared=self.shared,
            combine=self.combine,
            pre=self.pre,
            post=self.post,
            noise=self.noise,
        )
        layer.losses = self.losses
        layer.dispatcher = self.dispatcher
        return layer

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden: Tensor) -> Tensor:
        """Mixture output [..., O] of hidden states [..., D]."""
        with layer_context(hidden, self.training) as ctx:
            x_TD = hidden.reshape(-1, hidden.shape[-1])
            routed_by = x_TD if self.noise is None else self.noise(x_TD)
            ctx.keep(self.site, "input", x_TD)
            routing = self.route(routed_by, ctx)
            routed_TO = self.run_experts(routed_by, routing)
            shared_TO = None if self.shared is None else self.shared(x_TD)
            y_TO = self.combine(routed_TO, shared_TO, x_TD, routing)
            ctx.keep(self.site, "output", y_TO)
            return y_TO.view(*hidden.shape[:-1], y_TO.shape[-1])

    def route(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        """Scores, edits, choice, edits; emits and returns the routing."""
        edits = ctx.session.edits
        scores = self.router.score(x_TD, self.bank, ctx)
        for edit in edits:
            scores = edit.on_scores(self.site, scores, ctx)
        routing = self.router.choose(scores, ctx)
        for edit in edits:
            routing = edit.on_routing(self.site, routing, self.router, ctx)
        if routing.num_tokens != x_TD.shape[0]:
            raise ContextError(f"{self.site}: routing for {routing.num_tokens} tokens, the layer got {x_TD.shape[0]}")
        emit(self.site, routing, ctx, self.losses)
        return routing

    def run_experts(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The routed branch [T, O]: pre, dispatch, bank, combine of the dispatcher, post."""
        narrow = x_TD if self.pre is None else self.pre(x_TD)
        work = routing.real() if self.bank.takes == "real" else routing
        rows, local, handle = self.dispatcher.dispatch(narrow, work)
        y = self.dispatcher.combine(self.bank(rows, local), handle)
        return y if self.post is None else self.post(y)

    def flops_per_token(self, work: Work) -> float:
        """Operations of a forward for one token: the rows that experts compute, and all parts but the bank in full."""
        each = [self.bank.flops_per_row(expert) for expert in range(self.bank.num_experts)]
        routed = over_experts(work.rows_of(self.site, self.router), each)
        return routed + sum(cost(part, work) for part in self.children() if part is not self.bank)

    def after_step(self, load_C: Tensor) -> None:
        """Pass the optimiser step's counts on to the router."""
        self.router.after_step(load_C)


def mixture_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The mixture layers of a model by site, in order of definition."""
    return {module.site: module for module in model.modules() if isinstance(module, MoELayer)}
