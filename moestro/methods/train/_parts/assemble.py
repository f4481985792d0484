"""Parts of a layer that its settings name by method id."""

from collections.abc import Mapping
from typing import Any

from moestro.core.errors import ConfigError
from moestro.core.losses import RoutingLoss
from moestro.core.plan import MethodUse
from moestro.core.registry import method
from moestro.core.router import Router
from moestro.core.site import Shared, Site


def router_by_id(use: MethodUse, site: Site, shared: Shared, **sizes: int) -> Router:
    """The router that a layer's settings name, with the sizes that the layer decides (num_experts, perhaps top_k).

    Raises:
        ConfigError: the method builds no router, or the settings give another value for one of the sizes.
    """
    found = method(use.method)
    for name, size in sizes.items():
        given = use.config.get(name, size)
        if given != size:
            raise ConfigError(f"router.{name}={given}, but the layer has {size}; leave it out")
    router: Any = None
    if sizes.keys() <= found.config_type.model_fields.keys():
        router = found.build(site, found.configure({**use.config, **sizes}), shared)
    if not isinstance(router, Router):
        raise ConfigError(f"router={use.method!r} builds no router; choose a router method")
    return router


def losses_by_id(uses: Mapping[str, MethodUse], site: Site, shared: Shared) -> dict[str, RoutingLoss]:
    """The routing losses that a layer's settings name.

    Raises:
        ConfigError: a method builds no routing loss.
    """
    losses = {}
    for name, use in uses.items():
        found = method(use.method)
        loss = found.build(site, found.configure(use.config), shared)
        if not isinstance(loss, RoutingLoss):
            raise ConfigError(f"losses.{name}={use.method!r} builds no routing loss")
        losses[name] = loss
    return losses
