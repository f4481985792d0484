"""Belady's rule: who will be needed latest goes. The bound for every other policy on a recorded trace.

    victim = argmax over candidates of F(e, now),  F(e, t) = the first step after t that needs e, infinity if none does

Equal F (experts that are not needed any more, or together): the one needed longest ago. For equal sizes, and steps
whose experts fit the cache together, no policy that reads on demand reads less.

Source: Belady 1966; as the eviction rule of Read-ME (2410.19123), whose decoupled router knows the future
of the queue.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.expert_cache import CachePolicy, Key
from moestro.methods.serve._parts.future import Future


class Config(BaseConfig):
    """No settings."""


class Belady(CachePolicy):
    """See CachePolicy and Oracle."""

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

    def victim(self, candidates: Collection[Key]) -> Key:
        """See CachePolicy.

        Raises:
            ConfigError: nobody told the future.
        """
        if not self.told:
            raise ConfigError(
                "serve.belady must be told the future: use it in `moestro simulate cache`, or another policy"
            )
        return max(candidates, key=lambda key: (self.future.next(key, self.now), -self.last[key], key))


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
