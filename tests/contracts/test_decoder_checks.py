"""The checks of decoders: an honest one passes all of them, each kind of broken one fails the one meant for it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moestro.core.config import Config
from moestro.core.registry import Method, infos
from moestro.methods.serve._contract import KEEPS
from moestro.testing import decoder_contract
from moestro.testing.contracts import checks_of


class Settings(Config):
    scale: float = 1.0


class Honest:
    name, exact = "serve.own", False
    routes = (None, None)

    def combine(self, logits: Any) -> Any:
        return logits.mean(axis=0)


class Flat(Honest):
    def combine(self, logits: Any) -> Any:
        return logits


class Spoils(Honest):
    def combine(self, logits: Any) -> Any:
        logits += 1
        return logits[0]


class Closes(Honest):
    def combine(self, logits: Any) -> Any:
        return np.full_like(logits[0], -np.inf)


class Remembers(Honest):
    def __init__(self) -> None:
        self.sum = 0.0

    def combine(self, logits: Any) -> Any:
        self.sum += 1
        return logits[0] * np.float32(self.sum)


class Overrules(Honest):
    def combine(self, logits: Any) -> Any:
        return -logits[0]


class Pretends(Honest):
    exact = True


class Elsewhere(Honest):
    name = "serve.other"


def method_of(made: Callable[[], Any]) -> Method:
    module = SimpleNamespace(Config=Settings, policy=lambda config, plan=None: made())
    return Method("serve.own", module)  # type: ignore[arg-type]


BROKEN = [
    (Flat, "a_row_of_logits"),
    (Spoils, "a_row_of_logits"),
    (Closes, "a_row_of_logits"),
    (Remembers, "rows_are_independent"),
    (Overrules, "equal_passes_are_the_model"),
    (Pretends, "exact_is_exact"),
    (Elsewhere, "it_is_named"),
]


@pytest.mark.parametrize("name", KEEPS["decoder"])
def test_an_honest_decoder_passes(name: str) -> None:
    getattr(decoder_contract, name)(method_of(Honest))


@pytest.mark.parametrize(("broken", "name"), BROKEN)
def test_a_broken_one_fails(broken: type[Honest], name: str) -> None:
    with pytest.raises(AssertionError):
        getattr(decoder_contract, name)(method_of(broken))


def test_each_check_is_shown_to_fail() -> None:
    assert {name for _, name in BROKEN} == set(KEEPS["decoder"]) - {"settings_round_trip"}


def test_what_a_policy_returns_decides_which_contract_it_is_under() -> None:
    assert infos()["serve.scmoe"].acts == "Decoder"
    assert infos()["serve.lru"].acts == "CachePolicy"
    assert all(name.startswith("decoder.") for name in checks_of("serve.scmoe"))
    assert all(name.startswith("policy.") for name in checks_of("serve.lru"))
