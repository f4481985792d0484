"""Belady's rule over the queue: with a router of token ids, what waits says which experts will be needed.

    victim = argmax over candidates of F(e, now),  F(e, t) = the first step after t, as far as is known, that needs e

F is infinite for whom no known step needs; equal F: the one needed longest ago. Known is what the running pass through
the model still needs and, for ``lookahead`` more passes, what the queued prompts need: which expert a token takes is a
function of token ids, so a queue is a future. Tokens that are yet to be generated are not. In the simulator, where the
whole trace could be known, only the next ``lookahead`` passes are looked at: with none, the running pass alone.

As a forecast it wishes for the experts of the next layers: those of the running pass, which all such layers share. Its
wishes are what will be needed, so nothing is read in vain.

Source: Read-ME (2410.19123, section 4): prefetching by pre-gating, and its cache with Belady's rule.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.expert_cache import CachePolicy, Key
from moestro.core.forecast import Forecast, Ints, Peek, Wish
from moestro.methods.serve._parts.future import NEVER, Foreseeing


class Config(BaseConfig):
    """Settings.

    Attributes:
        lookahead: passes through the model, behind the running one, whose needs are known. layers_ahead: layers that
            are wished for while one runs.
    """

    lookahead: int = Field(default=16, ge=0)
    layers_ahead: int = Field(default=1, ge=1)


class KnownFuture(Foreseeing):
    """See CachePolicy and Oracle. A pass begins where the layers of the told steps start over."""

    untold = (
        "serve.read_me_belady knows the queue of a model whose router reads token ids only (train.read_me), or a "
        "recorded trace; use serve.lru or another policy"
    )

    def __init__(self, lookahead: int) -> None:
        super().__init__()
        self.lookahead = lookahead
        self._end = 0  # the first step that is not known
        self._starts: deque[int] = deque()  # steps with which known passes begin
        self._layer: int | None = None  # the last told step's

    def foresee(self, steps: Iterable[Sequence[Key]], start: int = 0) -> None:
        """See Oracle."""
        if start < self.future.until:
            self._layer = None
        while self._starts and self._starts[-1] >= start:
            self._starts.pop()
        told = [list(keys) for keys in steps]
        for time, keys in enumerate(told, start):
            if keys:
                if self._layer is None or keys[0][0] <= self._layer:
                    self._starts.append(time)
                self._layer = keys[0][0]
        super().foresee(told, start)
        self._end = self._horizon(self.now + 1)

    def _horizon(self, time: int) -> int:
        while len(self._starts) > 1 and self._starts[1] <= time:
            self._starts.popleft()
        behind = self.lookahead + 1
        return self._starts[behind] if behind < len(self._starts) else self.future.until

    def on_access(self, key: Key, time: int) -> None:
        """See CachePolicy."""
        super().on_access(key, time)
        self._end = self._horizon(time)

    def next(self, key: Key) -> int:
        """See Foreseeing; needs behind the known passes are none."""
        found = super().next(key)
        return found if found < self._end else NEVER


class KnownExperts(Forecast):
    """See Forecast; of models in which a token takes the same expert in all layers."""

    name = "serve.read_me_belady"
    needs_token_router = True

    def __init__(self, config: Config) -> None:
        self.policy = KnownFuture(config.lookahead)
        self.layers_ahead = config.layers_ahead
        self.layers: list[int] = []
        self.experts: Sequence[int] = ()

    def meet(self, experts: Sequence[int]) -> None:
        """See Forecast."""
        self.experts = experts
        self.layers = [layer for layer, count in enumerate(experts) if count]

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        """See Forecast. The experts that most rows take come first."""
        found, count = np.unique(ids[ids >= 0], return_counts=True)
        order = found[np.argsort(-count, kind="stable")].tolist()
        later = [other for other in self.layers if other > layer][: self.layers_ahead]
        wishes = [
            Wish(other, tuple(expert for expert in order if expert < self.experts[other]), distance)
            for distance, other in enumerate(later, 1)
        ]
        return [wish for wish in wishes if wish.experts]


def policy(config: Config, plan: Any = None) -> CachePolicy:
    """The policy."""
    return KnownFuture(config.lookahead)


def forecast(config: Config, plan: Any = None) -> Forecast:
    """The forecast, and in its attribute ``policy`` the policy."""
    return KnownExperts(config)


CARD = MethodCard(
    title="Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
    year=2024,
    arxiv="2410.19123",
    paper="read-me",
    summary="Cache of experts: the one that the queue needs latest goes; the next layers' experts are read ahead.",
    taxonomy="inference/system/offloading/caching",
    deviations=("the cache counts experts of layers under one budget, not one slot count for each layer",),
)
