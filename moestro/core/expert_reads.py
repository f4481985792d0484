"""The order in which experts are read: demands as they came, then what was wished ahead by priority.

The same object runs in the simulator and in the engine's store. Light: nothing heavy is imported.
"""

import heapq
import itertools
from collections.abc import Collection, Iterable
from typing import Any, Final

from moestro.core.expert_cache import Key


MEMORY: Final = 0.9
"""How much of what is thought of a layer's wishes stays when the layer has run."""


class Reads:
    """A queue of what somebody needs, and of keys that somebody may need.

    Whether wishes for a layer are worth reading shows when it runs: of those that were not in memory, the share that
    was needed, a running mean. It is kept for layers whose wishes are not read as well, so they may come back.

    Args:
        least_right: share from which on a layer's wishes are worth reading; 0: always.

    Attributes:
        wished: keys asked for ahead and not begun -> (priority, number of the request). right: layer -> that share.
    """

    def __init__(self, least_right: float = 0.0) -> None:
        self.least_right = least_right
        self.right: dict[int, float] = {}
        self.wished: dict[Key, tuple[int, int]] = {}
        self._guessed: dict[int, set[Key]] = {}
        self._heap: list[tuple[int, int, Any]] = []
        self._numbers = itertools.count()

    def demand(self, work: Any) -> None:
        """Needed now."""
        heapq.heappush(self._heap, (0, next(self._numbers), work))

    def wish(self, key: Key, priority: int) -> bool:
        """May be needed; True if nobody had wished for it. The lowest priority counts, 1 at least."""
        priority = max(priority, 1)
        known = self.wished.get(key)
        if known is not None and known[0] <= priority:
            return False
        number = next(self._numbers)
        self.wished[key] = (priority, number)
        heapq.heappush(self._heap, (priority, number, key))
        return known is None

    def guess(self, layer: int, absent: Iterable[Key]) -> bool:
        """Note what was wished for a layer and is not in memory; whether to read it."""
        self._guessed.setdefault(layer, set()).update(absent)
        return self.right.get(layer, 1.0) >= self.least_right

    def ran(self, layer: int, needed: Collection[Key]) -> None:
        """A layer runs with these."""
        guessed = self._guessed.pop(layer, None)
        if guessed:
            right = len(guessed.intersection(needed)) / len(guessed)
            self.right[layer] = MEMORY * self.right.get(layer, 1.0) + (1 - MEMORY) * right

    def drop(self, keys: Iterable[Key]) -> None:
        """Nobody wishes for these any more."""
        for key in keys:
            del self.wished[key]

    def of(self, layer: int | None) -> list[Key]:
        """What is wished of a layer, or at all."""
        return [key for key in self.wished if layer in (None, key[0])]

    def pop(self) -> tuple[bool, Any] | None:
        """What is read next, and whether it is needed; a wish is over with that. None when nothing is left."""
        while self._heap:
            priority, number, work = heapq.heappop(self._heap)
            if priority == 0:
                return True, work
            if self.wished.get(work, (0, -1))[1] == number:
                del self.wished[work]
                return False, work
        return None
