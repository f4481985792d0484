"""Experts side by side: groups, shares, threads, exceptions, forks."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.ops import Segments, sort_rows, workers


def segments_of(counts: list[int]) -> Segments:
    return sort_rows(torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)), len(counts))


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12), st.integers(1, 3))
def test_groups_cover_every_row_once_in_order(counts, parts):
    segments = segments_of(counts)
    seen = dict.fromkeys(segments.hit, 0)
    for task in workers.tasks(segments, parts):
        for group in task:
            assert 0 < group.stop - group.start == sum(group.sizes) <= workers.BLOCK
            start = group.start
            for expert, size in zip(group.experts, group.sizes, strict=True):
                assert start == segments.expert_offsets[expert] + seen[expert]
                assert group.first == (seen[expert] == 0)
                seen[expert] += size
                start += size
    assert seen == {expert: counts[expert] for expert in segments.hit}


def test_shares_are_even_and_complete():
    segments = segments_of([7, 0, 300, 20, 20, 290, 1, 40, 2500])
    found = workers.tasks(segments, 2)
    parts = workers.share(found, 2)
    assert sorted(g.start for part in parts for g in part) == sorted(g.start for task in found for g in task)
    assert parts == workers.share(found, 2)
    small = workers.tasks(segments_of([100] * 8), 2)
    loads = [sum(group.cost for group in part) for part in workers.share(small, 2)]
    assert loads[0] == loads[1]
    assert len(workers.share(workers.tasks(segments_of([9, 0]), 2), 2)) == 1


@pytest.mark.usefixtures("two_threads")
def test_workers_run_single_threaded_and_leave_the_caller_alone():
    segments = sort_rows(torch.arange(4000) % 8, 8)
    seen = {}

    def work(groups):
        seen[groups[0].start] = (torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())

    workers.run(work, segments, 10_000)
    assert len(seen) == 2
    assert set(seen.values()) == {(1, False, False)}
    assert torch.get_num_threads() == 2
    with torch.inference_mode():
        workers.run(work, segments, 10_000)
    assert set(seen.values()) == {(1, False, True)}


@pytest.mark.usefixtures("two_threads")
def test_small_or_lopsided_work_stays_in_the_calling_thread():
    calls = []
    workers.run(calls.append, segments_of([5] * 8), 10)
    workers.run(calls.append, segments_of([3960, 40]), 10_000)
    assert [[group.experts for group in groups] for groups in calls] == [[list(range(8))], [[0]] * 4 + [[1]]]


@pytest.mark.usefixtures("two_threads")
def test_an_exception_reaches_the_caller_after_all_workers_stopped():
    segments = sort_rows(torch.arange(4000) % 8, 8)
    done = []

    def work(groups):
        if any(group.start == 0 for group in groups):
            raise RuntimeError("broken expert")
        done.append(groups)

    with pytest.raises(RuntimeError, match="broken expert"):
        workers.run(work, segments, 10_000)
    assert len(done) == 1


@pytest.mark.usefixtures("two_threads")
def test_thread_count_changes_no_bit(make_case):
    case = make_case(600, 8, 3, dim=64, inner=64, dtype=torch.float32, bias=True)
    side_by_side = case.gradients("segments")
    torch.set_num_threads(1)
    for name, tensor in case.gradients("segments").items():
        assert torch.equal(tensor, side_by_side[name]), name


_FORK = """
import os, torch
torch.set_num_threads(2)
from moestro.ops import sort_rows, workers
segments = sort_rows(torch.arange(4000) % 8, 8)
def both():
    parts = []
    workers.run(parts.append, segments, 10_000)
    return len(parts)
assert both() == 2
child = os.fork()
if child == 0:
    os._exit(0 if both() == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_starts_its_own_workers():
    subprocess.run([sys.executable, "-c", _FORK], check=True, timeout=120)
