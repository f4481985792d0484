"""The checks of batchers: an honest one passes all of them, each kind of broken one fails the one meant for it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from moestro.core.batching import in_order
from moestro.core.config import Config
from moestro.core.registry import Method, infos
from moestro.methods.serve._contract import KEEPS
from moestro.testing import batcher_contract
from moestro.testing.contracts import checks_of


class Settings(Config):
    scale: float = 1.0


class Honest:
    name, needs_experts = "serve.own", False

    def take(self, pending: Any, rows: int) -> list[int]:
        return in_order(pending, rows)


class Greedy(Honest):
    def take(self, pending: Any, rows: int) -> list[int]:
        return [item.count for item in pending]


class Idle(Honest):
    def take(self, pending: Any, rows: int) -> list[int]:
        return [0] * len(pending)


class Stops(Honest):
    def __init__(self) -> None:
        self.steps = 0

    def take(self, pending: Any, rows: int) -> list[int]:
        self.steps += 1
        return super().take(pending, rows) if self.steps < 3 else [0] * len(pending)


class Remembers(Honest):
    def __init__(self) -> None:
        self.steps = 0

    def take(self, pending: Any, rows: int) -> list[int]:
        self.steps += 1
        return super().take(pending, max(rows - self.steps % 2, 1))


class Elsewhere(Honest):
    name = "serve.other"


def method_of(made: Callable[[], Any]) -> Method:
    module = SimpleNamespace(Config=Settings, policy=lambda config, plan=None: made())
    return Method("serve.own", module)  # type: ignore[arg-type]


BROKEN = [
    (Greedy, "takes_what_is_there"),
    (Idle, "takes_what_is_there"),
    (Stops, "everything_runs"),
    (Remembers, "choices_are_repeatable"),
    (Elsewhere, "it_is_named"),
]


@pytest.mark.parametrize("name", KEEPS["batcher"])
def test_an_honest_batcher_passes(name: str) -> None:
    getattr(batcher_contract, name)(method_of(Honest))


@pytest.mark.parametrize(("broken", "name"), BROKEN)
def test_a_broken_one_fails(broken: type[Honest], name: str) -> None:
    with pytest.raises(AssertionError):
        getattr(batcher_contract, name)(method_of(broken))


def test_each_check_is_shown_to_fail() -> None:
    assert {name for _, name in BROKEN} == set(KEEPS["batcher"]) - {"settings_round_trip"}


def test_what_a_policy_returns_decides_which_contract_it_is_under() -> None:
    assert infos()["serve.read_me_batching"].acts == "Batcher"
    assert all(name.startswith("batcher.") for name in checks_of("serve.read_me_batching"))
