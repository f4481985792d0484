"""Least frequent recently used: two parts."""

from moestro.core.expert_cache import ExpertCache, run_step
from moestro.core.registry import method
from tests.methods.serve.policies import residents


def test_a_sweep_leaves_the_privileged_part_alone() -> None:
    steps = [*"abcdab", *"efghij"]
    assert set("ab") <= set(residents("serve.lfru", 4, steps)[-1])
    assert not set("ab") & set(residents("serve.lru", 4, steps)[-1])


def test_without_a_privileged_part_it_counts() -> None:
    assert residents("serve.lfru", 2, ["a", "a", "b", "c"], privileged=0.0)[-1] == "ac"


def test_the_oldest_privileged_moves_back() -> None:
    found = method("serve.lfru")
    policy = found.module.policy(found.configure({"privileged": 0.5}))
    cache = ExpertCache(policy, 4)
    for letter in "abcdabc":
        run_step(cache, [(0, ord(letter))], 1)
    assert [chr(expert) for _, expert in policy.privileged] == ["b", "c"]
    assert policy.count[0, ord("a")] == 1
    assert policy.victim(list(cache.resident)) == (0, ord("d"))
    assert policy.victim([(0, ord("c")), (0, ord("b"))]) == (0, ord("b"))


def test_what_is_read_ahead_starts_at_zero() -> None:
    found = method("serve.lfru")
    policy = found.module.policy(found.configure({}))
    cache = ExpertCache(policy, 3)
    run_step(cache, [(0, 1)], 1)
    cache.insert((0, 2), 1)
    assert policy.count == {(0, 1): 1, (0, 2): 0}
