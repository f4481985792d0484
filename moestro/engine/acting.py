"""Who decides what while a model is served: methods of the stage serve, checked before anything is loaded."""

from typing import Any, Final

from moestro.core.batching import Batcher
from moestro.core.decoding import PLAIN, Decoder
from moestro.core.errors import ConfigError
from moestro.core.expert_cache import DEFAULT_POLICY, CachePolicy
from moestro.core.forecast import Forecast
from moestro.core.plan import MethodUse, ServingPlan
from moestro.core.registry import MethodInfo, infos, method
from moestro.engine.dialect import ModelSpec


POLICY: Final = MethodUse(method=DEFAULT_POLICY)
"""Who leaves memory where nobody says."""

NOTHING: Final = "none"
"""In place of a forecast: nothing is read ahead."""

_RETURNS: Final = {"policy": "CachePolicy", "order": "Batcher", "decoder": "Decoder"}


def check_use(role: str, use: MethodUse) -> None:
    """Check that a method can act as ``policy``, ``forecast``, ``order`` or ``decoder``, with its settings.

    Raises:
        ConfigError: it cannot; says which can.
    """
    if role == "forecast" and use == MethodUse(method=NOTHING):
        return

    def fits(info: MethodInfo) -> bool:
        return "forecast" in info.entries if role == "forecast" else info.acts == _RETURNS[role]

    if use.method not in infos() or not fits(infos()[use.method]):
        known = ", ".join(name for name, info in infos().items() if fits(info))
        known += f", {NOTHING}" if role == "forecast" else ""
        raise ConfigError(f"{role} {use.method} is none of {known}")
    method(use.method).configure(use.config)


def check_plan(plan: ServingPlan) -> None:
    """Check every method that a plan names.

    Raises:
        ConfigError: one cannot act as what it is named for, or what is one object with the forecast has two settings.
    """
    uses = {role: getattr(plan, role) for role in ("policy", "forecast", "order", "decoder")}
    for role, use in uses.items():
        if use is not None and not (role == "order" and _schedules(plan)):
            check_use(role, use)
    forecast = uses["forecast"]
    for role in ("policy", "order"):
        use = uses[role]
        if use is not None and forecast is not None and use.method == forecast.method and use != forecast:
            raise ConfigError(
                f"{use.method} is {role} with {use.config} and forecast with {forecast.config}; it is one object "
                "with one set of settings"
            )


def _schedules(plan: ServingPlan) -> bool:
    """Whether the forecast of a plan is its order too: it says which texts are written first."""
    order, forecast = plan.order, plan.forecast
    if order is None or forecast is None or order.method != forecast.method or order.method not in infos():
        return False
    return hasattr(method(order.method).module, "order")


def made(role: str, use: MethodUse) -> Any:
    """What a method makes."""
    found = method(use.method)
    return found.entry("forecast" if role == "forecast" else "policy")(found.configure(use.config))


def cache_and_forecast(policy: MethodUse, forecast: MethodUse | None) -> tuple[CachePolicy, Forecast | None]:
    """Who leaves the cache, and what is read ahead; one object where both are the same method.

    Raises:
        RegistryError: no such method, or it is not of that kind.
    """
    foresees: Forecast | None = None if forecast is None else made("forecast", forecast)
    both = getattr(foresees, "policy", None)
    if forecast is not None and policy.method == forecast.method and both is not None:
        return both, foresees
    return made("policy", policy), foresees


def forecast_for(model: ModelSpec, asked: MethodUse | None) -> MethodUse | None:
    """What says which experts of a model to read ahead: as asked, else what its routers allow.

    A pre-gated model has decided already; what reads hidden states can be asked ahead of time; routers of token ids
    tell the cache's policy instead.
    """
    if asked is not None:
        return None if asked.method == NOTHING else asked
    routers = [layer.router for layer in model.layers if layer.router is not None]
    if any(router.ahead for router in routers):
        return MethodUse(method="serve.pre_gated")
    if model.token_router is not None or not routers:
        return None
    return MethodUse(method="serve.next_gate")


def batcher_of(plan: ServingPlan) -> Batcher | None:
    """What runs together, by a plan."""
    found: Batcher | None = None if plan.order is None or _schedules(plan) else made("order", plan.order)
    return found


def order_of(plan: ServingPlan, forward: Any) -> tuple[Any, int | None]:
    """(which texts are written first, how many in a step) where a plan's forecast says it too; else (None, None).

    With all experts in memory nothing is foreseen, and texts are written as they come.
    """
    forecast = getattr(forward, "forecast", None)
    if forecast is None or not _schedules(plan):
        return None, None
    return forecast.order, forecast.width


def decoder_of(plan: ServingPlan) -> Decoder:
    """How logits become a choice where a request does not say, by a plan."""
    found: Decoder = PLAIN if plan.decoder is None else made("decoder", plan.decoder)
    return found


def check_ready(forecast: Forecast, model: ModelSpec) -> None:
    """Check that a forecast could serve a model, as it is now.

    Raises:
        ConfigError: nobody has taught it, or on another model.
    """
    choices = [0 if layer.router is None else layer.router.top_k for layer in model.layers]
    forecast.ready([layer.experts for layer in model.layers], choices)


def as_use(value: str | MethodUse) -> MethodUse:
    """A method by id, without settings, or as it is."""
    return MethodUse(method=value) if isinstance(value, str) else value
