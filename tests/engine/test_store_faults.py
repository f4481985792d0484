"""Disks that fail: a request gets a typed error in time, others go on, and the store recovers by itself."""

import os
import time
from pathlib import Path

import pytest

from moestro.core.errors import StoreError
from moestro.engine.packed import EXPERTS, Packed
from tests.engine.slab_files import STRIDE, Disk, contents, eio, slab_model, store_of
from tests.engine.test_store import Live, live, wait  # noqa: F401


@pytest.fixture
def packed(tmp_path: Path) -> Packed:
    return slab_model(tmp_path)


def test_an_error_of_the_disk_is_one_typed_error(packed: Packed, live: Live) -> None:  # noqa: F811
    disk = Disk(fault=eio(1))
    with store_of(packed, 3, read=disk, readers=1) as store:
        started = time.monotonic()
        with (
            store.acquire(0, [0, 1]) as lease,
            pytest.raises(StoreError, match=r"reading at 8192 failed \(Input/output"),
        ):
            contents(lease)
        assert time.monotonic() - started < 2
        assert store.counters.failed == 1
        assert not store.cache._held
        assert set(store.cache.resident) == {(0, 0)}
        with store.acquire(0, [0, 1, 2]) as lease:
            assert contents(lease) == [0, 1, 2]
        assert live.most <= 3 * STRIDE


def test_short_reads_are_continued_and_an_early_end_is_an_error(packed: Packed) -> None:
    with store_of(packed, 3, read=Disk(fault=lambda number, offset: None)) as store:
        store._file._read = lambda descriptor, buffers, offset: os.preadv(descriptor, [buffers[0][:4096]], offset)
        with store.acquire(2, [1, 7]) as lease:
            assert contents(lease) == [2001, 2007]
        store._file._read = lambda descriptor, buffers, offset: 0
        with store.acquire(0, [3]) as lease, pytest.raises(StoreError, match="8192 bytes of a slab are missing"):
            contents(lease)


def test_a_bug_in_a_reading_thread_reaches_the_caller(packed: Packed) -> None:
    def broken(number: int, offset: int) -> int | None:
        if number == 0:
            raise ZeroDivisionError("a bug")
        return None

    with store_of(packed, 3, read=Disk(fault=broken)) as store:
        with store.acquire(0, [3]) as lease, pytest.raises(StoreError, match="layer 0 expert 3: ZeroDivisionError"):
            contents(lease)
        with store.acquire(0, [3]) as lease:
            assert contents(lease) == [3]


def test_a_stall_only_delays(packed: Packed) -> None:
    with store_of(packed, 3, read=Disk(slow_s=0.5)) as store, store.acquire(0, [1]) as lease:
        assert contents(lease) == [1]
        assert store.counters.failed == 0


@pytest.mark.parametrize("readers", [1, 2])
def test_a_disk_that_hangs_fails_its_request_and_nobody_else_s(
    readers: int,
    packed: Packed,
    live: Live,  # noqa: F811
) -> None:
    """The slot of a read that does not end is out of use until it does: nothing else may lie where it writes."""
    disk = Disk()
    disk.gate.clear()
    with store_of(packed, 4, read=disk, readers=readers, patience_s=0.3) as store:
        started = time.monotonic()
        with (
            store.acquire(0, [0, 1]) as lease,
            pytest.raises(StoreError, match=r"was not read in 0\.3 s; the disk stalls"),
        ):
            contents(lease)
        assert time.monotonic() - started < 2
        hung = disk.gate
        disk.gate = type(hung)()
        disk.gate.set()
        with store.acquire(0, [0, 1]) as lease:
            assert contents(lease) == [0, 1]
        for layer in range(3):
            for expert in range(8):
                with store.acquire(layer, [expert]) as lease:
                    assert contents(lease) == [layer * 1000 + expert]
        lost = 4 * STRIDE - store.cache.budget
        assert lost in (STRIDE, 2 * STRIDE)
        assert live.most <= 4 * STRIDE
        hung.set()
        wait(lambda: store.cache.budget == 4 * STRIDE)
        wait(lambda: store._alive == readers)
        with store.acquire(1, range(4)) as lease:
            assert contents(lease) == [1000, 1001, 1002, 1003]
        assert live.most <= 4 * STRIDE


def test_reading_ahead_that_hangs_does_not_keep_demands_waiting(packed: Packed, live: Live) -> None:  # noqa: F811
    disk = Disk()
    disk.gate.clear()
    with store_of(packed, 4, read=disk, readers=2, patience_s=0.2) as store:
        store.prefetch(1, [0, 1])
        wait(lambda: len(disk.reads) == 2)
        hung = disk.gate
        disk.gate = type(hung)()
        disk.gate.set()
        time.sleep(0.25)
        with store.acquire(1, [0, 2]) as lease:
            assert contents(lease) == [1000, 1002]
        assert store.counters.failed == 2
        hung.set()
        wait(lambda: store.cache.budget == 4 * STRIDE)
    assert live.most <= 4 * STRIDE


def test_many_faults_leave_no_trace(packed: Packed, live: Live) -> None:  # noqa: F811
    disk = Disk(fault=eio(*range(0, 4000, 3)))
    failed = served = 0
    with store_of(packed, 5, read=disk) as store:
        for number in range(400):
            layer, ids = number % 3, [number * 5 % 8, (number * 5 + 1 + number % 7) % 8]
            if number % 4 == 0:
                store.prefetch((layer + 1) % 3, [number % 8])
            with store.acquire(layer, ids) as lease:
                try:
                    found = contents(lease)
                except StoreError:
                    failed += 1
                else:
                    assert found == [layer * 1000 + expert for expert in ids]
                    served += 1
        wait(lambda: not store._running and not store._reads.wished)
        assert not store.cache._held
        assert store.cache.resident.keys() == store._entries.keys()
    assert failed > 20
    assert served > 20
    assert live.most <= 5 * STRIDE


def test_a_file_that_is_removed_or_replaced_goes_on(packed: Packed) -> None:
    path = packed.path / EXPERTS
    with store_of(packed, 2) as store:
        path.unlink()
        with store.acquire(0, [4]) as lease:
            assert contents(lease) == [4]
        path.write_bytes(b"another file")
        with store.acquire(1, [4]) as lease:
            assert contents(lease) == [1004]
    with pytest.raises(StoreError, match="has 12 bytes where 196608 were packed"):
        store_of(packed, 2)
    path.unlink()
    with pytest.raises(StoreError, match="cannot be opened"):
        store_of(packed, 2)
    os.mkfifo(path)
    with pytest.raises(StoreError, match="has 0 bytes"):
        store_of(packed, 2)


def test_a_file_that_is_changed_in_place_is_refused(packed: Packed) -> None:
    with store_of(packed, 2) as store:
        with (packed.path / EXPERTS).open("r+b") as file:
            file.truncate(5 * STRIDE)
        with store.acquire(0, [6]) as lease, pytest.raises(StoreError, match="bytes of a slab are missing"):
            contents(lease)
        with store.acquire(0, [1]) as lease, pytest.raises(StoreError, match="was changed while it was in use"):
            contents(lease)


def test_closing_does_not_wait_for_a_disk_that_hangs(packed: Packed, live: Live) -> None:  # noqa: F811
    disk = Disk()
    disk.gate.clear()
    store = store_of(packed, 2, read=disk, patience_s=0.2)
    store.acquire(0, [0])
    wait(lambda: len(disk.reads) == 1)
    started = time.monotonic()
    store.close()
    assert time.monotonic() - started < 1
    assert live.now == STRIDE
    disk.gate.set()
    wait(lambda: store._alive == 0)
    assert live.now == 0
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(store._file.descriptor)
