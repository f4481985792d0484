"""What is known before it runs, where a router of token ids decides: the experts of tokens that wait.

A batcher chooses by them, and a policy of the experts' cache that asks for the future is told it: the pass that begins,
exactly, and the passes after it as far as the tokens of the queue are known, cut by the batcher or in order of arrival.
"""

from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np

from moestro.core.batching import Batcher, Pending, in_order
from moestro.core.errors import ConfigError
from moestro.core.expert_cache import Key, Oracle
from moestro.engine.requests import Lane, Limits, Request, Work
from moestro.engine.sequences import Forward, Ints
from moestro.engine.token_router import TokenRouter, best


class Store(Protocol):
    """Of the expert store what is needed here."""

    cache: Any
    _change: Any


class Foresight:
    """Tells a policy what the passes to come need.

    Args:
        store: whose policy it is. layers: those with experts, in order. decoupled: those whose experts are known.
        passes: how many of the queue are worth telling.

    Attributes:
        queue: experts of the passes after the next one.
    """

    def __init__(self, store: Store, layers: Sequence[int], decoupled: frozenset[int], passes: int) -> None:
        self.store, self.layers, self.decoupled, self.passes = store, list(layers), decoupled, passes
        self.queue: list[list[int]] = []

    def begin(self, ids: Ints) -> None:
        """A pass begins whose rows take these experts [R]."""
        steps: list[list[Key]] = []
        for experts in (np.unique(ids).tolist(), *self.queue):
            steps += [[(layer, e) for e in experts] if layer in self.decoupled else [] for layer in self.layers]
        self.queue = []
        cache = self.store.cache
        policy: Oracle = cache.policy
        with self.store._change:  # its readers ask the policy too
            policy.foresee(steps, cache.time + 1)


class Ahead:
    """Experts of tokens that have not run.

    Args:
        gate: the router. limits: the scheduler's. batcher: how it cuts the queue; None: in order.
        foresight: whom to tell what comes.
    """

    def __init__(self, gate: TokenRouter, limits: Limits, batcher: Batcher | None, foresight: Foresight | None) -> None:
        self.gate, self.limits, self.batcher, self.foresight = gate, limits, batcher, foresight

    @classmethod
    def of(cls, forward: Forward, limits: Limits, batcher: Batcher | None) -> Self | None:
        """For a forward; None where nobody wants to know.

        Raises:
            ConfigError: the batcher does, and the model's routers do not tell.
        """
        gate, foresight = getattr(forward, "gate", None), getattr(forward, "foresight", None)
        asks = batcher is not None and batcher.needs_experts
        if asks and gate is None:
            raise ConfigError(
                f"{batcher.name} needs a model whose router reads token ids only (train.read_me); this one's decide "  # type: ignore[union-attr]
                "layer by layer"
            )
        return cls(gate, limits, batcher, foresight) if asks or foresight is not None else None

    def meet(self, running: Sequence[Request]) -> None:
        """Learn the experts of all that may run in the next step."""
        for request in running:
            self._prompt(request)
        late = [request for request in running if request.lanes and len(request.ahead) < len(request.tokens)]  # type: ignore[arg-type]
        if late:
            tables = [request.lanes[0].table.pages for request in late]
            wide = np.full((len(late), max(map(len, tables))), -1, dtype=np.int32)
            for row, pages in zip(wide, tables, strict=True):
                row[: len(pages)] = pages
            tokens = np.asarray([request.tokens[-1] for request in late], np.int32)
            positions = np.asarray([len(request.tokens) - 1 for request in late], np.int32)
            found = best(self.gate.look(tokens, positions, np.arange(len(late), dtype=np.int32), wide))
            for request, expert in zip(late, found, strict=True):
                request.ahead = np.append(request.ahead, expert)  # type: ignore[arg-type]

    def tell(self, work: Sequence[Work], running: Sequence[Request], waiting: Sequence[Request], now: float) -> None:
        """What the passes after that of ``work`` will need, as far as tokens are known."""
        if self.foresight is None:
            return
        stops = {item.lane: item.stop for item in work}
        rows = self.limits.chunk if self.batcher or not any(r.writing for r in running) else self.limits.mixed
        enough = rows * self.foresight.passes
        left = []
        for request in running:
            for lane in request.lanes:
                start = stops.get(lane, lane.table.length)
                if lane.logits is None and start < len(request.tokens):
                    left.append(self._rest(request, start, now))
        for request in waiting:
            if enough <= sum(item.count for item in left):
                break
            self._prompt(request)
            left.append(self._rest(request, 0, now))
        self.foresight.queue = self._cut(left, rows)

    def _cut(self, left: list[Pending], rows: int) -> list[list[int]]:
        """Experts of each pass of a queue."""
        passes: list[list[int]] = []
        while left and self.foresight is not None and len(passes) < self.foresight.passes:
            known = [item.experts for item in left if item.experts is not None]
            taken = self.batcher.take(left, rows) if self.batcher is not None else in_order(left, rows)
            parts = [experts[:count] for experts, count in zip(known, taken, strict=True)]
            passes.append(np.unique(np.concatenate(parts)).tolist())
            left = [
                Pending(item.count - count, item.writing, item.waited, experts[count:])
                for item, experts, count in zip(left, known, taken, strict=True)
                if item.count > count
            ]
        return passes

    def _prompt(self, request: Request) -> None:
        if request.ahead is None:
            request.ahead = best(self.gate.route(np.asarray(request.prompt, np.int32)))

    def _rest(self, request: Request, start: int, now: float) -> Pending:
        assert request.ahead is not None
        return Pending(len(request.tokens) - start, request.writing, now - request.ran, request.ahead[start:])


def pending(request: Request, lane: Lane, now: float, rows: int) -> Pending:
    """What a lane could run next."""
    start = lane.table.length
    experts = None if request.ahead is None else request.ahead[start : start + rows]
    return Pending(len(request.tokens) - start, request.writing, now - request.ran, experts)
