"""What the expert store gives out, and what it counts."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from moestro.core.errors import StoreError
from moestro.core.expert_cache import Key
from moestro.engine.slabs import Slot


if TYPE_CHECKING:
    from moestro.engine.store import ExpertStore

Ints = npt.NDArray[np.int32]
Addresses = npt.NDArray[np.int64]

PATIENCE_S: Final = 1.5
"""Seconds without progress after which a read counts as failed."""


@dataclass
class Counters:
    """What happened since the store was opened. A need is a hit when its slab was there, else a miss.

    Attributes:
        joined: misses whose read was under way, because somebody had asked before. bytes: read. wasted: of them read
            ahead and evicted unused. prefetched, cancelled: slabs read ahead, and asked for ahead but not read.
        failed: reads. waited_s: seconds callers waited for slabs. reading_s: seconds in which something was read.
    """

    hits: int = 0
    misses: int = 0
    joined: int = 0
    bytes: int = 0
    wasted: int = 0
    prefetched: int = 0
    cancelled: int = 0
    failed: int = 0
    waited_s: float = 0.0
    reading_s: float = 0.0

    @property
    def hidden_s(self) -> float:
        """Seconds of reading that nobody waited for."""
        return max(0.0, self.reading_s - self.waited_s)


@dataclass
class Entry:
    """A slab in memory or on its way. ahead: nobody needed it when its read was asked for. used: somebody has."""

    key: Key
    slot: Slot
    asked: float
    ahead: bool
    started: float | None = None
    ready: bool = False
    used: bool = False
    error: StoreError | None = None


@dataclass
class Lease:
    """Slabs that stay until ``release``.

    Attributes:
        ids: int32 [n], as asked for. pointers: int64 [n], addresses of their slabs; valid for indices that ``ready``
            gave.
    """

    ids: Ints
    pointers: Addresses
    _store: "ExpertStore"
    _entries: list[Entry]
    _open: bool = field(default=True)

    def ready(self) -> Iterator[npt.NDArray[np.int64]]:
        """Indices into ``ids`` in parts: those resident, then others as they arrive; each once.

        Raises:
            StoreError: a slab cannot be read, or nothing came for ``PATIENCE_S`` seconds.
        """
        left = list(range(len(self._entries)))
        while left:
            arrived = self._store._arrived(self._entries, left)
            yield np.asarray(arrived, dtype=np.int64)
            gone = set(arrived)
            left = [index for index in left if index not in gone]

    def release(self) -> None:
        """Let go of the slabs; doing so twice is doing so once."""
        if self._open:
            self._open = False
            self._store._release(self._entries)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
