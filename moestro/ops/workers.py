"""Experts side by side: the work of a layer is shared out over threads that each run single-threaded kernels.

Matrix products of a few dozen rows gain little from two threads inside one product, and much from two at once. Torch
releases the interpreter lock inside every operation, so plain Python threads do. The assignment changes no number:
every expert writes to its own rows and its own gradient slice. The workers sleep when idle; they never spin.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from moestro.ops.rows import Segments


BLOCK = 1024  # most rows handled at a time: bounds the scratch and keeps it in the cache

_EXPERT_COST = 16  # what an expert costs beside its rows (launches, streaming its weights), in rows
_WORTH_SHARING = 2**25  # multiply-adds below which waking the workers costs more than it saves
_lock = threading.Lock()
_executors: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by process id: threads do not survive a fork


@dataclass(frozen=True)
class Group:
    """Neighbouring sorted rows start:stop handled together: of several experts, or one block of a busy one.

    experts, sizes: whose rows they are, and how many each. first: these are the first rows of their experts.
    """

    start: int
    stop: int
    experts: list[int]
    sizes: list[int]
    first: bool

    @property
    def cost(self) -> int:
        """In rows."""
        return self.stop - self.start + _EXPERT_COST * len(self.experts)


Task = list[Group]
"""Groups to be handled one after another by one thread."""

Work = Callable[[Sequence[Group]], None]


def tasks(segments: Segments, parts: int) -> list[Task]:
    """All rows in groups of at most BLOCK rows, smaller ones when there are few rows for `parts` threads.

    An expert with more rows than that is a task of several groups.
    """
    most = min(BLOCK, max(64, segments.num_rows // (4 * parts)))
    found: list[Task] = []
    experts: list[int] = []
    start = rows = 0

    def close() -> None:
        nonlocal experts, start, rows
        if experts:
            found.append([Group(start, start + rows, experts, [segments.count(e) for e in experts], True)])
        experts, start, rows = [], start + rows, 0

    for expert in segments.hit:
        count = segments.count(expert)
        if rows + count > most:
            close()
        if count > BLOCK:
            bounds = [*range(start, start + count, BLOCK), start + count]
            found.append([Group(a, b, [expert], [b - a], a == start) for a, b in pairwise(bounds)])
            start += count
        else:
            experts.append(expert)
            rows += count
    close()
    return found


def share(found: Sequence[Task], parts: int) -> list[list[Group]]:
    """At most `parts` lists of nearly equal cost: the largest task first, each to the least loaded list."""
    loads = [0] * parts
    lists: list[list[Group]] = [[] for _ in range(parts)]
    for task in sorted(found, key=_cost, reverse=True):
        least = loads.index(min(loads))
        loads[least] += _cost(task)
        lists[least].extend(task)
    return [groups for groups in lists if groups]


def _cost(task: Sequence[Group]) -> int:
    return sum(group.cost for group in task)


def run(work: Work, segments: Segments, row_cost: int, *, alone: bool = False) -> None:
    """Call `work` on every group of rows, over the workers where that pays.

    `row_cost`: multiply-adds of one row. A routing that leaves the workers unequal loads (few experts hit, or one with
    most of the tokens) runs in this thread, where torch shares each product among its own threads, unless every product
    must be `alone` in one thread. So does all that a dispatch mode watches (a counter of operations, say): modes belong
    to a thread and would see nothing of the workers.
    """
    threads = 1 if _get_current_dispatch_mode() is not None else torch.get_num_threads()
    if threads > 1 and alone:
        _run_shared(work, share(tasks(segments, threads), threads), threads)
        return
    if threads > 1 and segments.num_rows * row_cost >= _WORTH_SHARING:
        found = tasks(segments, threads)
        parts = share(found, threads)
        if len(parts) == threads and max(map(_cost, parts)) * threads <= 1.33 * sum(map(_cost, parts)):
            _run_shared(work, parts, threads)
            return
    with torch.no_grad(), _one_thread() if alone else nullcontext():
        work([group for task in tasks(segments, 1) for group in task])


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_shared(work: Work, parts: list[list[Group]], threads: int) -> None:
    inference = torch.is_inference_mode_enabled()  # modes belong to a thread

    def task(groups: Sequence[Group]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(groups)

    executor = _executor(threads)
    futures = [executor.submit(task, groups) for groups in parts]
    errors = [future.exception() for future in futures]  # wait for all: they write to shared buffers
    for error in errors:
        if error is not None:
            raise error


def _become_single_threaded() -> None:
    torch.get_num_threads()  # a thread's first look takes over the process's default; only then change it
    torch.set_num_threads(1)


def _executor(threads: int) -> ThreadPoolExecutor:
    key = (os.getpid(), threads)
    with _lock:
        if key not in _executors:
            _executors[key] = ThreadPoolExecutor(
                threads, thread_name_prefix="moestro-expert", initializer=_become_single_threaded
            )
            # All start now: `set_num_threads` also sets the default of threads to come, which is put back here.
            barrier = threading.Barrier(threads + 1)
            for _ in range(threads):
                _executors[key].submit(barrier.wait)
            barrier.wait()
            torch.set_num_threads(threads)
        return _executors[key]
