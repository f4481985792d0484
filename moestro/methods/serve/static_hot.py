"""Static hot experts: those that a recorded trace needed most stay, whatever is needed now.

    victim = argmin over candidates of n(e),  n(e) = needs of e in the recorded past, fixed while serving

The n hottest experts that fit settle in the cache and never leave it; the others pass through what room is left. Equal
counts: the one needed longest ago. Without a past all counts are equal, and this is LRU.

Source: the popularity lists of Fiddler (2402.07033) and the frequency placement of KTransformers, as a
cache.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.expert_cache import CachePolicy, Key


class Config(BaseConfig):
    """Settings.

    Attributes:
        hot: (layer, expert) pairs, the hottest first, before all that a recorded past says.
    """

    hot: tuple[tuple[int, int], ...] = ()


class StaticHot(CachePolicy):
    """See CachePolicy and Learner."""

    def __init__(self, hot: Sequence[Key]) -> None:
        self.rank = {key: len(hot) - place for place, key in enumerate(hot)}
        self.count: Counter[Key] = Counter()
        self.last: dict[Key, int] = {}

    def learn(self, steps: Iterable[Sequence[Key]]) -> None:
        """See Learner."""
        for keys in steps:
            self.count.update(keys)

    def on_access(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self.last[key] = time

    def on_insert(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self.last.setdefault(key, time)

    def victim(self, candidates: Collection[Key]) -> Key:
        """See CachePolicy."""
        return min(candidates, key=lambda key: (self.rank.get(key, 0), self.count[key], self.last[key], key))


def policy(config: Config, plan: Any = None) -> CachePolicy:
    """The policy."""
    return StaticHot(config.hot)


CARD = MethodCard(
    title="Fiddler: CPU-GPU Orchestration for Fast Inference of Mixture-of-Experts Models",
    year=2024,
    arxiv="2402.07033",
    paper="survey-inference",
    summary="Cache of experts: those that a recorded trace needed most stay.",
    taxonomy="inference/system/offloading/caching",
    deviations=("experts outside the list are read, not computed elsewhere",),
)
