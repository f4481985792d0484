"""Expected next need: who will be needed latest goes, as far as frequencies and the order of layers tell.

    victim = argmax over candidates of d(l) + P(l) (1 / p(e) - 1)

for expert e of layer l: P(l) is the number of steps from one run of the layer to the next, d(l) the number until it
runs again, and p(e) the share of the layer's runs that needed e, where one that is ``half_life`` runs ago counts half.
If runs need e independently, this is the expected number of steps until one does: Belady's rule in expectation.

Decoding goes through all layers again and again, and a cache that holds little more than one token's experts has the
next layers' evicted when their turn comes if age decides (LRU). Frequencies alone (LFU) do not see that the layer that
has just run is the last one to come back; while a prompt is read and all experts of a layer are needed every time, that
is all there is to see, and the rule keeps one part of the experts in memory instead of none.

Source: ours; the rule of Belady 1966, the frequencies of the caches among the offloading systems of 2412.14219.
"""

import heapq
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.expert_cache import CachePolicy, Key


class Config(BaseConfig):
    """Settings.

    Attributes:
        half_life: runs of a layer after which one counts half.
    """

    half_life: float = Field(default=32.0, gt=0)


@dataclass
class Runs:
    """Of one layer: how many there were, when the last was, the steps from the one before to it, their weight."""

    count: int = 0
    last: int = 0
    period: int = 0
    weight: float = 0.0


class NextNeed(CachePolicy):
    """See CachePolicy."""

    def __init__(self, half_life: float) -> None:
        self.decay = 0.5 ** (1 / half_life)
        self.runs: dict[int, Runs] = {}
        self.needs: dict[Key, tuple[float, int]] = {}  # weight of the runs that needed it, and up to which run
        self.time = 0
        self._heap: list[tuple[float, Key]] = []
        self._known: set[Key] = set()

    def on_access(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        if time != self.time:
            self.time = time
            self._heap, self._known = [], set()
        runs = self.runs.setdefault(key[0], Runs())
        if not runs.count or runs.last != time:
            runs.period = time - runs.last if runs.count else 0
            runs.count, runs.last = runs.count + 1, time
            runs.weight = 1 + self.decay * runs.weight
        weight, upto = self.needs.get(key, (0.0, runs.count))
        self.needs[key] = (1 + weight * self.decay ** (runs.count - upto), runs.count)
        self._known.discard(key)

    def on_insert(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self.needs.setdefault(key, (0.0, 0))

    def wait(self, key: Key) -> float:
        """Expected steps until the key is needed."""
        runs = self.runs.get(key[0])
        if runs is None:  # read ahead, its layer never ran: it is about to
            return 0.0
        weight, upto = self.needs[key]
        share: float = weight * self.decay ** (runs.count - upto) / runs.weight
        period = runs.period or self.time + 1  # so far one pass: the next begins where this one did
        return max(runs.last + period - self.time, 1) + period * (1 / max(share, 1e-6) - 1)

    def victim(self, candidates: Collection[Key]) -> Key:
        """See CachePolicy. Within a step the order of those that were candidates before is kept."""
        there = set(candidates)
        for key in there - self._known:
            heapq.heappush(self._heap, (-self.wait(key), key))
        self._known |= there
        while True:
            _, key = heapq.heappop(self._heap)
            self._known.discard(key)
            if key in there:
                return key


def policy(config: Config, plan: Any = None) -> CachePolicy:
    """The policy."""
    return NextNeed(config.half_life)


CARD = MethodCard(
    title="A Survey on Inference Optimization Techniques for Mixture of Experts Models",
    year=2024,
    arxiv="2412.14219",
    paper="survey-inference",
    summary="Cache of experts: the one whose next need is expected latest goes, by frequency and order of layers.",
    taxonomy="inference/system/offloading/caching",
)
