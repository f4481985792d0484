"""Least recently used: who was needed longest ago goes.

    victim = argmin over candidates of t(e),  t(e) = the last step that needed e

Equal times (experts of one step) go by key. What was read ahead of need counts as used when it came.

Source: the baseline of every offloading engine; Mattson et al. 1970 for its stack property: what a smaller cache
holds, a larger one holds too.
"""

from collections.abc import Collection
from typing import Any

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.expert_cache import CachePolicy, Key


class Config(BaseConfig):
    """No settings."""


class LeastRecentlyUsed(CachePolicy):
    """See CachePolicy."""

    def __init__(self) -> None:
        self.last: dict[Key, int] = {}  # in order of time

    def on_access(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self.last.pop(key, None)
        self.last[key] = time

    def on_insert(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        if self.last.get(key, -1) < time:
            self.on_access(key, time)

    def on_evict(self, key: Key) -> None:
        """See CachePolicy."""
        del self.last[key]

    def victim(self, candidates: Collection[Key]) -> Key:
        """See CachePolicy."""
        there = set(candidates)
        oldest, found = -1, []
        for key, time in self.last.items():
            if found and time > oldest:
                break
            if key in there:
                oldest = time
                found.append(key)
        return min(found)


def policy(config: Config, plan: Any = None) -> CachePolicy:
    """The policy."""
    return LeastRecentlyUsed()


CARD = MethodCard(
    title="Evaluation techniques for storage hierarchies",
    year=1970,
    paper="survey-inference",
    summary="Cache of experts: the one needed longest ago goes.",
    taxonomy="inference/system/offloading/caching",
)
