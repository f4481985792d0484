"""The expert store: slabs on disk, some of them in memory under a hard budget, read by threads of its own.

    with store.acquire(layer, ids) as lease:
        for part in lease.ready():                     # residents first, then whatever has arrived
            run(lease.ids[part], lease.pointers[part])

What a lease holds stays where it is until it is released. ``prefetch`` and ``ahead`` read ahead: they may evict what
nobody holds or wishes for, wait behind every demand, and are dropped when their layer has come and gone.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from moestro.core.errors import ConfigError, StoreError
from moestro.core.expert_cache import CachePolicy, ExpertCache, Key, waves
from moestro.core.expert_reads import Reads
from moestro.core.forecast import Wish
from moestro.engine.lease import PATIENCE_S, Counters, Entry, Ints, Lease
from moestro.engine.packed import EXPERTS, Packed
from moestro.engine.slabs import Read, SlabFile, Slots


class ExpertStore:
    """See the top of the file. Safe to use from several threads.

    Args:
        packed: the model. budget_bytes: of slabs in memory; never exceeded. policy: who leaves.
        readers: threads; two keep a disk busy, more take time from computing. read: stands in for ``os.preadv``.
        patience_s: see ``PATIENCE_S``. least_right: see ``Reads``.

    Attributes:
        counters: what happened. cache: who is in memory.

    Raises:
        ConfigError: the budget holds not even one slab. StoreError: the file cannot be opened.
    """

    def __init__(
        self,
        packed: Packed,
        budget_bytes: int,
        policy: CachePolicy,
        *,
        readers: int = 2,
        read: Read | None = None,
        patience_s: float = PATIENCE_S,
        least_right: float = 0.0,
    ) -> None:
        largest = max((there.stride for there in packed.experts.values()), default=0)
        if budget_bytes < max(largest, 1):
            raise ConfigError(
                f"{packed.path}: {budget_bytes:,} bytes for experts, one takes {largest:,}; give more memory"
            )
        if readers < 1:
            raise ConfigError(f"readers={readers}; at least one thread must read")
        self.packed, self.patience_s, self.readers = packed, patience_s, readers
        self.cache = ExpertCache(policy, budget_bytes)
        self.counters = Counters()
        self._file = SlabFile(packed.path / EXPERTS, packed.files[EXPERTS][0], read)
        self._slots = Slots()
        self._entries: dict[Key, Entry] = {}
        self._reads = Reads(least_right)
        lock = threading.RLock()  # of two conditions: readers wait for work, all others for a change
        self._work, self._change = threading.Condition(lock), threading.Condition(lock)
        self._running: list[Entry] = []
        self._since, self._progress = 0.0, time.monotonic()
        self._closed = False
        self._alive = self._spare = 0
        for _ in range(readers):
            self._start_reader()

    # -- what callers ask for --------------------------------------------------------------------------------------

    def acquire(self, layer: int, ids: Sequence[int] | Ints) -> Lease:
        """Slabs of one step; returns at once unless others hold what must go.

        Raises:
            StoreError: they do not fit the budget together (use ``waves``), or room did not come in time.
        """
        keys = self.packed.keys(layer, ids)
        with self._change:
            self._step(layer, keys)
            return self._lease(keys)

    def waves(self, layer: int, ids: Sequence[int] | Ints) -> Iterator[Lease]:
        """Leases that together cover ``ids``, residents first, each as large as the budget allows.

        A lease is released when the next one is asked for.
        """
        keys = self.packed.keys(layer, ids)
        with self._change:
            self._step(layer, keys)
            parts = list(waves(self.cache, keys, lambda key: self.packed.slab(*key)[1]))
        for part in parts:
            with self._change:
                lease = self._lease(part)
            with lease:
                yield lease

    def prefetch(self, layer: int, ids: Sequence[int] | Ints, priority: int = 1) -> int:
        """Ask for slabs ahead of need. Among them lower priorities are read first; demands come before all.

        Returns:
            How many were neither there nor asked for.
        """
        with self._change:
            self._check_open()
            return self._wish(self.packed.keys(layer, ids), priority)

    def ahead(self, wishes: Iterable[Wish]) -> int:
        """Ask for what a forecast wishes. Of each layer it names, earlier wishes that it does not repeat are dropped.

        What is wished for and in memory stays until its layer has run, as long as others can go.

        Returns:
            How many slabs were neither there nor asked for.
        """
        parts = [(wish, self.packed.keys(wish.layer, wish.experts)) for wish in wishes]
        by_layer: dict[int, set[Key]] = {}
        for wish, keys in parts:
            by_layer.setdefault(wish.layer, set()).update(keys)
        with self._change:
            self._check_open()
            for layer, new in by_layer.items():
                self._unwish(key for key in self._reads.of(layer) if key not in new)
                self.cache.spare(layer, new)
            worth = {layer for layer, new in by_layer.items() if self._reads.guess(layer, new - self._entries.keys())}
            return sum(self._wish(keys, wish.priority) for wish, keys in parts if wish.layer in worth)

    def cancel(self, layer: int | None = None) -> int:
        """Forget what was asked for ahead (of one layer) and not begun; how many."""
        with self._change:
            for other in [layer] if layer is not None else list(self.packed.experts):
                self.cache.spare(other, ())
            return self._unwish(self._reads.of(layer))

    def close(self) -> None:
        """Stop the threads and give all memory back. Leases become invalid."""
        with self._change:
            if self._closed:
                return
            self._closed = True
            self._work.notify_all()
            self._change.notify_all()
            self._change.wait_for(lambda: self._alive == 0, timeout=self.patience_s)
            for entry in self._entries.values():
                if entry.ready or entry.started is None:
                    self._slots.put(entry.slot)
            self._entries.clear()
            self._slots.close()

    def __enter__(self) -> "ExpertStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- under the lock --------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self.packed.path}: the store is closed")

    def _step(self, layer: int, keys: list[Key]) -> None:
        self._check_open()
        self.cache.step(keys)
        self.cache.spare(layer, ())
        self._reads.ran(layer, needed := set(keys))
        wished = self._reads.of(layer)
        self._reads.drop(key for key in wished if key in needed)
        self._unwish(key for key in wished if key not in needed)

    def _wish(self, keys: list[Key], priority: int) -> int:
        asked = sum(self._reads.wish(key, priority) for key in keys if key not in self._entries)
        if asked:
            self._work.notify_all()
        return asked

    def _unwish(self, keys: Iterable[Key]) -> int:
        stale = list(keys)
        self._reads.drop(stale)
        self.counters.cancelled += len(stale)
        return len(stale)

    def _lease(self, keys: list[Key]) -> Lease:
        """Hold all keys or none; reads of those that are away are begun."""
        self._give_up_stalled(time.monotonic())
        deadline = time.monotonic() + self.patience_s
        while not self._fits(keys):
            started = time.monotonic()
            self._change.wait(timeout=max(deadline - started, 0.0))
            self.counters.waited_s += time.monotonic() - started
            self._check_open()
            if time.monotonic() >= deadline and not self._fits(keys):
                raise StoreError(
                    f"{self.packed.path}: {len(keys)} experts of layer {keys[0][0]} found no room "
                    f"in {self.patience_s} s: other requests hold {self.cache.held_bytes():,} bytes of a budget of "
                    f"{self.cache.budget:,}"
                )
        for key in keys:
            self.cache.hold(key)
        entries = [self._need(key) for key in keys]
        pointers = np.asarray([entry.slot.address for entry in entries], dtype=np.int64)
        return Lease(np.asarray([expert for _, expert in keys], dtype=np.int32), pointers, self, entries)

    def _fits(self, keys: list[Key]) -> bool:
        """Whether all keys can be in memory at a time, beside what others hold.

        Raises:
            StoreError: they never can.
        """
        mine = set(keys)
        needed = sum(self.packed.slab(*key)[1] for key in keys)
        if needed > self.cache.budget:
            raise StoreError(
                f"{self.packed.path}: {len(keys)} experts take {needed:,} bytes, the budget is {self.cache.budget:,}; "
                "ask in waves"
            )
        return needed + self.cache.held_bytes(mine) <= self.cache.budget

    def _need(self, key: Key) -> Entry:
        """The entry of a key that is held and fits."""
        entry = self._entries.get(key)
        if entry is None:
            self.counters.misses += 1
            entry = self._begin(key, ahead=False)
            self._reads.demand(entry)
            self._work.notify()
        elif entry.ready:
            self.counters.hits += 1
        else:
            self.counters.misses += 1
            self.counters.joined += 1
        entry.used = True
        return entry

    def _begin(self, key: Key, *, ahead: bool) -> Entry:
        """Take a slot; the caller has made sure that there is room. The read itself holds the key."""
        size = self.packed.slab(*key)[1]
        gone = self.cache.make_room(size, ahead=ahead)
        assert gone is not None
        for old in gone:
            self._drop(self._entries.pop(old))
        self.cache.insert(key, size)
        self.cache.hold(key)
        entry = self._entries[key] = Entry(key, self._slots.take(size, self.cache.budget), time.monotonic(), ahead)
        return entry

    def _drop(self, entry: Entry) -> None:
        if entry.ahead and not entry.used:
            self.counters.wasted += entry.slot.nbytes
        self._slots.put(entry.slot)

    def _start_reader(self) -> None:
        self._alive += 1
        threading.Thread(target=self._run, name="expert-reader", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._change:
                entry = self._next()
                if entry is None:
                    self._alive -= 1
                    if self._closed and self._alive == 0:
                        self._file.close()
                    self._change.notify_all()
                    return
                entry.started = time.monotonic()
                if not self._running:
                    self._since = entry.started
                self._running.append(entry)
            error: StoreError | None = None
            offset, size = self.packed.slab(*entry.key)
            try:
                self._file.read(offset, entry.slot.view[:size])
            except StoreError as found:
                error = StoreError(str(found))  # without the frames of this one, which look into the slot
            except Exception as found:  # a fault in the reading thread must reach whoever waits for it
                error = StoreError(f"{self.packed.path}: reading layer {entry.key[0]} expert {entry.key[1]}: {found!r}")
            with self._change:
                self._finish(entry, error)

    def _next(self) -> Entry | None:
        """What to read next; None when this thread shall end."""
        while True:
            if self._closed or self._alive > self.readers + self._spare:
                return None
            while (found := self._reads.pop()) is not None:
                needed, work = found
                if needed:
                    entry: Entry = work
                    if entry.error is None:
                        return entry
                elif work not in self._entries and self.cache.room(ahead=True) >= self.packed.slab(*work)[1]:
                    return self._begin(work, ahead=True)
                else:
                    self.counters.cancelled += 1
            self._work.wait()

    def _finish(self, entry: Entry, error: StoreError | None) -> None:
        now = self._progress = time.monotonic()
        self._running = [other for other in self._running if other is not entry]
        if not self._running:
            self.counters.reading_s += now - self._since
        if entry.error is not None:  # given up on: only now nobody writes into its slot any more
            self.cache.budget += entry.slot.nbytes
            self._spare -= 1
            self._slots.find(entry.slot)
        elif error is not None:
            if not self._closed:
                self._fail(entry, error)
            self._slots.put(entry.slot)
        else:
            entry.ready = True
            self.counters.bytes += entry.slot.nbytes
            self.counters.prefetched += entry.ahead
            if not self._closed:
                self.cache.let_go(entry.key)
        if self._closed:
            if entry.ready:
                self._slots.put(entry.slot)
            self._slots.close()
        self._change.notify_all()

    def _fail(self, entry: Entry, error: StoreError) -> None:
        """Take an entry out; whoever holds it is told."""
        entry.error = error
        self.counters.failed += 1
        del self._entries[entry.key]
        self.cache.forget(entry.key)

    def _arrived(self, entries: list[Entry], left: list[int]) -> list[int]:
        with self._change:
            started = time.monotonic()
            while True:
                self._check_open()
                failed = next((entries[i].error for i in left if entries[i].error is not None), None)
                arrived = [index for index in left if entries[index].ready]
                if failed is None and not arrived:
                    now = time.monotonic()
                    late = [entries[i] for i in left if now >= self._deadline(entries[i], started)]
                    if self._give_up_stalled(now) or late:
                        for entry in late:
                            if entry.error is None:
                                self._give_up(entry)
                        continue
                    reads = [entries[i] for i in left] + [e for e in self._running if e.error is None]
                    self._change.wait(timeout=min(self._deadline(entry, started) for entry in reads) - now)
                    continue
                self.counters.waited_s += time.monotonic() - started
                if failed is not None:
                    raise StoreError(str(failed))
                return arrived

    def _deadline(self, entry: Entry, since: float) -> float:
        """When a read counts as failed: one that runs, after its own time; one that waits, when nothing moves."""
        start = max(self._progress, since) if entry.started is None else entry.started
        return start + self.patience_s

    def _give_up_stalled(self, now: float) -> bool:
        """Fail reads that run for too long, whoever asked for them: they keep a thread from what is asked for next.

        When one of them does, those that are half as late go with it, or whoever asks next would inherit them.
        """
        ages = [(entry, now - (entry.started or now)) for entry in self._running if entry.error is None]
        if not any(age >= self.patience_s for _, age in ages):
            return False
        for entry, age in ages:
            if age >= self.patience_s / 2:
                self._give_up(entry)
        return True

    def _give_up(self, entry: Entry) -> None:
        """Fail an entry whose read does not end. The slot is lost until it does; another thread takes over."""
        self._fail(
            entry,
            StoreError(
                f"{self.packed.path / EXPERTS}: layer {entry.key[0]} expert {entry.key[1]} was not read in "
                f"{self.patience_s} s; the disk stalls"
            ),
        )
        if entry.started is None:
            self._slots.put(entry.slot)
        else:
            self.cache.budget -= entry.slot.nbytes
            self._slots.lose(entry.slot)
            if self._spare < 2 * self.readers:
                self._start_reader()
            self._spare += 1
        self._change.notify_all()

    def _release(self, entries: Iterable[Entry]) -> None:
        with self._change:
            for entry in entries if not self._closed else ():
                if entry.error is None:
                    self.cache.let_go(entry.key)
            self._change.notify_all()
