"""What will be needed, as far as somebody has told, and policies that go by it."""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from moestro.core.errors import ConfigError
from moestro.core.expert_cache import CachePolicy, Key


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


class Foreseeing(CachePolicy):
    """The one whose next known need is latest goes; of equals the one needed longest ago. See CachePolicy and Oracle.

    Attributes:
        untold: what to say where nobody told the future.
    """

    untold: str

    def __init__(self) -> None:
        self.future = Future()
        self.last: dict[Key, int] = {}
        self.told = False
        self.now = -1

    def foresee(self, steps: Iterable[Sequence[Key]], start: int = 0) -> None:
        """See Oracle. Steps must be told in order; what is told again replaces what was told."""
        self.told = True
        self.future.tell(steps, start)

    def on_access(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self.last[key] = self.now = time

    def on_insert(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self.last.setdefault(key, time)

    def next(self, key: Key) -> int:
        """The next known need of a key, NEVER without one."""
        return self.future.next(key, self.now)

    def victim(self, candidates: Collection[Key]) -> Key:
        """See CachePolicy.

        Raises:
            ConfigError: nobody told the future.
        """
        if not self.told:
            raise ConfigError(self.untold)
        return max(candidates, key=lambda key: (self.next(key), -self.last[key], key))
