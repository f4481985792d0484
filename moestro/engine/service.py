"""The engine's thread: it steps the scheduler while there is work, and sleeps otherwise."""

import logging
import threading
import time

from moestro.core.batching import Batcher
from moestro.core.decoding import PLAIN, Decoder
from moestro.core.errors import MoestroError
from moestro.engine.metrics import Heat
from moestro.engine.open import Opened
from moestro.engine.requests import BusyError, Limits, Piece, Request
from moestro.engine.scheduler import Order, Scheduler


_log = logging.getLogger("moestro.engine")


class BrokenError(MoestroError):
    """The engine met an error that nobody foresaw; what ran is lost, what comes next may work."""


class Engine:
    """A scheduler in a thread of its own.

    Args:
        opened: the model. limits, share, order, batcher: see ``Scheduler``. decoder: of requests that do not name one.
    """

    def __init__(
        self,
        opened: Opened,
        limits: Limits | None = None,
        *,
        share: bool = True,
        order: Order | None = None,
        batcher: Batcher | None = None,
        decoder: Decoder = PLAIN,
    ) -> None:
        self.opened, self.decoder = opened, decoder
        self.scheduler = Scheduler(opened.forward, limits, share=share, order=order, batcher=batcher)
        self.heat = Heat(opened.forward.experts)
        opened.forward.on_route = self.heat
        self.started = time.time()
        self.draining = False
        self._wake = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="moestro-engine", daemon=True)
        self._thread.start()

    @property
    def context(self) -> int:
        """Positions a single plain request may hold: what the model was made for, or what there are pages for."""
        pages = self.scheduler.pages
        return min(self.opened.context, (pages.count - 1) * pages.page)

    def busy(self) -> BusyError | None:
        """Why a new request would be refused now."""
        if self.draining:
            return BusyError("the server is going down", 5)
        if len(self.scheduler.waiting) >= self.scheduler.limits.waiting:
            waiting = sum(request.size for request in list(self.scheduler.waiting))
            return BusyError("the queue is full", self.scheduler.stats.retry_after(waiting))
        return None

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none.

        Raises:
            ConfigError: one could never run. BusyError: no room, or the server is going down.
        """
        if self.draining:
            raise BusyError("the server is going down", 5)
        self.scheduler.submit(*requests)
        self._notify()

    def cancel(self, *requests: Request) -> None:
        """End them before the next step."""
        for request in requests:
            if not request.done:
                self.scheduler.cancel(request)
        self._notify()

    def drain(self) -> None:
        """Take nothing new, fail what has not begun, finish what runs."""
        self.draining = True
        self.scheduler.drop_waiting(BusyError("the server is going down", 5))

    def close(self, seconds: float = 1.0) -> None:
        """Stop the thread, within the current step or the given time."""
        self.draining = self._stopped = True
        self._notify()
        self._thread.join(seconds)
        if not self._thread.is_alive():
            self.opened.close()

    def gauges(self) -> dict[str, float]:
        """How things stand."""
        scheduler = self.scheduler
        return {
            "requests_running": len(scheduler.running),
            "requests_waiting": len(scheduler.waiting),
            "tokens_waiting": sum(request.size for request in list(scheduler.waiting)),
            "pages_used": scheduler.pages.used,
            "pages_total": scheduler.pages.count,
            "page_bytes": self.opened.forward.page_bytes,
            "generated_tokens_per_second": scheduler.stats.speed(),
            "uptime_seconds": time.time() - self.started,
            **self.opened.cache(),
        }

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _loop(self) -> None:
        while not self._stopped:
            try:
                worked = self.scheduler.step()
            except Exception as error:
                _log.exception("a step of the engine failed")
                self._fail_all(error)
                worked = True
            if not worked:
                with self._wake:
                    if not self._stopped and not self.scheduler.waiting and not self.scheduler.running:
                        self._wake.wait(0.5)

    def _fail_all(self, error: Exception) -> None:
        scheduler = self.scheduler
        told = BrokenError(f"an error inside the engine ended this request ({type(error).__name__})")
        for request in list(scheduler.running):
            scheduler._end(request, Piece(error=told))
        scheduler.drop_waiting(told)
