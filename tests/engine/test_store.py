"""The expert store: what it gives, what it keeps, what it evicts, how much memory it takes."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.core.errors import ConfigError, StoreError
from moestro.core.expert_cache import ExpertCache, run_step
from moestro.engine import slabs as memory
from moestro.engine.packed import Packed
from moestro.engine.slabs import load_all
from moestro.engine.store import ExpertStore
from moestro.testing.policy_contract import stream
from tests.engine.slab_files import STRIDE, Disk, contents, policy, slab_model, store_of


@pytest.fixture
def packed(tmp_path: Path) -> Packed:
    return slab_model(tmp_path)


class Live:
    """Bytes of all slots alive now, and the most there ever were."""

    def __init__(self) -> None:
        self.now = self.most = 0


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    found = Live()
    make, free = memory.Slot.__init__, memory.Slot.free

    def made(slot: memory.Slot, nbytes: int, *place: Any) -> None:
        found.now += nbytes
        found.most = max(found.most, found.now)
        make(slot, nbytes, *place)

    def freed(slot: memory.Slot) -> None:
        free(slot)
        found.now -= slot.nbytes

    monkeypatch.setattr(memory.Slot, "__init__", made)
    monkeypatch.setattr(memory.Slot, "free", freed)
    yield found
    assert found.now == 0, "memory was not given back"


def test_slabs_arrive_where_the_lease_says(packed: Packed, live: Live) -> None:
    with store_of(packed, 5) as store:
        for layer, ids in ((0, [3, 1]), (2, [7, 0, 2]), (0, [1, 5]), (1, [])):
            with store.acquire(layer, ids) as lease:
                assert contents(lease) == [layer * 1000 + expert for expert in ids]
                assert lease.ids.tolist() == ids
                assert (lease.pointers % 4096 == 0).all()
        assert (store.counters.hits, store.counters.misses) == (1, 6)
        assert store.counters.bytes == 6 * STRIDE
        assert live.most <= 5 * STRIDE


@pytest.mark.parametrize("name", ["lru", "lfu", "lfru", "static_hot", "belady"])
@pytest.mark.parametrize("slots", [2, 5, 13, 24])
def test_the_store_evicts_what_the_simulator_does(name: str, slots: int, packed: Packed, live: Live) -> None:
    steps = stream(slots, length=240)
    simulated = ExpertCache(policy(name), slots * STRIDE)
    made = policy(name)
    if name == "belady":
        made.foresee(steps)
        simulated.policy.foresee(steps)  # type: ignore[attr-defined]
    with ExpertStore(packed, slots * STRIDE, made) as store:
        for keys in steps:
            missed = run_step(simulated, keys, STRIDE)
            before = store.counters.misses
            with store.acquire(keys[0][0], [expert for _, expert in keys]) as lease:
                assert contents(lease) == [layer * 1000 + expert for layer, expert in keys]
            assert store.counters.misses - before == missed
            assert store.cache.resident.keys() == simulated.resident.keys()
        assert live.most <= slots * STRIDE
        assert store.counters.hits + store.counters.misses == sum(map(len, steps))


def test_residents_come_first_and_others_as_they_arrive(packed: Packed) -> None:
    disk = Disk()
    with store_of(packed, 6, read=disk, readers=1) as store:
        with store.acquire(0, [2, 4]) as lease:
            contents(lease)
        disk.gate.clear()
        with store.acquire(0, [1, 2, 3, 4]) as lease:
            parts = lease.ready()
            assert next(parts).tolist() == [1, 3]
            disk.gate.set()
            assert sorted(index for part in parts for index in part) == [0, 2]
        assert disk.reads[2:] == [1 * STRIDE, 3 * STRIDE]


def test_what_is_held_stays(packed: Packed) -> None:
    with store_of(packed, 3, patience_s=0.3) as store:
        first = store.acquire(0, [0, 1])
        contents(first)
        with store.acquire(1, [5]) as second:
            contents(second)
            with pytest.raises(StoreError, match=r"found no room in 0\.3 s: other requests hold"):
                store.acquire(2, [1])
        with store.acquire(2, [1]) as third:
            assert contents(third) == [2001]
            assert contents(first) == [0, 1]
        first.release()
        first.release()
        with store.acquire(2, [1, 2, 3]) as whole:
            assert contents(whole) == [2001, 2002, 2003]


def test_a_lease_waits_for_room(packed: Packed) -> None:
    with store_of(packed, 2) as store:
        first = store.acquire(0, [0, 1])
        contents(first)
        threading.Timer(0.1, first.release).start()
        with store.acquire(1, [2, 3]) as lease:
            assert contents(lease) == [1002, 1003]
        assert store.counters.waited_s >= 0.05


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_waves_cover_what_does_not_fit_together(slots: int, packed: Packed, live: Live) -> None:
    with store_of(packed, slots) as store:
        with store.acquire(0, [6]) as lease:
            contents(lease)
        seen: list[int] = []
        for lease in store.waves(0, np.arange(8, dtype=np.int32)):
            assert len(lease.ids) <= slots
            assert contents(lease) == lease.ids.tolist()
            seen += lease.ids.tolist()
        assert sorted(seen) == list(range(8))
        assert slots == 8 or seen[0] == 6
        assert (store.counters.hits, store.counters.misses) == (1, 8)
        assert not store.cache._held
        assert live.most <= slots * STRIDE
        with pytest.raises(StoreError, match="ask in waves") if slots < 8 else store.acquire(0, range(8)):
            store.acquire(0, range(8)).release()


def test_reading_ahead(packed: Packed) -> None:
    with store_of(packed, 6) as store:
        assert store.prefetch(1, [2, 3]) == 2
        assert store.prefetch(1, [2, 3]) == 0
        wait(lambda: store.counters.prefetched == 2)
        with store.acquire(1, [2, 4]) as lease:
            assert contents(lease) == [1002, 1004]
        assert (store.counters.hits, store.counters.misses) == (1, 1)
        for layer in (0, 2):
            with store.acquire(layer, range(6)) as lease:
                contents(lease)
        assert store.counters.wasted == STRIDE


def test_reading_ahead_never_takes_what_is_held(packed: Packed) -> None:
    with store_of(packed, 3) as store:
        with store.acquire(0, [0, 1, 2]) as lease:
            contents(lease)
            store.prefetch(1, [5, 6])
            wait(lambda: store.counters.cancelled == 2)
            assert contents(lease) == [0, 1, 2]
        assert store.counters.prefetched == 0


def test_demands_pass_what_is_asked_ahead_and_stale_requests_are_dropped(packed: Packed) -> None:
    disk = Disk()
    with store_of(packed, 24, read=disk, readers=1) as store:
        disk.gate.clear()
        store.prefetch(1, [0], priority=2)
        wait(lambda: len(disk.reads) == 1)
        store.prefetch(2, [0], priority=3)
        store.prefetch(2, [1], priority=2)
        store.prefetch(1, [1, 2, 3], priority=5)
        lease = store.acquire(1, [0, 7])
        assert store.counters.cancelled == 3
        assert store.counters.joined == 1
        disk.gate.set()
        assert contents(lease) == [1000, 1007]
        wait(lambda: store.counters.prefetched == 3)
        assert [offset // STRIDE for offset in disk.reads] == [8, 15, 17, 16]
        lease.release()
        disk.gate.clear()
        store.prefetch(0, [1, 2, 3])
        wait(lambda: len(disk.reads) == 5)
        assert store.cancel() == 2
        disk.gate.set()


def test_slots_of_several_sizes_share_one_budget(tmp_path: Path, live: Live) -> None:
    packed = slab_model(tmp_path, layers=3, strides=(4096, 8192, 20480))
    budget = 50_000
    with ExpertStore(packed, budget, policy()) as store:
        rng = np.random.default_rng(0)
        for _ in range(300):
            layer = int(rng.integers(3))
            ids = rng.choice(8, size=int(rng.integers(1, 3)), replace=False)
            with store.acquire(layer, ids) as lease:
                assert contents(lease, packed.experts[layer].stride) == [layer * 1000 + int(e) for e in ids]
            assert store.cache.used <= budget
        assert live.most <= budget


def test_all_slabs_at_once(packed: Packed) -> None:
    kept, addresses = load_all(packed)
    for layer, found in addresses.items():
        values = np.frombuffer(kept[layer].view, dtype=np.int64).reshape(8, -1)
        assert (values == layer * 1000 + np.arange(8)[:, None]).all()
        assert (np.diff(found) == STRIDE).all()
        del values


def test_waiting_and_hiding_are_measured(packed: Packed) -> None:
    with store_of(packed, 8, read=Disk(slow_s=0.05), readers=1) as store:
        with store.acquire(0, [0, 1]) as lease:
            contents(lease)
        assert store.counters.waited_s >= 0.09
        assert store.counters.reading_s >= 0.09
        store.prefetch(1, [0, 1])
        wait(lambda: store.counters.prefetched == 2)
        before = store.counters.waited_s
        with store.acquire(1, [0, 1]) as lease:
            contents(lease)
        assert store.counters.waited_s - before < 0.02
        assert store.counters.hidden_s >= 0.08


def test_what_cannot_be_asked_for(packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4,096 bytes for experts, one takes 8,192"):
        store_of(packed, 0.5)
    with pytest.raises(ConfigError, match="readers=0"):
        store_of(packed, 2, readers=0)
    store = store_of(packed, 2)
    for layer, ids, words in (
        (9, [0], r"layer 9 has no experts; layers \[0, 1, 2\] have"),
        (0, [8], "no expert 8, it has 0 to 7"),
        (0, [-1], "no expert -1"),
        (0, [1, 1], "name one twice"),
    ):
        with pytest.raises(ConfigError, match=words):
            store.acquire(layer, ids)
    lease = store.acquire(0, [1])
    store.close()
    store.close()
    lease.release()
    with pytest.raises(StoreError, match="closed"):
        store.acquire(0, [1])
    assert not [thread for thread in threading.enumerate() if thread.name == "expert-reader"]


def test_threads_share_a_store(packed: Packed, live: Live) -> None:
    """Several callers, each sure of what it reads, with reading ahead and little room."""
    wrong: list[str] = []
    with store_of(packed, 7, name="lfru", readers=3) as store:
        store.patience_s = 10.0  # a busy machine

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                for _ in range(150):
                    layer = int(rng.integers(3))
                    ids = rng.choice(8, size=int(rng.integers(1, 3)), replace=False)
                    if rng.random() < 0.3:
                        store.prefetch((layer + 1) % 3, rng.choice(8, 2, replace=False))
                    with store.acquire(layer, ids) as lease:
                        if contents(lease) != [layer * 1000 + int(expert) for expert in ids]:
                            wrong.append(f"{layer} {ids}")
                    if rng.random() < 0.1:
                        for lease in store.waves(layer, range(8)):
                            if contents(lease) != [layer * 1000 + int(expert) for expert in lease.ids]:
                                wrong.append(f"wave {layer}")
            except Exception as error:
                wrong.append(repr(error))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert wrong == []
        wait(lambda: not store._running and not store._reads.wished)
        assert not store.cache._held
        assert store.cache.used == sum(store.cache.resident.values()) <= 7 * STRIDE
        assert store.cache.resident.keys() == store._entries.keys()
        assert live.most <= 7 * STRIDE


def wait(until: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.002)


def test_what_is_in_memory_wakes_no_reader(packed: Packed) -> None:
    with store_of(packed, 5, readers=1) as store:
        with store.acquire(0, [1, 2]) as lease:
            contents(lease)
        looks = 0
        pop = store._reads.pop

        def counted() -> Any:
            nonlocal looks
            looks += 1
            return pop()

        time.sleep(0.05)  # until the reader waits
        store._reads.pop = counted  # type: ignore[method-assign]
        for _ in range(20):
            with store.acquire(0, [1, 2]) as lease:
                assert contents(lease) == [1, 2]
            time.sleep(0.001)
        assert looks == 0
        with store.acquire(0, [3]) as lease:
            assert contents(lease) == [3]
        assert looks >= 1
