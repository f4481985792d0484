"""Memory for slabs: cut from larger mappings, within a limit, and given back in truth."""

import numpy as np
import pytest

from moestro.engine.slabs import Slot, Slots


PAGE = 4096


def filled(slot: Slot, value: int) -> Slot:
    np.frombuffer(slot.view, dtype=np.uint8)[:] = value
    return slot


def test_slots_share_no_byte_and_stand_on_pages() -> None:
    slots = Slots()
    taken = [filled(slots.take(3 * PAGE, 300 * PAGE), number) for number in range(100)]
    for number, slot in enumerate(taken):
        assert slot.address % PAGE == 0
        assert bytes(slot.view) == bytes([number]) * (3 * PAGE)
    assert len({slot.address for slot in taken}) == 100
    assert slots.allocated == 300 * PAGE
    with pytest.raises(ValueError, match="exceed"):
        slots.take(PAGE, 300 * PAGE)


def test_memory_that_waits_is_used_again_and_given_back_for_another_size() -> None:
    slots = Slots()
    first, second = (filled(slots.take(2 * PAGE, 4 * PAGE), 7) for _ in range(2))
    slots.put(first)
    assert slots.take(2 * PAGE, 4 * PAGE) is first
    slots.put(first)
    arena, offset = first.arena, first.offset
    assert arena is not None
    slots.take(PAGE, 4 * PAGE)
    assert slots.allocated == 3 * PAGE
    assert bytes(arena[offset : offset + 2 * PAGE]) == bytes(2 * PAGE), "a page that was given back reads as zeros"
    assert bytes(second.view) == b"\7" * (2 * PAGE), "its neighbour stays"
    slots.put(second)
    again = slots.take(2 * PAGE, 6 * PAGE)
    assert again is second
    assert slots.take(2 * PAGE, 6 * PAGE).offset == offset, "the place is taken again"


def test_closing_gives_back_what_waits_and_what_comes_later() -> None:
    slots = Slots()
    first, second = slots.take(PAGE, 2 * PAGE), slots.take(PAGE, 2 * PAGE)
    slots.put(first)
    slots.close()
    assert slots.allocated == PAGE
    slots.put(second)
    slots.close()
    assert slots.allocated == 0


def test_a_mapping_is_private() -> None:
    """Shared anonymous memory gets no huge pages where the system keeps them from it, as it does by default."""
    slot = Slot(8 << 20)
    with open("/proc/self/maps") as lines:  # noqa: PTH123
        for line in lines:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= slot.address < end:
                assert line.split()[1].endswith("p")
                return
    raise AssertionError("no such mapping")
