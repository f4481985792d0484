"""The order of reads: demands as they came, wishes by priority and then by age, each once."""

from moestro.core.expert_reads import Reads


def drained(reads: Reads) -> list[tuple[bool, object]]:
    found = []
    while (item := reads.pop()) is not None:
        found.append(item)
    return found


def test_demands_come_first_then_wishes_by_priority_and_age() -> None:
    reads = Reads()
    assert reads.wish((1, 0), 2)
    assert reads.wish((1, 1), 1)
    assert reads.wish((1, 2), 1)
    reads.demand("b")
    reads.demand("a")
    assert drained(reads) == [(True, "b"), (True, "a"), (False, (1, 1)), (False, (1, 2)), (False, (1, 0))]
    assert not reads.wished


def test_a_wish_never_passes_for_a_demand() -> None:
    reads = Reads()
    for priority in (0, -3):
        reads.wish((1, priority), priority)
    reads.demand("needed")
    assert drained(reads) == [(True, "needed"), (False, (1, 0)), (False, (1, -3))]


def test_the_lowest_priority_counts_and_a_key_is_read_once() -> None:
    reads = Reads()
    reads.wish((1, 0), 3)
    reads.wish((1, 1), 2)
    assert not reads.wish((1, 0), 1)
    assert not reads.wish((1, 0), 5)
    assert reads.wished[1, 0][0] == 1
    assert drained(reads) == [(False, (1, 0)), (False, (1, 1))]


def test_what_is_dropped_and_wished_anew_has_its_new_place() -> None:
    """The old request lies in the queue still, and must not be taken for the new one."""
    reads = Reads()
    reads.wish((1, 0), 1)
    reads.wish((1, 1), 1)
    reads.wish((2, 0), 1)
    assert sorted(reads.of(1)) == [(1, 0), (1, 1)]
    assert len(reads.of(None)) == 3
    reads.drop([(1, 0)])
    assert reads.wish((1, 0), 4)
    assert drained(reads) == [(False, (1, 1)), (False, (2, 0)), (False, (1, 0))]
