"""Continuous batching: which rows of which sequences run in the next step, and what becomes of their logits.

A step mixes the next token of sequences that are being written with parts of prompts that are being read. A request is
let in when pages for all it may ever hold are free, so nothing is ever thrown out half-way. Requests wait in order of
arrival; prompts that are read at the same time share the rows of a step equally.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from moestro.core.batching import Batcher
from moestro.core.errors import ConfigError, MoestroError
from moestro.engine.ahead import Ahead, pending
from moestro.engine.decoding import route_index
from moestro.engine.metrics import Stats
from moestro.engine.requests import BusyError, Lane, Limits, Piece, Request, Work
from moestro.engine.sequences import Batch, Forward, Pages


FAULTS = (MoestroError, OSError, RuntimeError, ValueError, ArithmeticError, MemoryError)
"""What a step may die of without taking other requests along."""


# Requests that wait for their next token, in order of waiting -> the same, best first for the experts' cache.
Order = Callable[[list[Request]], list[Request]]


class Scheduler:
    """Requests over a forward. ``submit`` and ``cancel`` may be called from any thread, ``step`` from one.

    Args:
        share: let sequences that begin alike share pages. order: who is written first where ``limits.width`` is
            smaller than the number of sequences. batcher: chooses the rows of every step, in place of ``order``,
            ``width`` and ``mixed``. clock: seconds.

    Raises:
        ConfigError: the batcher wants to know experts ahead, and this model's routers do not tell.
    """

    def __init__(
        self,
        forward: Forward,
        limits: Limits | None = None,
        *,
        share: bool = True,
        order: Order | None = None,
        batcher: Batcher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.forward = forward
        self.limits = limits or Limits()
        self.pages = Pages(forward.pages, forward.page, share)
        self.order, self.batcher = order, batcher
        self.ahead = Ahead.of(forward, self.limits, batcher)
        self.clock = clock
        self.stats = Stats()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._lock = threading.Lock()
        self._turn = 0

    # -- from any thread -----------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Refuse what could never run.

        Raises:
            ConfigError: an empty prompt, an unknown token, more pages or passes than there are.
        """
        if not request.prompt:
            raise ConfigError("the prompt holds no token")
        if request.max_tokens < 1:
            raise ConfigError(f"max_tokens={request.max_tokens}; it must be at least 1")
        largest = max(request.prompt)
        if largest >= self.forward.vocab or min(request.prompt) < 0:
            raise ConfigError(f"token {largest} is not among the model's {self.forward.vocab}")
        passes = len(request.decoder.routes)
        # One page more a pass: a prompt that is shared to its end copies the page it goes on in.
        need = passes * (self.pages.needed(request.positions) + 1)
        if need > self.pages.count or passes > self.limits.running:
            room = (self.pages.count // passes - 1) * self.pages.page
            raise ConfigError(
                f"{len(request.prompt)} tokens of prompt and {request.max_tokens} to write do not fit the "
                f"{max(room, 0)} positions this server keeps for a request"
            )

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none.

        Raises:
            ConfigError: see ``check``. BusyError: the queue has no room for them.
        """
        for request in requests:
            self.check(request)
            request.tokens = list(request.prompt)
            request.arrived = request.served = request.ran = self.clock()
        with self._lock:
            tokens = sum(request.size for request in self.waiting)
            full = len(self.waiting) + len(requests) > self.limits.waiting
            if full or tokens + sum(request.size for request in requests) > self.limits.waiting_tokens:
                self.stats.refused += len(requests)
                raise BusyError(
                    f"{len(self.waiting)} requests of {tokens} tokens wait already", self.stats.retry_after(tokens)
                )
            self.waiting.extend(requests)

    def cancel(self, request: Request) -> None:
        """End a request before the next step; its pages are free then."""
        request.cancelled = True

    def drop_waiting(self, error: Exception) -> None:
        """Fail all that has not begun."""
        with self._lock:
            dropped = list(self.waiting)
            self.waiting.clear()
        for request in dropped:
            self._end(request, Piece(error=error))

    # -- from the engine's thread --------------------------------------------------------------------------------

    def step(self) -> bool:
        """Run one step; False when there is nothing to do."""
        self._sweep()
        self._admit()
        if self.ahead is not None:
            self.ahead.meet(self.running)
        work = self._choose() if self.batcher is None else self._batched(self.batcher)
        if not work:
            return False
        if self.ahead is not None:
            self.ahead.tell(work, self.running, list(self.waiting), self.clock())
        began = self.clock()
        self._run(work)
        self.stats.step(sum(item.rows for item in work), self.clock() - began)
        return True

    def _sweep(self) -> None:
        with self._lock:
            gone = [request for request in self.waiting if request.cancelled]
            for request in gone:
                self.waiting.remove(request)
        for request in [*gone, *(request for request in self.running if request.cancelled)]:
            self._end(request, Piece(finish="cancelled"))

    def _admit(self) -> None:
        refused: list[tuple[Request, ConfigError]] = []
        with self._lock:  # nobody may drop what is just being let in
            while True:
                request = next((r for r in self.waiting if r.after is None or r.after.writing or r.after.done), None)
                lanes = sum(len(running.lanes) for running in self.running)
                if request is None or lanes + len(request.decoder.routes) > self.limits.running:
                    break
                try:
                    if not self._open(request):
                        break
                    self.running.append(request)
                except ConfigError as error:
                    refused.append((request, error))
                self.waiting.remove(request)
        for request, error in refused:
            self._end(request, Piece(error=error))

    def _open(self, request: Request) -> bool:
        """Pages for every pass, or for none."""
        lanes: list[Lane] = []
        for index in [route_index(self.forward, route) for route in request.decoder.routes]:
            table = self.pages.open(request.tokens, request.positions, b"" if index == 0 else index.to_bytes(4, "big"))
            if table is None:
                for lane in lanes:
                    self.pages.close(lane.table)
                return False
            lanes.append(Lane(table, index))
        request.lanes = lanes
        request.cached = lanes[0].table.length
        return True

    def _choose(self) -> list[Work]:
        """The rows of the next step: next tokens first, then equal shares of the prompts being read."""
        writing = [request for request in self.running if request.writing]
        work = [
            Work(request, lane, len(request.tokens))
            for request in self._in_turn(writing)
            for lane in request.lanes
            if lane.logits is None
        ]
        reading = [
            (request, lane)
            for request in self.running
            if not request.writing
            for lane in request.lanes
            if lane.logits is None
        ]
        rows = max(1, min(self.limits.chunk - len(work), self.limits.mixed)) if work else self.limits.chunk
        if reading:
            # Whoever is first takes what division leaves; it is somebody else every time.
            self._turn = (self._turn + 1) % len(reading)
            reading = reading[self._turn :] + reading[: self._turn]
        for number, (request, lane) in enumerate(reading):
            share = -(-rows // (len(reading) - number))
            stop = min(lane.table.length + share, len(request.tokens))
            if stop > lane.table.length:
                work.append(Work(request, lane, stop))
                rows -= stop - lane.table.length
        return work

    def _batched(self, batcher: Batcher) -> list[Work]:
        """The rows of the next step as a batcher wants them."""
        lanes = [(request, lane) for request in self.running for lane in request.lanes if lane.logits is None]
        if not lanes:
            return []
        now = self.clock()
        taken = batcher.take([pending(*pair, now, self.limits.chunk) for pair in lanes], self.limits.chunk)
        return [
            Work(request, lane, lane.table.length + count)
            for (request, lane), count in zip(lanes, taken, strict=True)
            if count
        ]

    def _in_turn(self, writing: list[Request]) -> list[Request]:
        """Who is written in this step: those that waited too long, then whoever ``order`` prefers."""
        width = self.limits.width
        if width is None or len(writing) <= width:
            return writing
        longest = sorted(writing, key=lambda request: request.served)
        late = self.clock() - self.limits.max_wait
        overdue = [request for request in longest if request.served <= late]
        others = [request for request in longest if request.served > late]
        return [*overdue, *(self.order(others) if self.order is not None else others)][:width]

    def _run(self, work: list[Work]) -> None:
        """Compute; when a step of several requests fails, each runs alone, so that only the guilty one ends."""
        requests = list(dict.fromkeys(item.request for item in work))
        try:
            for item in work:
                for source, target in self.pages.write(item.lane.table, item.stop):
                    self.forward.copy_page(source, target)
            logits = self.forward.step(self._batch(work))
        except FAULTS as error:
            self.stats.faults += 1
            if len(requests) == 1:
                self._end(requests[0], Piece(error=error))
                return
            for request in requests:
                self._run([item for item in work if item.request is request])
            return
        rows, now = iter(logits), self.clock()
        for item in work:
            item.request.ran = now
            self.pages.written(item.lane.table, item.request.tokens, item.stop)
            if item.stop == len(item.request.tokens):
                item.lane.logits = next(rows)
        for request in requests:
            if all(lane.logits is not None for lane in request.lanes):
                self._advance(request)

    def _batch(self, work: list[Work]) -> Batch:
        spans = [(item.lane.table.length, item.stop) for item in work]
        counts = [stop - start for start, stop in spans]
        last = np.cumsum(counts) - 1
        tables = np.full((len(work), max(len(item.lane.table.pages) for item in work)), -1, dtype=np.int32)
        for row, item in zip(tables, work, strict=True):
            row[: len(item.lane.table.pages)] = item.lane.table.pages
        routes = np.repeat([item.lane.route for item in work], counts).astype(np.int32)
        return Batch(
            tokens=np.concatenate(
                [np.asarray(item.request.tokens[a:b], np.int32) for item, (a, b) in zip(work, spans, strict=True)]
            ),
            positions=np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in spans]),
            rows_of=np.repeat(np.arange(len(work), dtype=np.int32), counts),
            sequences=[item.lane.table.id for item in work],
            tables=tables,
            want=np.array(
                [at for at, item in zip(last, work, strict=True) if item.stop == len(item.request.tokens)], np.int32
            ),
            routes=routes if routes.any() else None,
        )

    def _advance(self, request: Request) -> None:
        """All passes have their logits: choose a token and tell."""
        now = self.clock()
        logits = np.stack([lane.logits for lane in request.lanes if lane.logits is not None])
        for lane in request.lanes:
            lane.logits = None
        try:
            choice = request.sampler.choose(request.decoder.combine(logits))
        except MoestroError as error:
            self._end(request, Piece(error=error))
            return
        self.stats.token(now - request.served, first=not request.writing)
        request.served = now
        request.tokens.append(choice.token)
        ended = choice.token in request.ends and not request.sampling.ignore_eos
        text = "" if ended else request.text.push(choice.token)
        if ended or request.text.stopped:
            finish = "stop"
        elif len(request.tokens) - len(request.prompt) >= request.max_tokens:
            finish = "length"
        else:
            request.sink(Piece(text, choice))
            return
        self._end(request, Piece(text + request.text.end(), choice, finish))

    def _end(self, request: Request, piece: Piece) -> None:
        for lane in request.lanes:
            self.pages.close(lane.table)
            self.forward.forget(lane.table.id)
        request.lanes, request.done = [], True
        if request in self.running:
            self.running.remove(request)
        self.stats.end("failed" if piece.error is not None else piece.finish or "", request)
        request.sink(piece)
