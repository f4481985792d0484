"""The forward over packed matrices: attention and routing by the kernels, experts from resident slabs or from a store.

What a step computes for a row does not depend on the other rows of the batch, on how a prompt was cut into chunks, nor
on the order in which slabs arrive: the kernels add everything in a fixed order.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError
from moestro.core.forecast import Forecast, Wish
from moestro.engine.kernels import choose
from moestro.engine.kernels.interface import LANES, Addresses, Description, Floats, Ints, Kernels
from moestro.engine.kernels.twin import ranked
from moestro.engine.token_router import TokenRouter, best


# (layer, scores [r, E], ids [r, k], weights [r, k]) of some rows -> other ids and weights [r, any]; -1: no expert.
Override = Callable[[int, Floats, Ints, Floats], tuple[Ints, Floats]]
OnRoute = Callable[[int, Ints, Floats], None]


class Rows(Protocol):
    """What a step is asked for; the scheduler's batch.

    Attributes:
        tokens, positions, rows_of: int32 [R]; ``rows_of`` indexes ``sequences`` and ``tables``. tables: int32 [S, P]
            page ids, -1 where none. want: int32 [L], rows whose logits are wanted. routes: int32 [R] index into
            ``NativeForward.overrides``, or None.
    """

    tokens: Ints
    positions: Ints
    rows_of: Ints
    sequences: Sequence[int]
    tables: Ints
    want: Ints
    routes: Ints | None


class Lease(Protocol):
    """Slabs that stay where they are until ``release``.

    Attributes:
        ids: int32 [n]. pointers: int64 [n], their addresses. ready: indices into both, in parts, as slabs arrive.
    """

    ids: Ints
    pointers: Addresses

    def ready(self) -> Iterable[npt.NDArray[np.int64]]: ...

    def release(self) -> None: ...


class Slabs(Protocol):
    """A store of experts: leases that together cover ``ids``, no more at once than it has room for."""

    def waves(self, layer: int, ids: Ints) -> Iterable[Lease]: ...

    def ahead(self, wishes: Iterable[Wish]) -> int: ...

    def cancel(self) -> int: ...


class NativeForward:
    """Forward over a description, with paged keys and values of its own.

    Args:
        pages: pages of 16 positions in the cache. store: where experts come from. slabs: layer -> addresses of all
            experts, where all are resident; exactly one of the two for a model with experts. forecast: what is asked
            of the store ahead of need. threads: None takes the processors this process may use.

    Attributes:
        overrides: routings that rows may ask for by index; index 0 is the model's own.
        asked: positions of the rows that an override is asked for, while it is.
        on_route: called with (layer, ids [R, k], weights [R, k]) of what was followed.
        gate: the router of token ids, where the model has one; it decides its layers before any runs.
        on_gate: called with the expert of every row [R] as soon as it is known. foresight: who else wants to know
            what comes (``engine.ahead.Foresight``).
    """

    page = LANES

    def __init__(
        self,
        description: Description,
        *,
        pages: int,
        store: Slabs | None = None,
        slabs: dict[int, Addresses] | None = None,
        forecast: Forecast | None = None,
        kernels: Kernels | None = None,
        threads: int | None = None,
    ) -> None:
        self.experts = tuple(layer.experts for layer in description.layers)
        if any(self.experts) and (store is None) == (slabs is None):
            raise ConfigError("a model with experts needs either a store of them or the addresses of all")
        self.kernels = kernels or choose()
        self.threads = threads or len(os.sched_getaffinity(0))
        self.steps = self.kernels.build(description, pages=pages, threads=self.threads, slabs=slabs)
        self.description = description
        self._decided = [[i for i in description.routed_at(layer) if i > layer] for layer in range(len(self.experts))]
        self.vocab, self.pages, self.layers = description.vocab, pages, len(description.layers)
        self.gate = None if description.gate is None else TokenRouter(description.gate, self.kernels, pages)
        self.page_bytes = self.steps.page_bytes + (0 if self.gate is None else self.gate.page_bytes)
        self.store = store
        self.slabs = slabs or {}
        self.forecast = None if store is None else forecast
        if self.forecast is not None:
            self.forecast.meet(self.experts)
        self.overrides: list[Override | None] = [None]
        self.on_route: OnRoute | None = None
        self.on_gate: Callable[[Ints], None] | None = None
        self.foresight: Any = None
        self._gated: Floats | None = None
        self._positions = self.asked = np.zeros(0, dtype=np.int32)

    def step(self, batch: Rows) -> Floats:
        """Logits float32 [L, vocab] of the wanted rows; keys and values of all rows are written.

        Raises:
            ValueError: ids out of range. RuntimeError: a NaN or an infinity; the message names the place.
        """
        rows = (_ints(batch.tokens), _ints(batch.positions), _ints(batch.rows_of), np.atleast_2d(_ints(batch.tables)))
        self._positions = rows[1]
        self.steps.begin(*rows)
        if self.gate is not None:
            self._gated = self.gate.step(*rows)
            if self.on_gate is not None:
                self.on_gate(best(self._gated))
        if self.forecast is not None and self.store is not None:
            self.store.cancel()  # what a step that failed has left
            self.store.ahead(self.forecast.begin(rows[0], rows[1], _ints(batch.sequences)[rows[2]]))
        overridden = batch.routes is not None and bool(np.any(batch.routes)) and not self._thinned(batch.routes)
        if self.store is None and self.gate is None and not overridden:
            self.steps.run(0, self.layers)
            if self.on_route is not None:
                for layer, count in enumerate(self.experts):
                    if count:
                        self.on_route(layer, *self.steps.chosen(layer))
        else:
            for layer, count in enumerate(self.experts):
                self.steps.attention(layer)
                if count:
                    self._experts(layer, batch.routes if overridden else None)
                self.steps.finish(layer)
        want = _ints(batch.want)
        return self.steps.logits(want) if want.size else np.zeros((0, self.vocab), dtype=np.float32)

    def _thinned(self, routes: Ints) -> bool:
        """Leave the routes of a step to the kernels, where they only leave out experts, all by the same ratios."""
        numbers = set(np.asarray(routes).tolist()) - {0}
        if len(numbers) != 1 or not hasattr(self.steps, "thin"):
            return False
        override: Any = self.overrides[numbers.pop()]
        if getattr(override, "ratios", None) is None:
            return False
        self.steps.thin(override.ratios, _ints((np.asarray(routes) > 0) & (self._positions >= override.first)))
        return True

    def _experts(self, layer: int, routes: Ints | None) -> None:
        if self._decoupled(layer):
            ids = best(self._gated)[:, None]  # type: ignore[arg-type]
            weights = np.ones(ids.shape, dtype=np.float32)
        else:
            ids, weights = self.steps.chosen(layer)
        if routes is not None:
            ids, weights = self._overridden(layer, np.asarray(routes), ids, weights)
        self.steps.routes(layer, ids, weights)
        if self.on_route is not None:
            self.on_route(layer, ids, weights)
        needed = np.unique(ids[ids >= 0]).astype(np.int32)
        if self.store is None:
            self.steps.experts(layer, needed, self.slabs[layer][needed])
            return
        foreseen = False
        for lease in self.store.waves(layer, needed):
            try:
                if not foreseen:  # not before what is needed now is held, and begins to be read
                    self._foresee(layer, ids)
                    foreseen = True
                for index in lease.ready():
                    part = index[np.argsort(lease.ids[index])]
                    self.steps.experts(
                        layer, _ints(lease.ids[part]), np.ascontiguousarray(lease.pointers[part], np.int64)
                    )
            finally:
                lease.release()

    def _foresee(self, layer: int, ids: Ints) -> None:
        """Ask for what later layers will need: what is decided for them already, and what is probable."""
        if self.forecast is None or self.store is None:
            return
        wishes: list[Wish] = []
        for later in self._decided[layer]:
            wishes += self.forecast.settled(later, _frozen(self.steps.chosen(later)[0]))
        wishes += self.forecast.routed(layer, _frozen(ids), lambda later: self._peek(layer, later))
        self.store.ahead(wishes)

    def _decoupled(self, layer: int) -> bool:
        return self.gate is not None and layer in self.gate.gate.layers

    def _peek(self, layer: int, later: int) -> Floats:
        """See ``moestro.core.forecast.Peek``."""
        logits, router = self.steps.peek(layer, later), self.description.layers[later].router
        return logits if router is None else ranked(router, logits)

    def _overridden(self, layer: int, routes: Ints, ids: Ints, weights: Floats) -> tuple[Ints, Floats]:
        """Rows grouped by override, each asked once; narrower answers are padded with -1."""
        scores = self._gated if self._decoupled(layer) else self.steps.scores(layer)
        assert scores is not None
        parts: list[tuple[Any, Ints, Floats]] = []
        for number in np.unique(routes):
            rows = np.nonzero(routes == number)[0]
            override = self.overrides[int(number)]
            self.asked = self._positions[rows]
            own = (ids[rows], weights[rows])
            parts.append((rows, *(own if override is None else override(layer, scores[rows], *own))))
        width = max(part[1].shape[1] for part in parts)
        all_ids = np.full((len(ids), width), -1, dtype=np.int32)
        all_weights = np.zeros((len(ids), width), dtype=np.float32)
        for rows, own_ids, own_weights in parts:
            all_ids[rows, : own_ids.shape[1]], all_weights[rows, : own_ids.shape[1]] = own_ids, own_weights
        return all_ids, all_weights

    def forget(self, sequence: int) -> None:
        """A sequence is over. Its pages are the affair of whoever hands them out."""
        if self.forecast is not None:
            self.forecast.forget(sequence)

    def copy_page(self, src: int, dst: int) -> None:
        """Keys and values of one page, all layers."""
        self.steps.copy_page(src, dst)
        if self.gate is not None:
            self.gate.copy_page(src, dst)


def _frozen(ids: Ints) -> Ints:
    """A view that cannot be written to."""
    shown = ids.view()
    shown.flags.writeable = False
    return shown


def _ints(values: npt.ArrayLike) -> Ints:
    return np.ascontiguousarray(values, dtype=np.int32)
