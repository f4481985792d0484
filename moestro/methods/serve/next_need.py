"""Expected next need: who will be needed latest goes, as far as frequencies, company and the order of layers tell.

    victim = argmax over candidates of d(l) + P(l) (1 / p(e) - 1)

for expert e of layer l: P(l) is the number of steps from one run of the layer to the next, d(l) the number until it
runs again, and p(e) the chance that a run needs e. If runs need e independently, this is the expected number of steps
until one does: Belady's rule in expectation. With f(e) the share of the layer's runs that needed e, where one that is
``half_life`` runs ago counts half, S what its last run needed, and n(s, e) of the n(s) runs that followed one that
needed s the number that needed e (half of it after ``pair_half_life`` of them),

    p(e) = (1 - company) f(e) + company mean over s in S of (n(s, e) + prior f(e)) / (n(s) + prior)

Decoding goes through all layers again and again, and a cache that holds little more than one token's experts has the
next layers' evicted when their turn comes if age decides (LRU). Frequencies alone (LFU) do not see that the layer that
has just run is the last one to come back; while a prompt is read and all experts of a layer are needed every time, that
is all there is to see, and the rule keeps one part of the experts in memory instead of none. What a token chose says
more of the next one's choice than how often anything is chosen: texts stay at their matter, and some experts come
after others.

Source: ours; the rule of Belady 1966, the frequencies of the caches among the offloading systems of 2412.14219.
"""

import heapq
from collections.abc import Collection
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.expert_cache import CachePolicy, Key


PRIOR: Final = 4.0
"""Runs that frequencies count for against what followed an expert."""

MOST: Final = 512
"""Experts of a layer whose pairs are counted: a table of their square. More of them go by frequency."""


class Config(BaseConfig):
    """Settings.

    Attributes:
        half_life: runs of a layer after which one counts half. pair_half_life: runs that needed an expert, for what
            followed it. company: weight of what followed the experts of the last run; 0: frequencies alone.
    """

    half_life: float = Field(default=32.0, gt=0)
    pair_half_life: float = Field(default=512.0, gt=0)
    company: float = Field(default=0.7, ge=0, le=1)


class Runs:
    """Of one layer, what its runs needed.

    Attributes:
        count, last, period: how many runs there were, when the last was, the steps from the one before to it.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.decay, self.pair_decay = 0.5 ** (1 / config.half_life), 0.5 ** (1 / config.pair_half_life)
        self.count = self.last = self.period = 0
        self._weight = 0.0  # of all runs
        self._places: dict[int, int] = {}  # expert -> its place in what follows
        self._needs: npt.NDArray[np.float64] = np.zeros(0)  # weight of the runs that needed each
        self._pairs: npt.NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self._followed: npt.NDArray[np.float64] = np.zeros(0)
        self._before: list[int] = []
        self._now: list[int] = []
        self._shares: list[float] | None = None

    def begin(self, time: int) -> None:
        """A run begins."""
        self._count_pairs()
        self.period = time - self.last if self.count else 0
        self.count, self.last = self.count + 1, time
        self._weight = 1 + self.decay * self._weight
        self._needs *= self.decay
        self._before, self._now = self._now, []

    def need(self, expert: int) -> None:
        """The run needs it."""
        self.meet(expert)
        self._needs[self._places[expert]] += 1
        self._now.append(self._places[expert])
        self._shares = None

    def meet(self, expert: int) -> None:
        """There is such an expert."""
        if expert not in self._places:
            self._places[expert] = len(self._places)
            self._needs = np.append(self._needs, 0.0)
            self._shares = None

    def share(self, expert: int) -> float:
        """p(e)."""
        if self._shares is None:
            self._count_pairs()
            found = self._needs / self._weight
            company, now = self.config.company, self._now
            if company and len(found) <= MOST and now:
                self._widen()
                seen = (self._followed[now] + PRIOR)[:, None]
                found = (1 - company) * found + company * ((self._pairs[now] + PRIOR * found) / seen).mean(axis=0)
            self._shares = found.tolist()
        return self._shares[self._places[expert]]

    def _widen(self) -> None:
        if (short := len(self._needs) - len(self._followed)) > 0:
            self._pairs = np.pad(self._pairs, (0, short))
            self._followed = np.pad(self._followed, (0, short))

    def _count_pairs(self) -> None:
        """The last run is complete: note what followed what, once."""
        before, self._before = self._before, []
        if before and self.config.company and len(self._needs) <= MOST:
            self._widen()
            self._pairs[before] *= self.pair_decay
            self._pairs[np.ix_(before, self._now)] += 1
            self._followed[before] = self._followed[before] * self.pair_decay + 1


class NextNeed(CachePolicy):
    """See CachePolicy."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.runs: dict[int, Runs] = {}
        self.time = 0
        self._heap: list[tuple[float, Key]] = []
        self._known: set[Key] = set()

    def on_access(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        if time != self.time:
            self.time = time
            self._heap, self._known = [], set()
        runs = self._of(key[0])
        if not runs.count or runs.last != time:
            runs.begin(time)
        runs.need(key[1])
        self._known.discard(key)

    def on_insert(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self._of(key[0]).meet(key[1])

    def _of(self, layer: int) -> Runs:
        found = self.runs.get(layer)
        if found is None:
            found = self.runs[layer] = Runs(self.config)
        return found

    def wait(self, key: Key) -> float:
        """Expected steps until the key is needed."""
        runs = self.runs[key[0]]
        if not runs.count:  # read ahead, its layer never ran: it is about to
            return 0.0
        period = runs.period or self.time + 1  # so far one pass: the next begins where this one did
        return max(runs.last + period - self.time, 1) + period * (1 / max(runs.share(key[1]), 1e-6) - 1)

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
    return NextNeed(config)


CARD = MethodCard(
    title="A Survey on Inference Optimization Techniques for Mixture of Experts Models",
    year=2024,
    arxiv="2412.14219",
    paper="survey-inference",
    summary="Cache of experts: whose next need is expected latest goes, by frequency, company and order of layers.",
    taxonomy="inference/system/offloading/caching",
)
