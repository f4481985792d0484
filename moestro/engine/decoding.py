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
            made: Any = Follow(route, routers, lambda: forward.asked)  # type: ignore[attr-defined]
        else:
            made = make(route)
        overrides.append(made)
        known[route] = len(overrides) - 1
    return known[route]


class Follow:
    """A route over the native router dialects: chosen from a layer's logits by the same rule with another k.

    Args:
        routers: of each layer, None where nothing is ranked. positions: gives those of the rows that are asked for, for
            routes that look at them.

    Attributes:
        ratios: float32 [layers, ranks], what ``Route.ratios_of`` says of each layer that follows a route by ratios, so
            that kernels can leave the experts out themselves; None for other routes. first: see ``Route``.

    Raises:
        ConfigError: the first positions shall keep their experts, and nobody says where a row stands.
    """

    def __init__(
        self, route: Route, routers: Sequence[Router | None], positions: Callable[[], Ints] | None = None
    ) -> None:
        if route.first and positions is None:
            raise ConfigError(f"route {route} spares the first {route.first} positions, but rows come without theirs")
        self.route, self.routers, self.positions = route, routers, positions
        self.first, self.ratios = route.first, self._ratios() if route.kind == "ratio" else None

    def _ratios(self) -> Floats:
        ranks = max((router.top_k for router in self.routers if router is not None), default=1)
        rows = [self.route.ratios_of(layer, ranks) * self._applies(layer) for layer in range(len(self.routers))]
        return np.ascontiguousarray(rows, dtype=np.float32)

    def _applies(self, layer: int) -> bool:
        return self.route.layers is None or layer in self.route.layers

    def __call__(self, layer: int, logits: Floats, ids: Ints, weights: Floats) -> tuple[Ints, Floats]:
        """See ``Override``."""
        router = self.routers[layer]
        if router is None or not self._applies(layer):
            return ids, weights
        if self.route.kind != "ratio":
            return chosen(self.route, router, logits)
        early = self.positions() < self.first if self.positions is not None and self.first else None
        return thinned(self.route.ratios_of(layer, ids.shape[1]), router, ids, weights, early)


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
