"""A forward without a model: its logits depend on every token that the pages hold, and on nothing else.

A page that is handed out twice, not copied, or filled with other tokens changes every later choice.
"""

import hashlib
import time
from typing import Any

import numpy as np

from moestro.engine.sequences import Batch, Floats


class StubForward:
    """Logits from a hash of the tokens in a sequence's pages (and of its route)."""

    page = 16
    page_bytes = 128
    layers = 2
    experts = (0, 4)

    def __init__(self, pages: int = 64, vocab: int = 50, delay: float = 0.0) -> None:
        self.pages, self.vocab, self.delay = pages, vocab, delay
        self.held = np.full((pages, self.page), -1, dtype=np.int64)
        self.overrides: list[Any] = [None]
        self.on_route: Any = None
        self.broken: set[int] = set()
        self.steps: list[Batch] = []
        self.forgotten: list[int] = []

    def override(self, route: Any) -> Any:
        return route

    def step(self, batch: Batch) -> Floats:
        self.steps.append(batch)
        if self.delay:
            time.sleep(self.delay)
        routes = np.zeros_like(batch.tokens) if batch.routes is None else batch.routes
        pages = batch.tables[batch.rows_of, batch.positions // self.page]
        assert (pages >= 0).all(), "a row without a page"
        self.held[pages, batch.positions % self.page] = batch.tokens + 1000 * routes
        if self.on_route is not None:
            self.on_route(1, (batch.tokens % 4)[:, None].astype(np.int32), np.ones((len(batch.tokens), 1), np.float32))
        if self.broken & set(batch.tokens.tolist()):
            raise OSError(5, "the disk does not answer")
        return (
            np.stack([self._logits(batch, row) for row in batch.want]) if len(batch.want) else np.zeros((0, self.vocab))
        )

    def _logits(self, batch: Batch, row: int) -> Floats:
        position = int(batch.positions[row])
        pages = batch.tables[batch.rows_of[row], : position // self.page + 1]
        tokens = self.held[pages].ravel()[: position + 1]
        assert (tokens >= 0).all(), "a position that was never written"
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
        random = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
        return random.normal(size=self.vocab).astype(np.float32) * 3

    def forget(self, sequence: int) -> None:
        self.forgotten.append(sequence)

    def copy_page(self, src: int, dst: int) -> None:
        self.held[dst] = self.held[src]
