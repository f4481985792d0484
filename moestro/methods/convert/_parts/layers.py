"""Which layers a conversion is about, and the mixture that stands there afterwards."""

from typing import Any

from moestro.core.errors import ConfigError
from moestro.core.inputs import LayerShape
from moestro.core.plan import MethodUse
from moestro.core.registry import method
from moestro.surgery.choice import Layers, choose


__all__ = ["Layers", "choose", "mixture", "router_use"]


def router_use(use: MethodUse, top_k: int) -> dict[str, Any]:
    """A router and its settings, with ``top_k`` filled in where it has such a setting.

    Raises:
        ConfigError: the router's own settings name another top_k, or it chooses one expert and more were asked for.
    """
    config = dict(use.config)
    if "top_k" in method(use.method).config_type.model_fields:
        if config.setdefault("top_k", top_k) != top_k:
            raise ConfigError(f"top_k={top_k}, but router.config.top_k={config['top_k']}; give one of them")
    elif top_k != 1:
        raise ConfigError(f"top_k={top_k}, but {use.method} has no such setting; give top_k=1")
    return {"method": use.method, "config": config}


def mixture(
    there: LayerShape, num_experts: int, inner: int, router: dict[str, Any], losses: dict[str, MethodUse], shared: int
) -> MethodUse:
    """``train.moe`` for a site whose feed-forward has the form of ``there``."""
    config: dict[str, Any] = {
        "num_experts": num_experts,
        "expert_size": inner,
        "activation": there.activation,
        "gated": there.gated,
        "bias": there.bias,
        "router": router,
        "losses": {name: use.model_dump(mode="json") for name, use in losses.items()},
    }
    return MethodUse(method="train.moe", config={**config, "shared": shared} if shared else config)
