"""Playing by hand: who is in a small cache after each step."""

from typing import Any

from moestro.core.expert_cache import ExpertCache, run_step
from moestro.core.registry import method


def residents(policy_id: str, slots: int, steps: list[str], *, told: bool = False, **config: Any) -> list[str]:
    """After each step the experts held, as sorted letters; a step is the letters it needs. All are of layer 0."""
    found = method(policy_id)
    made = found.module.policy(found.configure(config))
    keys = [[(0, ord(letter)) for letter in step] for step in steps]
    if told:
        made.foresee(keys)
    cache = ExpertCache(made, slots)
    seen = []
    for step in keys:
        run_step(cache, step, 1)
        seen.append("".join(sorted(chr(expert) for _, expert in cache.resident)))
    return seen
