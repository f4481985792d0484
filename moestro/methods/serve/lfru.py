"""Least frequent recently used: a protected part by recency, the rest by frequency.

The cache has two parts. Who comes in joins the unprivileged part; needed again while there, it moves to the privileged
one, whose least recently used member moves back once that part holds more than the share P of the residents.

    victim = argmin over unprivileged candidates of n(e), the needs since it came;  equal n: needed longest ago

Only when no candidate is unprivileged does the privileged part give its least recently used. A prompt that runs through
every expert once therefore leaves the privileged part alone.

Source: Bilal and Kang 2017 (1702.04078), where the unprivileged part is an approximated LFU; counts are
exact here.
"""

from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from pydantic import Field

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.expert_cache import CachePolicy, Key


class Config(BaseConfig):
    """Settings.

    Attributes:
        privileged: P, largest share of the residents in the privileged part.
    """

    privileged: float = Field(default=0.5, ge=0, le=1)


class LeastFrequentRecentlyUsed(CachePolicy):
    """See CachePolicy."""

    def __init__(self, privileged: float) -> None:
        self.share = privileged
        self.privileged: OrderedDict[Key, None] = OrderedDict()
        self.count: dict[Key, int] = {}  # of the unprivileged part
        self.last: dict[Key, int] = {}

    def on_access(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self.last[key] = time
        if key in self.privileged:
            self.privileged.move_to_end(key)
        elif key in self.count:
            self.count[key] += 1
            if self.count[key] > 1:
                self._promote(key)

    def _promote(self, key: Key) -> None:
        room = int(self.share * (len(self.privileged) + len(self.count)))
        if room < 1:
            return
        del self.count[key]
        self.privileged[key] = None
        while len(self.privileged) > room:
            back, _ = self.privileged.popitem(last=False)
            self.count[back] = 1

    def on_insert(self, key: Key, time: int) -> None:
        """See CachePolicy. What is read ahead of need has not been needed yet: its count starts at 0."""
        self.count[key] = int(self.last.get(key, -1) == time)
        self.last.setdefault(key, time)

    def on_evict(self, key: Key) -> None:
        """See CachePolicy."""
        self.privileged.pop(key, None)
        self.count.pop(key, None)

    def victim(self, candidates: Collection[Key]) -> Key:
        """See CachePolicy."""
        loose = [key for key in candidates if key in self.count]
        if loose:
            return min(loose, key=lambda key: (self.count[key], self.last[key], key))
        return min(candidates, key=lambda key: (self.last[key], key))


def policy(config: Config, plan: Any = None) -> CachePolicy:
    """The policy."""
    return LeastFrequentRecentlyUsed(config.privileged)


CARD = MethodCard(
    title="A Cache Management Scheme for Efficient Content Eviction and Replication in Cache Networks",
    year=2017,
    arxiv="1702.04078",
    paper="survey-inference",
    summary="Cache of experts: a part protected by recency, the rest goes by frequency.",
    taxonomy="inference/system/offloading/caching",
    deviations=("counts of the unprivileged part are exact, not approximated by windows",),
)
