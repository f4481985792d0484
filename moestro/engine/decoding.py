"""A decoder's routes as a forward understands them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moestro.core.decoding import Route
from moestro.core.errors import ConfigError
from moestro.engine.kernels.interface import Floats, Ints, Router
from moestro.engine.sequences import Forward


# (layer, logits [r, E], ids [r, k], weights [r, k]) of some rows -> other ids and weights; -1: no expert.
Override = Callable[[int, Floats, Ints, Floats], tuple[Ints, Floats]]


def route_index(forward: Forward, route: Route | None) -> int:
    """The index of a route in the forward's ``overrides``, added there if it is new; 0 is the model's own.

    Raises:
        ConfigError: the model has too few experts, or the forward follows no other routes.
    """
    if route is None:
        return 0
    known: dict[Route, int] = forward.__dict__.setdefault("_route_indices", {})
    if route not in known:
        route.fits(forward.experts)
        overrides: list[Any] | None = getattr(forward, "overrides", None)
        if overrides is None:
            raise ConfigError(f"this model cannot follow the route {route}: its forward has no overrides")
        make: Callable[[Route], Any] | None = getattr(forward, "override", None)
        if make is None:
            routers = [layer.router for layer in forward.description.layers]  # type: ignore[attr-defined]
            made: Any = override_of(route, routers, lambda: forward.asked)  # type: ignore[attr-defined]
        else:
            made = make(route)
        overrides.append(made)
        known[route] = len(overrides) - 1
    return known[route]


def override_of(
    route: Route, routers: Sequence[Router | None], positions: Callable[[], Ints] | None = None
) -> Override:
    """A route over the native router dialects: chosen from a layer's logits by the same rule with another k.

    ``positions`` gives those of the rows that are asked for, for routes that look at them.
    """

    def follow(layer: int, logits: Floats, ids: Ints, weights: Floats) -> tuple[Ints, Floats]:
        router = routers[layer]
        if router is None or (route.layers is not None and layer not in route.layers):
            return ids, weights
        if route.kind == "ratio":
            early = positions() < route.first if route.first and positions is not None else None
            return thinned(route.ratios_of(layer, ids.shape[1]), router, ids, weights, early)
        return chosen(route, router, logits)

    if route.kind == "ratio":  # the kernels can do it themselves
        ranks = max((router.top_k for router in routers if router is not None), default=1)
        taken = [route.layers is None or layer in route.layers for layer in range(len(routers))]
        found = [route.ratios_of(layer, ranks) * np.float32(taken[layer]) for layer in range(len(routers))]
        follow.ratios = np.ascontiguousarray(found, dtype=np.float32)  # type: ignore[attr-defined]
        follow.first = route.first  # type: ignore[attr-defined]
    return follow


def thinned(
    ratios: Floats, router: Router, ids: Ints, weights: Floats, spared: npt.NDArray[np.bool_] | None = None
) -> tuple[Ints, Floats]:
    """A choice without the experts of rank r that weigh less than ``ratios[r]`` times the first; -1 stands for them.

    Rows that lose some weigh the others as the router would; all others stay as they are, to the last bit.
    """
    drop = weights < ratios * weights[:, :1]
    if spared is not None:
        drop &= ~spared[:, None]
    if not drop.any():
        return ids, weights
    kept = np.where(drop, np.float32(0), weights)
    if router.renormalise or router.kind == "topk_softmax":
        again = _summing(kept) * np.float32(router.scale)
        kept = np.where(drop.any(-1, keepdims=True), again, kept)
    return np.where(drop, np.int32(-1), ids), kept.astype(np.float32)


def chosen(route: Route, router: Router, logits: Floats) -> tuple[Ints, Floats]:
    """Logits [r, E] -> ids int32 [r, k], weights float32 [r, k] by the route.

    What is ranked and what weighs follow the router (sigmoids, selection bias, groups); a group's closed experts may
    come up when k reaches beyond the open ones.
    """
    from moestro.engine.kernels.twin import choose

    if route.kind == "topk":
        ids, weights = choose(replace(router, top_k=route.k), logits)
        return ids.astype(np.int32), _summing(weights) if route.weight == "one" else weights
    experts = logits.shape[1]
    raw = replace(router, renormalise=False, scale=1.0)
    deepest = {"rank": route.k, "random": experts, "threshold": experts}[route.kind]
    ids, gates = choose(replace(raw, top_k=deepest), logits)
    if route.kind == "rank":
        ids, gates = ids[:, -1:], gates[:, -1:]
    elif route.kind == "random":
        # A number of the row itself: the same row goes to the same expert, whatever runs beside it.
        at = np.array([[hash_of(row) % experts] for row in ids])
        gates = np.take_along_axis(gates, np.argsort(ids, axis=-1), axis=-1)
        ids, gates = at, np.take_along_axis(gates, at, axis=-1)
    else:
        share = gates / gates.sum(-1, keepdims=True)
        before = np.cumsum(share, axis=-1) - share
        ids = np.where(before < route.threshold, ids, -1)
        gates = np.where(ids >= 0, gates, 0)
        width = int((ids >= 0).sum(-1).max())
        ids, gates = ids[:, :width], gates[:, :width]
    if route.weight == "one" or router.renormalise or router.kind == "topk_softmax":
        gates = _summing(gates)
    scale = np.float32(1.0 if route.weight == "one" else router.scale)
    return ids.astype(np.int32), (gates * scale).astype(np.float32)


def _summing(weights: Floats) -> Floats:
    return np.asarray(weights / weights.sum(-1, keepdims=True), dtype=np.float32)


def hash_of(ranking: npt.ArrayLike) -> int:
    """A well mixed number of a row's experts in order, which last bits of scores do not change."""
    ids = np.ascontiguousarray(ranking, dtype=np.int32)
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")
