"""Belady's rule; that it is the optimum is a check of the stage."""

import pytest

from moestro.core.errors import ConfigError
from moestro.core.expert_cache import ExpertCache, run_step
from moestro.core.registry import method
from tests.methods.serve.policies import residents


def test_the_one_needed_latest_goes() -> None:
    assert residents("serve.belady", 2, ["a", "b", "c", "a", "b"], told=True) == ["a", "ab", "ac", "ac", "ab"]


def test_it_must_be_told() -> None:
    found = method("serve.belady")
    cache = ExpertCache(found.module.policy(found.configure({})), 1)
    run_step(cache, [(0, 1)], 1)
    with pytest.raises(ConfigError, match="must be told the future"):
        run_step(cache, [(0, 2)], 1)


def test_the_future_may_come_in_parts() -> None:
    found = method("serve.belady")
    policy = found.module.policy(found.configure({}))
    cache = ExpertCache(policy, 2)
    policy.foresee([[(0, 1)], [(0, 2)], [(0, 3)]])
    policy.foresee([[(0, 2)], [(0, 1)]], start=3)
    for expert in (1, 2, 3):
        run_step(cache, [(0, expert)], 1)
    assert set(cache.resident) == {(0, 2), (0, 3)}
