"""What a forecast wishes of the store: read behind demands, spared while others can go, dropped when stale."""

from pathlib import Path

import pytest

from moestro.core.errors import ConfigError
from moestro.core.expert_cache import ExpertCache
from moestro.core.forecast import Wish
from moestro.engine.packed import Packed
from tests.engine.slab_files import STRIDE, Disk, contents, policy, slab_model, store_of
from tests.engine.test_store import wait


@pytest.fixture
def packed(tmp_path: Path) -> Packed:
    return slab_model(tmp_path)


def place(layer: int, expert: int) -> int:
    return (layer * 8 + expert) * STRIDE


def test_wishes_are_read_by_priority_and_behind_demands(packed: Packed) -> None:
    disk = Disk()
    with store_of(packed, 12, read=disk, readers=1) as store:
        disk.gate.clear()
        first = store.acquire(0, [0])
        wait(lambda: len(disk.reads) == 1)
        assert store.ahead([Wish(2, (4, 3), 2), Wish(1, (6, 5), 1), Wish(2, (1,), 9)]) == 5
        second = store.acquire(0, [7])
        disk.gate.set()
        contents(first), contents(second)
        wait(lambda: store.counters.prefetched == 5)
        order = [(0, 0), (0, 7), (1, 6), (1, 5), (2, 4), (2, 3), (2, 1)]
        assert disk.reads == [place(*key) for key in order]
        with store.acquire(1, [5, 6]) as lease:
            assert contents(lease) == [1005, 1006]
        assert (store.counters.hits, store.counters.joined, store.counters.wasted) == (2, 0, 0)
        first.release(), second.release()


def test_new_wishes_for_a_layer_replace_the_old(packed: Packed) -> None:
    disk = Disk()
    with store_of(packed, 12, read=disk, readers=1) as store:
        disk.gate.clear()
        busy = store.acquire(0, [0])
        wait(lambda: len(disk.reads) == 1)
        store.ahead([Wish(1, (1, 2), 2), Wish(2, (5,), 3)])
        assert store.ahead([Wish(1, (2, 3), 1)]) == 1
        assert store.counters.cancelled == 1
        assert store.ahead([]) == 0
        disk.gate.set()
        contents(busy)
        wait(lambda: store.counters.prefetched == 3)
        assert disk.reads[1:] == [place(1, 2), place(1, 3), place(2, 5)]
        busy.release()


def test_stale_wishes_are_dropped_when_their_layer_runs_or_a_step_begins(packed: Packed) -> None:
    disk = Disk()
    with store_of(packed, 12, read=disk, readers=1) as store:
        disk.gate.clear()
        busy = store.acquire(0, [0])
        wait(lambda: len(disk.reads) == 1)
        store.ahead([Wish(1, (1, 2, 3)), Wish(2, (4, 5))])
        needed = store.acquire(1, [2])
        assert store.counters.cancelled == 2
        assert store.cancel() == 2
        disk.gate.set()
        contents(busy), contents(needed)
        assert disk.reads == [place(0, 0), place(1, 2)]
        assert (store.counters.cancelled, store.counters.prefetched) == (4, 0)
        busy.release(), needed.release()


def test_wishes_never_take_what_is_held_or_wished_for(packed: Packed) -> None:
    with store_of(packed, 4) as store:
        held = store.acquire(0, [0, 1])
        contents(held)
        store.ahead([Wish(1, (5, 6))])
        wait(lambda: store.counters.prefetched == 2)
        store.ahead([Wish(2, (1, 2, 3))])
        wait(lambda: store.counters.cancelled == 3)
        assert set(store.cache.resident) == {(0, 0), (0, 1), (1, 5), (1, 6)}
        assert contents(held) == [0, 1]
        held.release()
        store.ahead([Wish(2, (1, 2, 3))])
        wait(lambda: store.counters.prefetched == 4)
        assert {(1, 5), (1, 6)} < set(store.cache.resident)
        assert store.counters.wasted == 0


def test_demands_spare_what_is_wished_for_while_others_can_go(packed: Packed) -> None:
    with store_of(packed, 4) as store:
        with store.acquire(1, [0, 1]) as lease:
            contents(lease)
        with store.acquire(0, [0, 1]) as lease:
            contents(lease)
        store.ahead([Wish(1, (0, 1))])
        with store.acquire(0, [5, 6]) as lease:
            assert contents(lease) == [5, 6]
            assert {(1, 0), (1, 1)} < set(store.cache.resident)
        with store.acquire(0, [1, 2, 3]) as lease:
            assert contents(lease) == [1, 2, 3]
            assert len({(1, 0), (1, 1)} & set(store.cache.resident)) == 1


def test_what_was_read_ahead_in_vain_is_counted_once_it_leaves(packed: Packed) -> None:
    with store_of(packed, 3) as store:
        store.ahead([Wish(1, (0, 1, 2))])
        wait(lambda: store.counters.prefetched == 3)
        with store.acquire(1, [0]) as lease:
            contents(lease)
        assert store.counters.wasted == 0
        with store.acquire(2, [0, 1, 2]) as lease:
            contents(lease)
        assert store.counters.wasted == 2 * STRIDE
        assert store.counters.bytes == 6 * STRIDE


def test_a_wish_for_what_is_not_there_changes_nothing(packed: Packed) -> None:
    with store_of(packed, 3) as store:
        with pytest.raises(ConfigError, match="no expert 8, it has 0 to 7"):
            store.ahead([Wish(1, (0,)), Wish(2, (8,))])
        assert store.cancel() == 0
        assert store.counters.prefetched == 0


def test_room_ahead_leaves_what_is_spared() -> None:
    cache = ExpertCache(policy("lru"), 4)
    for expert in range(4):
        cache.step([(0, expert)])
        cache.insert((0, expert), 1)
    cache.hold((0, 3))
    cache.spare(0, [(0, 0), (0, 3), (0, 7)])
    assert (cache.room(), cache.room(ahead=True)) == (3, 2)
    assert cache.make_room(3, ahead=True) is None
    assert cache.make_room(2, ahead=True) == [(0, 1), (0, 2)]
    assert cache.make_room(3) == [(0, 0)]
    cache.insert((1, 0), 1)
    cache.spare(0, ())
    assert (cache.room(), cache.room(ahead=True)) == (3, 3)


def test_wishes_that_were_seldom_right_are_not_read_until_they_would_have_been(packed: Packed) -> None:
    with store_of(packed, 6, least_right=0.5) as store:

        def step(wished: tuple[int, ...], needed: list[int]) -> int:
            """Whether what was wished for was asked of the disk."""
            asked = store.ahead([Wish(1, wished)])
            wait(lambda: not store._reads.wished and not store._running)
            with store.acquire(1, needed) as lease:
                contents(lease)
            for layer in (0, 2):  # so that nothing of layer 1 stays
                with store.acquire(layer, [0, 1, 2]) as lease:
                    contents(lease)
            return asked

        asked = [step((5,), [1]) for _ in range(12)]
        wrong = next(number for number, count in enumerate(asked) if not count)
        assert 0.9**wrong < 0.5 <= 0.9 ** (wrong - 1)
        assert not any(asked[wrong:])
        assert store._reads.right.keys() == {1}
        asked = [step((5,), [5]) for _ in range(6)]
        assert asked[0] == 0, "they are watched while they are not read"
        assert asked[-1] == 1
        assert store.ahead([Wish(2, (7,))]) == 1, "another layer is another matter"


def test_what_is_in_memory_says_nothing_of_wishes(packed: Packed) -> None:
    with store_of(packed, 6, least_right=0.5) as store:
        with store.acquire(1, [3, 4]) as lease:
            contents(lease)
        store.ahead([Wish(1, (3, 4))])
        with store.acquire(1, [3]) as lease:
            contents(lease)
        assert store._reads.right == {}
