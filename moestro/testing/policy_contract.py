"""Checks of the entry `policy`: each plays short and long streams of steps through a cache."""

import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from moestro.core.expert_cache import ExpertCache, Key, Learner, Oracle, run_step
from moestro.core.registry import Method
from moestro.core.registry import method as method_by_id
from moestro.testing.contracts import example_config
from moestro.testing.contracts import settings_round_trip as settings_round_trip


Steps = list[list[Key]]
LAYERS, EXPERTS = 3, 8


def stream(seed: int, length: int = 300, layers: int = LAYERS, experts: int = EXPERTS, top_k: int = 2) -> Steps:
    """Steps of a token after another through all layers: skewed, with a third of repetitions; the same for a seed."""
    draw = random.Random(seed)
    weights = [1 / (1 + expert) for expert in range(experts)]
    before: dict[int, list[int]] = {}
    steps = []
    for time in range(length):
        layer = time % layers
        chosen = before.get(layer, [])
        if not chosen or draw.random() > 0.3:
            chosen = []
            while len(chosen) < top_k:
                (one,) = draw.choices(range(experts), weights)
                chosen += [] if one in chosen else [one]
        before[layer] = chosen
        steps.append([(layer, expert) for expert in chosen])
    return steps


def fresh(method: Method, steps: Steps) -> Any:
    """A policy that has been told what it asks for."""
    made = method.entry("policy")(example_config(method))
    if isinstance(made, Learner):
        made.learn(stream(99))
    if isinstance(made, Oracle):
        made.foresee(steps)
    return made


class Watched:
    """A policy behind a check of what it answers; ``shuffle`` changes the order of candidates."""

    def __init__(self, policy: Any, shuffle: random.Random | None = None) -> None:
        self.policy, self.shuffle = policy, shuffle
        self.needed: set[Key] = set()
        self.gone: list[Key] = []

    def on_access(self, key: Key, time: int) -> None:
        self.policy.on_access(key, time)

    def on_insert(self, key: Key, time: int) -> None:
        self.policy.on_insert(key, time)

    def on_evict(self, key: Key) -> None:
        self.policy.on_evict(key)

    def victim(self, candidates: Collection[Key]) -> Key:
        given = list(candidates)
        if self.shuffle is not None:
            self.shuffle.shuffle(given)
        key: Key = self.policy.victim(given)
        assert key in given, f"the victim {key} is none of the {len(given)} candidates"
        self.gone.append(key)
        return key

    def admit(self, key: Key) -> bool:
        return bool(self.policy.admit(key))


def play(policy: Any, steps: Sequence[Sequence[Key]], slots: int) -> int:
    """Misses of a stream with room for some experts; checks the accounts at every step."""
    cache = ExpertCache(policy, slots)
    misses = 0
    for keys in steps:
        missing = [key for key in keys if key not in cache.resident]
        found = run_step(cache, keys, 1)
        assert cache.used == len(cache.resident) <= slots, f"{cache.used} of {slots} slots are used"
        if len(keys) <= slots:
            assert found == len(missing), f"{found} misses where {len(missing)} keys were away"
            assert all(key in cache.resident for key in keys), "a key that was needed left in its own step"
        misses += found
    return misses


def fewest(steps: Sequence[Sequence[Key]], slots: int) -> int:
    """Misses of the best choices, by trying all: for short streams."""
    states = {frozenset[Key](): 0}
    for keys in steps:
        after: dict[frozenset[Key], int] = {}
        for held, cost in states.items():
            new = [key for key in keys if key not in held]
            keep = len(held) + len(new) - slots
            for gone in itertools.combinations(sorted(held - set(keys)), max(keep, 0)):
                state = held - set(gone) | set(keys)
                after[state] = min(cost + len(new), after.get(state, 1 << 30))
        states = after
    return min(states.values())


def short_streams() -> Iterator[tuple[Steps, int]]:
    """Streams of at most 12 steps over few experts, with one or two needed at a time."""
    for seed in range(24):
        top_k = 1 + seed % 2
        steps = stream(seed, length=12, layers=1 + seed % 3, experts=4, top_k=top_k)
        yield steps, 2 + seed % 3


def victim_is_a_candidate(method: Method) -> None:
    """See the contract."""
    for slots in (2, 5, 11):
        steps = stream(slots)
        watched = Watched(fresh(method, steps))
        play(watched, steps, slots)
        assert watched.gone, "nobody was evicted"


def order_does_not_matter(method: Method) -> None:
    """See the contract."""
    steps = stream(1)
    runs = []
    for shuffle in (None, random.Random(1), random.Random(2)):
        watched = Watched(fresh(method, steps), shuffle)
        play(watched, steps, 7)
        runs.append(watched.gone)
    assert runs[0] == runs[1] == runs[2], "other experts went when candidates came in another order"


def budget_is_kept(method: Method) -> None:
    """See the contract."""
    for slots in (1, 2, 3, 9, 23):
        steps = stream(slots, length=150, top_k=3)
        play(fresh(method, steps), steps, slots)


def room_for_all_misses_once(method: Method) -> None:
    """See the contract."""
    steps = stream(4)
    different = {key for keys in steps for key in keys}
    assert play(fresh(method, steps), steps, LAYERS * EXPERTS) == len(different)


def optimum_is_the_bound(method: Method) -> None:
    """See the contract."""
    belady = method_by_id("serve.belady")
    for steps, slots in short_streams():
        misses, bound = play(fresh(method, steps), steps, slots), fewest(steps, slots)
        assert misses >= bound, f"{misses} misses where an exhaustive search finds no way below {bound}"
        if method.id == "serve.belady":
            assert misses == bound, f"Belady misses {misses} times, the optimum is {bound}: {steps} with {slots} slots"
    for slots in (3, 6, 12, 18):
        steps = stream(slots, length=600)
        misses, bound = play(fresh(method, steps), steps, slots), play(fresh(belady, steps), steps, slots)
        assert misses >= bound, f"{misses} misses, Belady {bound}"


def keys_are_opaque(method: Method) -> None:
    """See the contract."""
    steps = stream(6)
    renamed = [[(layer + 40, 3 * expert + 1000) for layer, expert in keys] for keys in steps]
    runs = []
    for mine in (steps, renamed):
        policy = method.entry("policy")(example_config(method))
        if isinstance(policy, Learner):
            policy.learn(mine[:100])
        if isinstance(policy, Oracle):
            policy.foresee(mine)
        watched = Watched(policy)
        play(watched, mine, 7)
        runs.append(watched.gone)
    assert [(layer + 40, 3 * expert + 1000) for layer, expert in runs[0]] == runs[1], "the fate depends on the name"
