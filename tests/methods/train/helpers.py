"""What the router tests share: a site, a context, a layer."""

import torch
from torch import Tensor, nn

from moestro.core.bank import StackedFFN
from moestro.core.context import RoutingContext
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.router import Router
from moestro.core.routing import Routing
from moestro.core.session import Session
from moestro.core.site import Shared, Site
from moestro.core.tokens import Tokens


DIM = 6


def site(dim: int = DIM, **more: object) -> Site:
    return Site(path="block.mlp", kind="mlp", module=nn.Identity(), dim=dim, **more)


def build(method_id: str, **config: object) -> nn.Module:
    torch.manual_seed(0)
    use = method(method_id)
    built = use.build(site(), use.configure(config), Shared())
    assert isinstance(built, nn.Module)
    return built


def tokens(rows: int, width: int, *, valid: list[bool] | None = None, ids: Tensor | None = None) -> Tokens:
    return Tokens(
        torch.arange(rows).repeat_interleave(width),
        torch.arange(width).repeat(rows),
        torch.ones(rows * width, dtype=torch.bool) if valid is None else torch.tensor(valid),
        ids,
        rows,
        width,
    )


def context(rows: int, width: int, *, session: Session | None = None, **more: object) -> RoutingContext:
    return RoutingContext("test", session or Session(), tokens(rows, width, **more))


def route(router: Router, x_TD: Tensor, ctx: RoutingContext) -> Routing:
    return router.choose(router.score(x_TD, StackedFFN(router.num_experts, x_TD.shape[1], 4), ctx), ctx)


def layer(router: Router, **more: object) -> MoELayer:
    torch.manual_seed(1)
    return MoELayer(router, StackedFFN(router.num_experts, DIM, 4), site="block.mlp", **more)
