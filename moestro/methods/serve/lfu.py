"""Least frequently used: who was needed least often goes; with a half-life, old needs count less.

    victim = argmin over candidates of n(e),  n(e) = sum over past needs t of 2^(-(now - t) / half_life)

Counts outlive eviction. Because 2^(now / half_life) scales all counts alike, they are kept as
s(e) = log2 sum_t 2^(t / half_life), which needs no ageing and cannot overflow. Equal counts: the one needed longest
ago.

Source: the frequency caches among the offloading systems of 2412.14219; the half-life is ours.
"""

import math
from collections.abc import Collection
from typing import Any

from pydantic import Field

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.expert_cache import CachePolicy, Key


class Config(BaseConfig):
    """Settings.

    Attributes:
        half_life: steps (layers run) after which a need counts half; None counts all alike.
    """

    half_life: float | None = Field(default=None, gt=0)


class LeastFrequentlyUsed(CachePolicy):
    """See CachePolicy."""

    def __init__(self, half_life: float | None) -> None:
        self.half_life = half_life
        self.count: dict[Key, float] = {}
        self.last: dict[Key, int] = {}

    def on_access(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self.count[key] = self._more(self.count.get(key), time)
        self.last[key] = time

    def _more(self, before: float | None, time: int) -> float:
        if self.half_life is None:
            return 1.0 + (before or 0.0)
        new = time / self.half_life
        if before is None:
            return new
        high, low = max(before, new), min(before, new)
        return high + math.log2(1.0 + 2.0 ** max(low - high, -60.0))

    def on_insert(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        self.last.setdefault(key, time)

    def victim(self, candidates: Collection[Key]) -> Key:
        """See CachePolicy."""
        return min(candidates, key=lambda key: (self.count.get(key, -math.inf), self.last[key], key))


def policy(config: Config, plan: Any = None) -> CachePolicy:
    """The policy."""
    return LeastFrequentlyUsed(config.half_life)


CARD = MethodCard(
    title="A Survey on Inference Optimization Techniques for Mixture of Experts Models",
    year=2024,
    arxiv="2412.14219",
    paper="survey-inference",
    summary="Cache of experts: the one needed least often goes; old needs may count less.",
    taxonomy="inference/system/offloading/caching",
)
