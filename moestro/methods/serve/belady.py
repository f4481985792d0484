"""Belady's rule: who will be needed latest goes. The bound for every other policy on a recorded trace.

    victim = argmax over candidates of F(e, now),  F(e, t) = the first step after t that needs e, infinity if none does

Equal F (experts that are not needed any more, or together): the one needed longest ago. For equal sizes, and steps
whose experts fit the cache together, no policy that reads on demand reads less.

Source: Belady 1966; as the eviction rule of Read-ME (2410.19123), whose decoupled router knows the future
of the queue.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.expert_cache import CachePolicy, Key


NEVER = 1 << 62


class Config(BaseConfig):
    """No settings."""


class Belady(CachePolicy):
    """See CachePolicy and Oracle."""

    def __init__(self) -> None:
        self.needs: dict[Key, deque[int]] = {}
        self.last: dict[Key, int] = {}
        self.told = False

    def foresee(self, steps: Iterable[Sequence[Key]], start: int = 0) -> None:
        """See Oracle. Steps must be told in order."""
        self.told = True
        for time, keys in enumerate(steps, start):
            for key in dict.fromkeys(keys):
                self.needs.setdefault(key, deque()).append(time)

    def on_access(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self.last[key] = time
        future = self.needs.get(key)
        while future and future[0] <= time:
            future.popleft()

    def on_insert(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self.last.setdefault(key, time)

    def victim(self, candidates: Collection[Key]) -> Key:
        """See CachePolicy.

        Raises:
            ConfigError: nobody told the future.
        """
        if not self.told:
            raise ConfigError(
                "serve.belady must be told the future: use it in `moestro simulate cache`, or another policy"
            )
        return max(candidates, key=lambda key: (self._next(key), -self.last[key], key))

    def _next(self, key: Key) -> int:
        future = self.needs.get(key)
        return future[0] if future else NEVER


def policy(config: Config, plan: Any = None) -> CachePolicy:
    """The policy."""
    return Belady()


CARD = MethodCard(
    title="A study of replacement algorithms for a virtual-storage computer",
    year=1966,
    paper="survey-inference",
    summary="Cache of experts: the one needed latest goes; the bound on a recorded trace.",
    taxonomy="inference/system/offloading/caching",
)
