"""What will be needed, as far as somebody has told."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from moestro.core.expert_cache import Key


NEVER: Final = 1 << 62
"""The next need of whom nobody needs any more."""


class Future:
    """Needs by key and time.

    Attributes:
        until: the first step that nobody has told of.
    """

    def __init__(self) -> None:
        self.needs: dict[Key, deque[int]] = {}
        self.until = 0

    def tell(self, steps: Iterable[Sequence[Key]], start: int) -> None:
        """What the steps ``start``, ``start + 1`` ... need. What was told of them and of later ones is forgotten."""
        if start < self.until:
            for times in self.needs.values():
                while times and times[-1] >= start:
                    times.pop()
        self.until = start
        for keys in steps:
            for key in dict.fromkeys(keys):
                self.needs.setdefault(key, deque()).append(self.until)
            self.until += 1

    def next(self, key: Key, now: int) -> int:
        """The first step after ``now`` that needs a key, or NEVER. Times ask in order."""
        times = self.needs.get(key)
        while times and times[0] <= now:
            times.popleft()
        return times[0] if times else NEVER
