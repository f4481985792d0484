"""The checks of policies: an honest one passes all of them, each kind of broken one fails the one meant for it."""

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import pytest

from moestro.core.card import MethodCard
from moestro.core.config import Config
from moestro.core.expert_cache import ExpertCache, Key
from moestro.core.registry import Method
from moestro.methods.serve._contract import KEEPS
from moestro.testing import policy_contract


class Settings(Config):
    scale: float = 1.0


class Honest:
    """First in, first out."""

    def __init__(self) -> None:
        self.came: dict[Key, int] = {}
        self.count = 0

    def on_access(self, key: Key, time: int) -> None:
        pass

    def on_insert(self, key: Key, time: int) -> None:
        self.count += 1
        self.came[key] = self.count

    def on_evict(self, key: Key) -> None:
        del self.came[key]

    def victim(self, candidates: Collection[Key]) -> Key:
        return min(candidates, key=self.came.__getitem__)

    def admit(self, key: Key) -> bool:
        return True


class ForgetsWhoIsHeld(Honest):
    def victim(self, candidates: Collection[Key]) -> Key:
        return min(self.came, key=self.came.__getitem__)


class TakesTheFirst(Honest):
    def victim(self, candidates: Collection[Key]) -> Key:
        return next(iter(candidates))


class ByName(Honest):
    def victim(self, candidates: Collection[Key]) -> Key:
        return min(candidates, key=lambda key: (key[1] * 7 % 11, key))


class Declines(Honest):
    def admit(self, key: Key) -> bool:
        return key[1] % 2 == 0


def as_method(made: Callable[[], Any]) -> Method:
    card = MethodCard(title="t", year=2024, summary="s", taxonomy="losses/load")
    module: Any = SimpleNamespace(Config=Settings, CARD=card, policy=lambda config, plan=None: made())
    return Method("serve.fake", module)


@pytest.mark.parametrize("name", KEEPS["policy"])
def test_an_honest_policy_keeps_every_invariant(name: str) -> None:
    getattr(policy_contract, name)(as_method(Honest))


@pytest.mark.parametrize("name", [name for name in KEEPS["policy"] if name != "keys_are_opaque"])
def test_declining_what_was_read_is_within_the_bound(name: str) -> None:
    getattr(policy_contract, name)(as_method(Declines))


@pytest.mark.parametrize(
    ("made", "name", "words"),
    [
        (ForgetsWhoIsHeld, "victim_is_a_candidate", "is none of the"),
        (TakesTheFirst, "order_does_not_matter", "in another order"),
        (ByName, "keys_are_opaque", "depends on the name"),
    ],
)
def test_each_fault_is_found(made: Callable[[], Any], name: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        getattr(policy_contract, name)(as_method(made))


def test_misses_that_are_not_counted_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    count = policy_contract.run_step
    monkeypatch.setattr(policy_contract, "run_step", lambda *given: max(count(*given) - 1, 0))
    for name in ("budget_is_kept", "room_for_all_misses_once", "optimum_is_the_bound"):
        with pytest.raises(AssertionError):
            getattr(policy_contract, name)(as_method(Honest))


def test_what_was_declined_goes_first_and_no_room_evicts_nobody() -> None:
    cache = ExpertCache(Declines(), 3)
    for expert in (2, 4, 1):
        cache.insert((0, expert), 1)
    assert cache.make_room(1) == [(0, 1)]
    cache.insert((0, 6), 1)
    cache.hold((0, 2))
    cache.hold((0, 2))
    assert cache.make_room(3) is None
    assert len(cache.resident) == 3
    cache.let_go((0, 2))
    assert cache.held((0, 2))
    with pytest.raises(ValueError, match="does not fit: 3 of 3"):
        cache.insert((0, 9), 1)
    assert cache.make_room(2) == [(0, 4), (0, 6)]
