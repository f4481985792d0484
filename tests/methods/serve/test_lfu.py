"""Least frequently used, with and without a half-life."""

import math

import pytest

from moestro.core.registry import method
from tests.methods.serve.policies import residents


def test_the_one_needed_least_often_goes() -> None:
    assert residents("serve.lfu", 2, ["a", "a", "b", "c", "b", "b", "c"])[2:] == ["ab", "ac", "ab", "ab", "bc"]


def test_equal_counts_go_by_time() -> None:
    assert residents("serve.lfu", 2, ["a", "b", "c"]) == ["a", "ab", "bc"]


def test_a_half_life_forgets() -> None:
    steps = ["a"] * 6 + ["b"] * 3 + ["c"]
    assert residents("serve.lfu", 2, steps)[-1] == "ac"
    assert residents("serve.lfu", 2, steps, half_life=1.0)[-1] == "bc"


def test_counts_are_the_decayed_sums() -> None:
    found = method("serve.lfu")
    policy = found.module.policy(found.configure({"half_life": 7.0}))
    times = [0, 3, 4, 20, 21, 40]
    for time in times:
        policy.on_access((0, 1), time)
    expected = sum(2 ** (-(100 - time) / 7.0) for time in times)
    assert 2 ** (policy.count[0, 1] - 100 / 7.0) == pytest.approx(expected)
    policy.on_access((0, 1), 10**7)
    assert math.isfinite(policy.count[0, 1])
