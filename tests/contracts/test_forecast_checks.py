"""The checks of forecasts: an honest one passes all of them, each kind of broken one fails the one meant for it."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moestro.core.card import MethodCard
from moestro.core.config import Config
from moestro.core.forecast import Floats, Forecast, Ints, Peek, Recorded, Wish
from moestro.core.registry import Method
from moestro.engine.native_forward import NativeForward
from moestro.methods.serve._contract import KEEPS
from moestro.testing import forecast_contract


class Settings(Config):
    scale: float = 1.0


class Honest(Forecast):
    """The first two experts of the next mixture, and what the gate likes best."""

    name = "serve.fake"

    def meet(self, experts: Sequence[int]) -> None:
        self.experts = experts

    def later(self, layer: int) -> int | None:
        return next((at for at in range(layer + 1, len(self.experts)) if self.experts[at]), None)

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        later = self.later(layer)
        if later is None:
            return []
        return [Wish(later, tuple(np.unique(peek(later).argmax(1)).tolist()))]


class Learns(Honest):
    """What was routed to in the past."""

    def study(self, past: Recorded) -> None:
        self.often = {layer: int(np.bincount(ids[ids >= 0]).argmax()) for layer, ids in past.routes.items()}

    def begin(self, tokens: Ints, positions: Ints, sequences: Ints) -> list[Wish]:
        return [Wish(layer, (expert,), 2) for layer, expert in self.often.items()]


class LooksBack(Honest):
    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        return [Wish(layer, (0,))]


class WishesTwice(Honest):
    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        return [wish for wish in super().routed(layer, ids, peek) for _ in range(2)]


class WishesForTooMany(Honest):
    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        later = self.later(layer)
        return [] if later is None else [Wish(later, (7,))]


class WishesInNumpy(Honest):
    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        later = self.later(layer)
        return [] if later is None else [Wish(later, tuple(peek(later).argmax(1)[:1]))]


class Pushes(Honest):
    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        return [Wish(wish.layer, wish.experts, 0) for wish in super().routed(layer, ids, peek)]


class PeeksAtDense(Honest):
    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        peek(3)
        return []


class Silent(Honest):
    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        return []


class Counts(Honest):
    """Grows with every step it has ever seen."""

    def meet(self, experts: Sequence[int]) -> None:
        super().meet(experts)
        self.count = 0

    def begin(self, tokens: Ints, positions: Ints, sequences: Ints) -> list[Wish]:
        self.count += 1
        return [Wish(1, (self.count % 5,))]


class Random(Honest):
    made = 0

    def meet(self, experts: Sequence[int]) -> None:
        super().meet(experts)
        Random.made += 1

    def begin(self, tokens: Ints, positions: Ints, sequences: Ints) -> list[Wish]:
        return [Wish(1, (Random.made % 8,))]


class Meddles(Honest):
    """Changes the routes it is shown."""

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        ids[:] = 0
        return []


class Nameless(Honest):
    name = "serve.other"


class Changed(NativeForward):
    """A forward that a forecast changes."""

    def step(self, batch: Any) -> Floats:
        return super().step(batch) + (self.forecast is not None)


def as_method(made: Callable[[], Any]) -> Method:
    card = MethodCard(title="t", year=2024, summary="s", taxonomy="losses/load")
    module: Any = SimpleNamespace(Config=Settings, CARD=card, forecast=lambda config, plan=None: made())
    return Method("serve.fake", module)


@pytest.mark.parametrize("name", KEEPS["forecast"])
@pytest.mark.parametrize("made", [Honest, Learns])
def test_an_honest_forecast_keeps_every_invariant(made: Callable[[], Any], name: str) -> None:
    getattr(forecast_contract, name)(as_method(made))


@pytest.mark.parametrize(
    ("made", "name", "words"),
    [
        (LooksBack, "wishes_can_be_read", "layer 1 wishes for layer 1 of 5"),
        (WishesTwice, "wishes_can_be_read", "comes twice"),
        (WishesForTooMany, "wishes_can_be_read", "layer 4 has no expert 7"),
        (WishesInNumpy, "wishes_can_be_read", "is a int64"),
        (Pushes, "wishes_can_be_read", "priority 0"),
        (PeeksAtDense, "wishes_can_be_read", "layer 3, which has no experts"),
        (Silent, "wishes_can_be_read", "wishes for nothing"),
        (Random, "wishes_are_repeatable", "wish for other experts"),
        (Counts, "ends_are_forgotten", "shows in the wishes of another"),
        (Nameless, "it_is_named", "calls itself serve.other"),
    ],
)
def test_each_fault_is_found(made: Callable[[], Any], name: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        getattr(forecast_contract, name)(as_method(made))


def test_other_outputs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="read-only"):
        forecast_contract.outputs_are_the_model(as_method(Meddles))
    monkeypatch.setattr(forecast_contract, "NativeForward", Changed)
    with pytest.raises(AssertionError, match="other logits than without the forecast, in 2 slots"):
        forecast_contract.outputs_are_the_model(as_method(Honest))
