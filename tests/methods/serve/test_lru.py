"""Least recently used, by hand and against the stack distances of a trace."""

from collections import OrderedDict

from moestro.core.expert_cache import ExpertCache, run_step
from moestro.core.registry import method
from moestro.testing.policy_contract import stream
from tests.methods.serve.policies import residents


def test_the_one_needed_longest_ago_goes() -> None:
    assert residents("serve.lru", 3, ["a", "b", "c", "a", "d", "b"]) == ["a", "ab", "abc", "abc", "acd", "abd"]
    assert residents("serve.lru", 2, ["ab", "a", "c"]) == ["ab", "ab", "ac"]


def test_it_is_the_plain_ordered_dictionary() -> None:
    steps = stream(3, length=2000, top_k=1)
    found = method("serve.lru")
    cache = ExpertCache(found.module.policy(found.configure({})), 9)
    plain: OrderedDict[tuple[int, int], None] = OrderedDict()
    for (key,) in steps:
        missed = run_step(cache, [key], 1)
        assert missed == (key not in plain)
        plain[key] = None
        plain.move_to_end(key)
        if len(plain) > 9:
            plain.popitem(last=False)
        assert cache.resident.keys() == plain.keys()


def test_uniform_accesses_hit_as_often_as_the_cache_is_large() -> None:
    import random

    draw = random.Random(0)
    found = method("serve.lru")
    cache = ExpertCache(found.module.policy(found.configure({})), 8)
    misses = sum(run_step(cache, [(0, draw.randrange(32))], 1) for _ in range(40_000))
    assert abs(1 - misses / 40_000 - 8 / 32) < 0.01
