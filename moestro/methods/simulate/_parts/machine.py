"""A machine that computes and reads at the same time: one processor, one reader, a cache of experts between them.

Time is simulated. A read takes its time and is never broken off; demands come before what is wished ahead. Experts that
are there are computed while others are read, then each as it comes. What makes room, what is spared and what is
dropped is the same as in the engine's store.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moestro.core.expert_cache import CachePolicy, ExpertCache, Key, waves
from moestro.core.expert_reads import Reads
from moestro.core.forecast import Wish


@dataclass
class Counts:
    """What a run took.

    Attributes:
        hits: needs whose expert was there. joined: misses whose read was under way, because it had been wished for.
        misses: the others included. bytes: read. wasted: of them read ahead and evicted unused, or never used.
        wait, reading, computing: seconds in which nothing was computed, something was read, something was computed.
        foreseen: needs that had been wished for; wished: wishes at the time their layer ran. foreseeable: needs of
        layers for which there was a wish.
    """

    hits: int = 0
    joined: int = 0
    misses: int = 0
    bytes: int = 0
    wasted: int = 0
    wait: float = 0.0
    reading: float = 0.0
    computing: float = 0.0
    foreseen: int = 0
    wished: int = 0
    foreseeable: int = 0

    @property
    def hidden(self) -> float:
        """Seconds of reading that nobody waited for."""
        return max(0.0, self.reading - self.wait)

    @property
    def hideable(self) -> float:
        """Seconds of reading that could have been hidden: no more than was read, nor than was computed."""
        return min(self.reading, self.computing)


class Machine:
    """See the top of the file.

    Args:
        policy: who leaves. budget: bytes. nbytes: of an expert. read_s, expert_s: seconds to read one, to compute one.
        least_right: see ``Reads``.
    """

    def __init__(
        self, policy: CachePolicy, budget: int, nbytes: int, read_s: float, expert_s: float, least_right: float = 0.0
    ) -> None:
        self.cache = ExpertCache(policy, budget)
        self.nbytes, self.read_s, self.expert_s = nbytes, read_s, expert_s
        self.counts = Counts()
        self.now = 0.0
        self._reads = Reads(least_right)
        self._free_at = 0.0  # when the reader was or will be through with what it reads
        self._running: Key | None = None
        self._coming: set[Key] = set()  # in the cache, not read yet
        self._unused: set[Key] = set()  # read ahead, not needed so far
        self._wishes: dict[int, set[Key]] = {}

    # -- what a forward does ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A step begins: what was wished for in the last one is stale."""
        for layer in list(self._wishes):
            self.cache.spare(layer, ())
        self._wishes.clear()
        self._reads.drop(self._reads.of(None))

    def ahead(self, wishes: Iterable[Wish]) -> None:
        """What a forecast wishes."""
        parts = [(wish, [(wish.layer, expert) for expert in wish.experts]) for wish in wishes]
        named: dict[int, set[Key]] = {}
        for wish, keys in parts:
            named.setdefault(wish.layer, set()).update(keys)
        for layer, new in named.items():
            self._wishes[layer] = new
            self._reads.drop([key for key in self._reads.of(layer) if key not in new])
            self.cache.spare(layer, new)
        worth = {layer for layer, new in named.items() if self._reads.guess(layer, new - self.cache.resident.keys())}
        for wish, keys in parts:
            for key in keys if wish.layer in worth else ():
                if key not in self.cache.resident:
                    self._reads.wish(key, wish.priority)
        self._advance(self.now)

    def compute(self, seconds: float) -> None:
        """Work that needs no expert."""
        self.now += seconds
        self.counts.computing += seconds
        self._advance(self.now)

    def layer(self, layer: int, experts: Sequence[int], wishes: Iterable[Wish] = ()) -> None:
        """A layer's experts, all of them, in waves where the budget holds fewer; wishes are heard once the first wave
        is held."""
        keys = [(layer, expert) for expert in experts]
        told = self._wishes.pop(layer, set())
        self.counts.wished += len(told)
        if told:
            self.counts.foreseen += sum(key in told for key in keys)
            self.counts.foreseeable += len(keys)
        self.cache.spare(layer, ())
        self._reads.drop(self._reads.of(layer))
        self._reads.ran(layer, keys)
        self.cache.step(keys)
        for number, wave in enumerate(list(waves(self.cache, keys, self.nbytes))):
            self._wave(wave, wishes if number == 0 else ())

    def finish(self) -> Counts:
        """The counts, once everything has run."""
        self.counts.wasted += len(self._unused) * self.nbytes
        self._unused.clear()
        return self.counts

    # -- reading ---------------------------------------------------------------------------------------------------

    def _wave(self, keys: list[Key], wishes: Iterable[Wish]) -> None:
        for key in keys:
            self.cache.hold(key)
        while self.cache.room() < sum(key not in self.cache.resident for key in keys) * self.nbytes:
            self._wait()  # a read ahead holds its own place until it is through
        waiting = []
        for key in keys:
            self._unused.discard(key)
            if key not in self.cache.resident:
                self.counts.misses += 1
                self._take(key)
                self._reads.demand(key)
                waiting.append(key)
            elif key in self._coming:
                self.counts.misses += 1
                self.counts.joined += 1
                waiting.append(key)
            else:
                self.counts.hits += 1
        self.ahead(wishes)
        self.compute((len(keys) - len(waiting)) * self.expert_s)
        while waiting:
            there = [key for key in waiting if key not in self._coming]
            if there:
                waiting = [key for key in waiting if key in self._coming]
                self.compute(len(there) * self.expert_s)
            else:
                self._wait()
        for key in keys:
            self.cache.let_go(key)

    def _wait(self) -> None:
        """Nothing can be done until the reader is through."""
        self.counts.wait += self._free_at - self.now
        self.now = self._free_at
        self._advance(self.now)

    def _take(self, key: Key, *, ahead: bool = False) -> None:
        gone = self.cache.make_room(self.nbytes, ahead=ahead)
        assert gone is not None
        for old in gone:
            if old in self._unused:
                self._unused.discard(old)
                self.counts.wasted += self.nbytes
        self.cache.insert(key, self.nbytes)
        self._coming.add(key)

    def _advance(self, until: float) -> None:
        """Let the reader work until a time; what it begins before then it may end later."""
        while True:
            if self._running is not None:
                if self._free_at > until:
                    return
                self._coming.discard(self._running)
                self.cache.let_go(self._running)
                self._running = None
            found = self._reads.pop()
            if found is None:
                self._free_at = max(self._free_at, until)
                return
            needed, key = found
            if not needed:
                if key in self.cache.resident or self.cache.room(ahead=True) < self.nbytes:
                    continue
                self._take(key, ahead=True)
                self._unused.add(key)
            self.cache.hold(key)
            self._running = key
            self._free_at += self.read_s
            self.counts.reading += self.read_s
            self.counts.bytes += self.nbytes
