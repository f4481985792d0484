"""A cache of experts under a budget of bytes: who is in it, who must stay, who goes.

The same objects run in the simulator and in the engine's store, so that both evict the same experts. Items are opaque
(key, bytes): an expert, a layer or a whole model. Light: nothing heavy is imported.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Final, Protocol, runtime_checkable

from moestro.core.errors import ConfigError


Key = tuple[int, int]
"""(layer, expert); policies know layers and experts by their numbers alone."""

DEFAULT_POLICY: Final = "serve.next_need"
"""Method of who leaves where nobody chose one: it reads least on recorded and on made-up routings alike."""


class CachePolicy(Protocol):
    """Decides who goes. Times are numbers of steps, one for each layer that runs, growing; several keys share one.

    A policy may inherit from this: then what it does not say about evictions is nothing, and all may stay.
    """

    def on_access(self, key: Key, time: int) -> None:
        """A key is needed now, whether or not it is in the cache."""

    def on_insert(self, key: Key, time: int) -> None:
        """A key came into the cache, because it was needed or ahead of need."""

    def on_evict(self, key: Key) -> None:
        """A key left the cache."""
        return

    def victim(self, candidates: Collection[Key]) -> Key:
        """One of the candidates, none of which is needed now; the same whatever their order. They are a view: they
        change once the victim has left."""

    def admit(self, key: Key) -> bool:
        """Whether a key that was just read shall be kept; one that shall not goes before any other."""
        return True


@runtime_checkable
class Learner(Protocol):
    """A policy that learns from what was needed in the past."""

    def learn(self, steps: Iterable[Sequence[Key]]) -> None:
        """Recorded steps, each the keys that one layer needed."""


@runtime_checkable
class Oracle(Protocol):
    """A policy that must be told what will be needed."""

    def foresee(self, steps: Iterable[Sequence[Key]], start: int = 0) -> None:
        """What the steps ``start``, ``start + 1`` ... will need; more may be told later, and replaces what overlaps."""


class _Without(Collection[Key]):
    """Keys but for some, as they are now; nothing is copied."""

    def __init__(self, keys: Collection[Key], without: Collection[Key]) -> None:
        self.keys, self.without = keys, without

    def __contains__(self, key: object) -> bool:
        return key in self.keys and key not in self.without

    def __iter__(self) -> Iterator[Key]:
        return (key for key in self.keys if key not in self.without)

    def __len__(self) -> int:
        return len(self.keys) - sum(key in self.keys for key in self.without)


class ExpertCache:
    """Who is resident, within a budget that no event exceeds.

    Args:
        policy: who goes. budget: bytes.

    Attributes:
        used: bytes taken. time: number of the current step. resident: key -> bytes.
    """

    def __init__(self, policy: CachePolicy, budget: int) -> None:
        if budget < 1:
            raise ConfigError(f"budget={budget} bytes; a cache needs at least one")
        self.policy, self.budget = policy, budget
        self.used = 0
        self.time = -1
        self.resident: dict[Key, int] = {}
        self._held: dict[Key, int] = {}
        self._loose: dict[Key, None] = {}  # in the cache and not held
        self._passing: dict[Key, None] = {}
        self._spared: dict[int, frozenset[Key]] = {}

    def step(self, keys: Iterable[Key]) -> None:
        """The next step needs these keys."""
        self.time += 1
        for key in keys:
            self.policy.on_access(key, self.time)

    def hold(self, key: Key) -> None:
        """Keep a key from being evicted; once for each ``let_go``. Its bytes need not be there yet."""
        self._held[key] = self._held.get(key, 0) + 1
        self._loose.pop(key, None)

    def let_go(self, key: Key) -> None:
        """Undo one ``hold``."""
        left = self._held[key] - 1
        if left:
            self._held[key] = left
        else:
            del self._held[key]
            if key in self.resident:
                self._loose[key] = None

    def held(self, key: Key) -> bool:
        """Whether a key may not be evicted."""
        return key in self._held

    def held_bytes(self, without: Collection[Key] = ()) -> int:
        """Bytes in the cache that may not be evicted, but for some keys."""
        return sum(self.resident.get(key, 0) for key in self._held if key not in without)

    def spare(self, group: int, keys: Collection[Key]) -> None:
        """Keys of a group that are wished for: they go after all others. Replaces what the group spared before."""
        if keys:
            self._spared[group] = frozenset(keys)
        else:
            self._spared.pop(group, None)

    def room(self, *, ahead: bool = False) -> int:
        """Bytes that are free or can be made so; ``ahead`` of need, what is spared stays."""
        found = self.budget - self.held_bytes()
        if ahead:
            found -= sum(self.resident.get(key, 0) for key in self._wished() if key not in self._held)
        return found

    def _wished(self) -> frozenset[Key]:
        return frozenset().union(*self._spared.values())

    def make_room(self, nbytes: int, *, ahead: bool = False) -> list[Key] | None:
        """Evict until ``nbytes`` more fit; the keys that went.

        Returns:
            None where what is held, and ``ahead`` of need also what is spared, leaves too little room; nothing is
            evicted then.
        """
        free = self.budget - self.used
        if free >= nbytes:
            return []
        if self.room(ahead=ahead) < nbytes:
            return None
        wished = self._wished()
        idle = _Without(self._loose, wished) if wished else self._loose.keys()
        gone: list[Key] = []
        while free < nbytes:
            if not idle:
                idle = self._loose.keys()
            passing = next((key for key in self._passing if key in idle), None)
            key = self.policy.victim(idle) if passing is None else passing
            free += self.resident[key]
            self._remove(key)
            gone.append(key)
        return gone

    def insert(self, key: Key, nbytes: int) -> None:
        """Take a key in; ``make_room`` came first."""
        if key in self.resident or self.used + nbytes > self.budget:
            raise ValueError(f"{key} of {nbytes} bytes does not fit: {self.used} of {self.budget} are used")
        self.resident[key] = nbytes
        self.used += nbytes
        if key not in self._held:
            self._loose[key] = None
        self.policy.on_insert(key, max(self.time, 0))
        if not self.policy.admit(key):
            self._passing[key] = None

    def forget(self, key: Key) -> None:
        """Take a key out whoever holds it, as when its bytes could not be read."""
        self._held.pop(key, None)
        self._remove(key)

    def _remove(self, key: Key) -> None:
        self.used -= self.resident.pop(key)
        self._passing.pop(key, None)
        self._loose.pop(key, None)
        self.policy.on_evict(key)


def run_step(cache: ExpertCache, keys: Sequence[Key], nbytes: int) -> int:
    """One step of equal items: hits stay while misses come; as the store does it.

    Where the step needs more than the budget holds, keys come in waves, residents first.

    Returns:
        Misses.
    """
    cache.step(keys)
    misses = 0
    for wave in waves(cache, list(dict.fromkeys(keys)), nbytes):
        for key in wave:
            cache.hold(key)
        for key in wave:
            if key not in cache.resident:
                misses += 1
                if cache.make_room(nbytes) is None:
                    raise ConfigError(f"budget={cache.budget} bytes is less than one expert of {nbytes}")
                cache.insert(key, nbytes)
        for key in wave:
            cache.let_go(key)
    return misses


def waves(cache: ExpertCache, keys: list[Key], nbytes: int | Callable[[Key], int]) -> Iterable[list[Key]]:
    """Keys of one step in parts that fit the budget, those in the cache first; one part where all fit.

    Args:
        nbytes: of an item, or what gives that of each.

    Raises:
        ConfigError: the budget holds not even one.
    """
    size = nbytes if callable(nbytes) else lambda key: nbytes
    sizes = {key: size(key) for key in keys}
    largest = max(sizes.values(), default=0)
    if cache.budget < largest:
        raise ConfigError(f"budget={cache.budget} bytes is less than one expert of {largest}")
    if sum(sizes.values()) <= cache.budget:
        yield keys
        return
    wave: list[Key] = []
    left = cache.budget
    for key in sorted(keys, key=lambda key: key not in cache.resident):
        if sizes[key] > left:
            yield wave
            wave, left = [], cache.budget
        wave.append(key)
        left -= sizes[key]
    yield wave
