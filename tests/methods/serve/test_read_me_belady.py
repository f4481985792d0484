"""Belady over what is known: the window in passes, re-telling, recency beyond it, and wishes for the next layers."""

import random

import numpy as np
import pytest

from moestro.core.errors import ConfigError
from moestro.core.expert_cache import ExpertCache, Key, run_step
from moestro.core.forecast import Wish
from moestro.core.registry import method
from moestro.methods.serve._parts.future import NEVER, Future
from moestro.testing.policy_contract import stream
from tests.methods.serve.policies import residents


METHOD = method("serve.read_me_belady")


def misses(steps: list[list[Key]], slots: int, name: str = "serve.read_me_belady", **config: int) -> int:
    found = method(name)
    made = found.entry("policy")(found.configure(config))
    if hasattr(made, "foresee"):
        made.foresee(steps)
    cache = ExpertCache(made, slots)
    return sum(run_step(cache, keys, 1) for keys in steps)


def test_only_the_window_counts() -> None:
    steps = ["a", "b", "c", "a", "b"]
    # At c: a comes in 1 pass, b in 2. Who sees a alone lets b go; who sees nothing lets a go, needed longest ago.
    assert residents("serve.read_me_belady", 2, steps, told=True, lookahead=2)[2] == "ac"
    assert residents("serve.read_me_belady", 2, steps, told=True, lookahead=1)[2] == "ac"
    assert residents("serve.read_me_belady", 2, steps, told=True, lookahead=0)[2] == "bc"


def test_a_pass_is_all_layers() -> None:
    # Two layers a pass: at the second layer of the first pass the next pass is known whole, or not at all.
    steps: list[list[Key]] = [[(0, 1)], [(1, 5)], [(0, 2)], [(1, 6)], [(0, 1)], [(1, 5)]]
    made = METHOD.module.KnownFuture(1)
    made.foresee(steps)
    ends = []
    for time, keys in enumerate(steps):
        for key in keys:
            made.on_access(key, time)
        ends.append(made._end)
    assert ends == [4, 4, 6, 6, 6, 6]


@pytest.mark.parametrize("slots", [6, 8, 11])
def test_between_recency_and_the_optimum(slots: int) -> None:
    steps = stream(slots, length=900)
    bound, recency = misses(steps, slots, "serve.belady"), misses(steps, slots, "serve.lru")
    found = [misses(steps, slots, lookahead=ahead) for ahead in (0, 1, 2, 4, 8, 400)]
    assert found[-1] == bound
    assert bound <= min(found)
    assert recency > found[1] > bound
    assert found[0] > found[1] > found[2] >= found[3] >= found[4]


def test_what_is_told_again_replaces_what_was_told() -> None:
    draw = random.Random(0)
    steps = stream(5, length=300)
    whole = METHOD.module.KnownFuture(4)
    parts = METHOD.module.KnownFuture(4)
    whole.foresee(steps)
    caches = [ExpertCache(whole, 6), ExpertCache(parts, 6)]
    for time in range(0, 300, 3):
        wrong = [[(layer, draw.randrange(8))] for layer in range(3)] * 5
        parts.foresee(wrong, time)
        parts.foresee(steps[time : time + 15], time)  # the running pass and four more
        for at in range(time, time + 3):
            found = [run_step(cache, steps[at], 1) for cache in caches]
            assert found[0] == found[1]
            assert set(caches[0].resident) == set(caches[1].resident)


def test_a_future_told_again_from_its_first_step_on() -> None:
    future = Future()
    future.tell([[(0, 1)], [(0, 2)], [(0, 1)]], 4)
    future.tell([[(0, 3), (0, 3)], [(0, 2)]], 4)
    assert [future.next((0, expert), 3) for expert in (1, 2, 3)] == [NEVER, 5, 4]
    assert [future.next((0, expert), 4) for expert in (2, 3)] == [5, NEVER]
    assert future.until == 6


def test_needs_that_did_not_come_are_past() -> None:
    made = METHOD.module.KnownFuture(9)
    made.foresee([[(0, 1)], [(0, 2)], [(0, 3)], [(0, 2)]])
    for time in range(3):
        made.on_access((0, 7), time)
        made.on_insert((0, time + 1), time)
    assert made.victim([(0, 1), (0, 2), (0, 3)]) == (0, 1)  # never again; 2 comes, 3 came longest ago after it
    assert made.victim([(0, 2), (0, 3)]) == (0, 3)


def test_it_must_be_told() -> None:
    with pytest.raises(ConfigError, match="knows the queue of a model whose router reads token ids only"):
        misses_of_nobody_told()


def misses_of_nobody_told() -> None:
    cache = ExpertCache(METHOD.module.policy(METHOD.configure({})), 1)
    run_step(cache, [(0, 1)], 1)
    run_step(cache, [(0, 2)], 1)


def test_wishes_are_what_the_next_layers_take() -> None:
    forecast = METHOD.module.forecast(METHOD.configure({"layers_ahead": 2}))
    forecast.meet([0, 4, 4, 0, 3])
    ids = np.array([[2], [3], [3], [-1]], np.int32)
    assert forecast.routed(1, ids, None) == [Wish(2, (3, 2), 1), Wish(4, (2,), 2)]
    assert forecast.routed(2, ids, None) == [Wish(4, (2,), 1)]
    near = METHOD.module.forecast(METHOD.configure({}))
    near.meet([0, 4, 4, 0, 3])
    assert near.routed(1, ids, None) == [Wish(2, (3, 2), 1)]
    assert forecast.routed(4, ids, None) == []
    assert forecast.begin(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32)) == []


@pytest.mark.parametrize("values", [{"lookahead": -1}, {"layers_ahead": 0}, {"passes": 3}])
def test_settings_are_checked(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        METHOD.configure(values)
