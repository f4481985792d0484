"""Packed models of nothing but slabs, whose content tells which slab it is, and reads that fail on demand."""

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moestro.core.registry import method
from moestro.engine.packed import EXPERTS, LayerSlabs, Packed
from moestro.engine.store import ExpertStore


STRIDE = 8192


def slab_model(folder: Path, layers: int = 3, experts: int = 8, strides: Sequence[int] = (STRIDE,)) -> Packed:
    """Every 8 bytes of slab (layer, expert) are layer * 1000 + expert; strides go round over the layers."""
    there, offset = {}, 0
    with (folder / EXPERTS).open("wb") as file:
        for layer in range(layers):
            stride = strides[layer % len(strides)]
            there[layer] = LayerSlabs(experts, offset, stride, stride, {})
            for expert in range(experts):
                file.write(np.full(stride // 8, layer * 1000 + expert, dtype=np.int64).tobytes())
            offset += experts * stride
    return Packed(folder, None, {}, there, {EXPERTS: (offset, "")})  # type: ignore[arg-type]


def policy(name: str = "lru", **config: Any) -> Any:
    found = method(f"serve.{name}")
    return found.module.policy(found.configure(config))


def store_of(packed: Packed, slots: float, name: str = "lru", **more: Any) -> ExpertStore:
    return ExpertStore(packed, int(slots * STRIDE), policy(name), **more)


def contents(lease: Any, nbytes: int = STRIDE) -> list[int]:
    """What stands in each slab of a lease, which must be the same everywhere in it; waits for all."""
    import ctypes

    found = [-1] * len(lease.ids)
    for part in lease.ready():
        for index in part:
            memory = (ctypes.c_int64 * (nbytes // 8)).from_address(int(lease.pointers[index]))
            values = np.frombuffer(memory, dtype=np.int64)
            assert (values == values[0]).all(), "a slab holds parts of two"
            found[index] = int(values[0])
    return found


class Disk:
    """Stands in for ``os.preadv``.

    Attributes:
        reads: (offset, thread) of every call. slow_s: of every read. fault: is called with the number and the offset
            of a read and may raise, or give the bytes to return instead of reading.
    """

    def __init__(self, slow_s: float = 0.0, fault: Callable[[int, int], int | None] | None = None) -> None:
        self.slow_s, self.fault = slow_s, fault
        self.reads: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    def __call__(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        with self._lock:
            number = len(self.reads)
            self.reads.append(offset)
        self.gate.wait(timeout=10)
        if self.slow_s:
            time.sleep(self.slow_s)
        told = None if self.fault is None else self.fault(number, offset)
        return os.preadv(descriptor, buffers, offset) if told is None else told


def eio(*numbers: int) -> Callable[[int, int], int | None]:
    """A fault: these reads fail as a broken disk does."""

    def fault(number: int, offset: int) -> int | None:
        if number in numbers:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return None

    return fault
