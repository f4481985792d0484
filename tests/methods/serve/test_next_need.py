"""Expected next need: frequencies against distance, scans, and the heap against the formula."""

import random

import pytest

from moestro.core.expert_cache import ExpertCache, run_step
from moestro.core.registry import method
from tests.methods.serve.policies import residents


METHOD = method("serve.next_need")


def made(**config: float) -> object:
    return METHOD.entry("policy")(METHOD.configure(config))


def hits(policy: object, steps: list[list[tuple[int, int]]], slots: int) -> int:
    cache = ExpertCache(policy, slots)  # type: ignore[arg-type]
    return sum(len(keys) - run_step(cache, keys, 1) for keys in steps)


def test_the_one_needed_least_often_goes() -> None:
    assert residents("serve.next_need", 2, ["a", "a", "b", "c", "b", "b", "b", "b", "c"])[-2:] == ["ab", "bc"]


def test_a_short_half_life_forgets() -> None:
    steps = ["a"] * 6 + ["b"] * 3 + ["c"]
    assert residents("serve.next_need", 2, steps)[-1] == "ac"
    assert residents("serve.next_need", 2, steps, half_life=0.5)[-1] == "bc"


def test_a_scan_keeps_one_part_instead_of_none() -> None:
    """Six layers of four experts, all needed every time, with room for twelve of them."""
    steps = [[(layer, expert) for expert in range(4)] for _ in range(10) for layer in range(6)]
    lru = method("serve.lru")
    assert hits(lru.entry("policy")(lru.configure({})), steps, 12) == 0
    belady = method("serve.belady")
    bound = belady.entry("policy")(belady.configure({}))
    bound.foresee(steps)
    assert hits(made(), steps, 12) >= 0.8 * hits(bound, steps, 12) > 0


def test_equal_frequencies_go_by_the_distance_of_their_layer() -> None:
    policy = made()
    for time, key in enumerate([(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2), (0, 1)]):
        policy.on_access(key, time)  # type: ignore[attr-defined]
    assert policy.wait((1, 2)) < policy.wait((2, 2))  # type: ignore[attr-defined]
    assert policy.wait((2, 2)) - policy.wait((1, 2)) == pytest.approx(1)  # type: ignore[attr-defined]
    decay = 0.5 ** (1 / 32)
    needed_first = 1 + 3 * ((1 + decay) / decay - 1)  # in the first of two runs; every third step is one, the next too
    assert policy.wait((1, 1)) == pytest.approx(needed_first)  # type: ignore[attr-defined]
    assert policy.victim([(1, 2), (2, 2)]) == (2, 2)  # type: ignore[attr-defined]


def test_victims_of_a_step_are_those_of_the_formula() -> None:
    draw, policy = random.Random(0), made(half_life=8.0)
    cache = ExpertCache(policy, 15)  # type: ignore[arg-type]
    checked = 0
    victim = policy.victim  # type: ignore[attr-defined]

    def watched(candidates: list[tuple[int, int]]) -> tuple[int, int]:
        nonlocal checked
        checked += 1
        wanted = min(candidates, key=lambda key: (-policy.wait(key), key))  # type: ignore[attr-defined]
        found: tuple[int, int] = victim(candidates)
        assert found == wanted
        return found

    policy.victim = watched  # type: ignore[attr-defined]
    for time in range(240):
        run_step(cache, [(time % 4, expert) for expert in draw.sample(range(8), 3)], 1)
    assert checked > 200


def test_what_was_read_ahead_of_the_first_run_of_its_layer_stays() -> None:
    policy = made()
    policy.on_access((0, 0), 0)  # type: ignore[attr-defined]
    policy.on_insert((1, 0), 0)  # type: ignore[attr-defined]
    assert policy.victim([(0, 0), (1, 0)]) == (0, 0)  # type: ignore[attr-defined]


def test_a_layer_that_ran_once_comes_back_after_one_pass() -> None:
    policy = made()
    for time in range(3):
        policy.on_access((time, 0), time)  # type: ignore[attr-defined]
    assert [policy.wait((layer, 0)) for layer in range(3)] == [1, 2, 3]  # type: ignore[attr-defined]


def test_one_that_left_and_came_back_within_a_step_may_leave_again() -> None:
    policy = made()
    policy.on_access((0, 0), 0)  # type: ignore[attr-defined]
    policy.on_access((1, 0), 1)  # type: ignore[attr-defined]
    both = [(0, 0), (1, 0)]
    assert policy.victim(both) == (1, 0)  # type: ignore[attr-defined]
    assert policy.victim([(0, 0)]) == (0, 0)  # type: ignore[attr-defined]
    assert policy.victim(both) == (1, 0)  # type: ignore[attr-defined]


def test_what_follows_the_last_choice_stays() -> None:
    """Three experts take turns: by frequency the third goes, by company it comes next."""
    turns = [1, 2, 3, 1, 2, 3, 1, 2]
    for company, gone in ((0.0, (0, 3)), (0.7, (0, 1))):
        policy = made(company=company, half_life=1e12, pair_half_life=1e12)
        for time, expert in enumerate(turns, start=1):
            policy.on_access((0, expert), time)  # type: ignore[attr-defined]
        assert policy.victim([(0, 1), (0, 3)]) == gone  # type: ignore[attr-defined]
    often = {1: 3 / 8, 3: 2 / 8}
    after = {1: (0 + 4 * 3 / 8) / (2 + 4), 3: (2 + 4 * 2 / 8) / (2 + 4)}  # two of the runs that needed 2 were followed
    for expert in (1, 3):
        share = 0.3 * often[expert] + 0.7 * after[expert]
        assert policy.wait((0, expert)) == pytest.approx(1 / share)  # type: ignore[attr-defined]


def test_company_is_the_mean_over_what_the_last_run_needed_and_ages() -> None:
    policy = made(company=1.0, half_life=1e12, pair_half_life=1)
    runs = [(1, 2), (3,), (1,), (4,), (1, 2)]
    for time, needed in enumerate(runs, start=1):
        for expert in needed:
            policy.on_access((0, expert), time)  # type: ignore[attr-defined]
    # 1 was followed by 3, then by 4; 2 by 3 alone. What is one such run old counts half.
    after_1 = (0.5 + 4 * 1 / 5) / (1.5 + 4)
    after_2 = (1.0 + 4 * 1 / 5) / (1.0 + 4)
    assert policy.wait((0, 3)) == pytest.approx(2 / (after_1 + after_2))  # type: ignore[attr-defined]
    after_1 = (1.0 + 4 * 1 / 5) / (1.5 + 4)
    after_2 = (0.0 + 4 * 1 / 5) / (1.0 + 4)
    assert policy.wait((0, 4)) == pytest.approx(2 / (after_1 + after_2))  # type: ignore[attr-defined]


def test_layers_of_many_experts_go_by_frequency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHOD.module, "MOST", 2)
    waits = []
    for company in (0.0, 0.7):
        policy = made(company=company)
        for time, expert in enumerate([1, 600, 2, 600, 1, 2, 600, 1], start=1):
            policy.on_access((0, expert), time)  # type: ignore[attr-defined]
        waits.append([policy.wait((0, expert)) for expert in (1, 2, 600)])  # type: ignore[attr-defined]
    assert waits[0] == waits[1]


def test_experts_that_were_read_ahead_count_though_nobody_needed_them() -> None:
    policy = made()
    policy.on_insert((3, 9), 1)  # type: ignore[attr-defined]
    assert policy.wait((3, 9)) == 0, "its layer is about to run"  # type: ignore[attr-defined]
    policy.on_access((0, 1), 2)  # type: ignore[attr-defined]
    policy.on_insert((0, 5), 2)  # type: ignore[attr-defined]
    assert policy.wait((0, 5)) > policy.wait((0, 1))  # type: ignore[attr-defined]
