"""Static hot experts."""

from moestro.core.expert_cache import ExpertCache, run_step
from moestro.core.registry import method
from tests.methods.serve.policies import residents


def test_listed_experts_stay() -> None:
    hot = [(0, ord("a")), (0, ord("b"))]
    steps = ["a", "c", "b", "d", "e", "d", "d"]
    assert residents("serve.static_hot", 3, steps, hot=hot)[2:] == ["abc", "abd", "abe", "abd", "abd"]


def test_a_past_ranks_the_rest() -> None:
    found = method("serve.static_hot")
    policy = found.module.policy(found.configure({}))
    policy.learn([[(0, 1)], [(0, 1), (0, 2)], [(0, 2)], [(0, 1)]])
    cache = ExpertCache(policy, 2)
    for expert in (1, 2, 3, 4):
        run_step(cache, [(0, expert)], 1)
    assert set(cache.resident) == {(0, 1), (0, 4)}
