"""Reused storage for gradients, saved activations and scratch.

Fresh pages cost about half a millisecond per megabyte (the kernel zeroes them), which on a mixture's stacked
gradients and wide activations is a good part of a training step. The pool hands out tensors over storages
that it also holds itself; when its own reference is the only one left, the storage is free again. Autograd
takes such a tensor as `.grad` without a copy.
"""

import ctypes
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor


_ALIGN = 4096
_HUGE = 2**21
_MADV_HUGEPAGE = 14
_SLACK = 1.25  # a scratch request may be served by a storage up to this much larger


class StoragePool:
    """Leases uninitialised CPU tensors.

    Idle storages are dropped when a new one would exceed the peak in use so far.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._storages: list[torch.UntypedStorage] = []  # least recently leased first
        self._peak = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, *, exact: bool = False) -> Tensor:
        """An uninitialised contiguous tensor.

        `exact`: over a storage of exactly its size (what becomes a `.grad`).
        """
        nbytes = prod(shape) * dtype.itemsize
        if nbytes < _ALIGN:
            return torch.empty(shape, dtype=dtype)
        if not exact:
            nbytes = -(-nbytes // _ALIGN) * _ALIGN
        with self._lock:
            storage = self._find(nbytes, exact) or self._grow(nbytes)
            tensor = torch.empty(0, dtype=dtype)
            tensor.set_(storage, 0, torch.Size(shape))  # type: ignore[call-overload]
        return tensor

    def clear(self) -> None:
        """Drop every idle storage."""
        with self._lock:
            self._storages = [storage for storage in self._storages if not _idle(storage)]
            self._peak = 0

    def nbytes(self, *, idle: bool = False) -> int:
        """Bytes held; with `idle`, only those nobody uses."""
        with self._lock:
            return sum(s.nbytes() for s in self._storages if not idle or _idle(s))

    def _find(self, nbytes: int, exact: bool) -> torch.UntypedStorage | None:
        largest = nbytes if exact else int(nbytes * _SLACK)
        best = None
        for index in range(len(self._storages) - 1, -1, -1):  # the most recent is the likeliest to be in the cache
            size = self._storages[index].nbytes()
            if nbytes <= size <= largest and (best is None or size < self._storages[best].nbytes()):
                if not _idle(self._storages[index]):
                    continue
                best = index
                if size == nbytes:
                    break
        if best is None:
            return None
        storage = self._storages.pop(best)
        self._storages.append(storage)
        return storage

    def _grow(self, nbytes: int) -> torch.UntypedStorage:
        used = sum(s.nbytes() for s in self._storages if not _idle(s)) + nbytes
        self._peak = max(self._peak, used)
        excess = sum(s.nbytes() for s in self._storages) + nbytes - self._peak
        kept = []
        for storage in self._storages:
            if excess > 0 and _idle(storage):
                excess -= storage.nbytes()
            else:
                kept.append(storage)
        storage = torch.UntypedStorage(nbytes)  # type: ignore[no-untyped-call]
        _prefer_huge_pages(storage)
        self._storages = [*kept, storage]
        return storage


def _prefer_huge_pages(storage: torch.UntypedStorage) -> None:
    """Ask for pages of 2 MB, where Linux leaves that to the process: fewer faults, and fewer misses of translations."""
    if not sys.platform.startswith("linux") or storage.nbytes() < 2 * _HUGE:
        return
    start = -(-storage.data_ptr() // _HUGE) * _HUGE
    length = (storage.data_ptr() + storage.nbytes() - start) // _HUGE * _HUGE
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)  # a wish: refusals do no harm


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _idle(storage: torch.UntypedStorage) -> bool:
    return bool(torch._C._storage_Use_Count(storage._cdata) == 1)


POOL = StoragePool()
"""The pool of this process."""


def gradient_for(weight: Tensor, empty: Callable[..., Tensor] | None = None) -> Tensor:
    """Storage in the weight's own memory order, so that autograd takes it over as it is.

    `empty`: what makes it instead of the pool, with the same arguments.
    """
    empty = empty or POOL.empty
    if weight.dim() == 3 and weight.transpose(1, 2).is_contiguous():
        return empty(weight.transpose(1, 2).shape, weight.dtype, exact=True).transpose(1, 2)
    return empty(weight.shape, weight.dtype, exact=True)
