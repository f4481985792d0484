"""Memory for slabs, and the file they are read from past the page cache."""

import contextlib
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moestro.core.errors import StoreError
from moestro.engine.packed import EXPERTS, PAGE, Packed


Read = Callable[[int, Sequence[Any], int], int]
"""``os.preadv``, or what stands in for it."""

_ARENA = 64 << 20
"""Bytes of a mapping that slots of one size are cut from."""

_HUGE = 4 << 20
"""Bytes from which a mapping asks for huge pages: the disk writes them faster, and products read them faster."""


def _mapping(nbytes: int) -> mmap.mmap:
    """Memory of this process alone; what is shared gets no huge pages."""
    found = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # kernels without huge pages
            found.madvise(mmap.MADV_HUGEPAGE)
    return found


class Slot:
    """Page-aligned memory for one slab: a mapping of its own, or ``nbytes`` of a larger one from ``offset``."""

    def __init__(self, nbytes: int, arena: mmap.mmap | None = None, offset: int = 0) -> None:
        self.nbytes, self.arena, self.offset = nbytes, arena, offset
        self._map = arena or _mapping(nbytes)
        self.view = memoryview(self._map)[offset : offset + nbytes]
        self.address = int(np.frombuffer(self._map, dtype=np.uint8, count=1, offset=offset).ctypes.data)

    def free(self) -> None:
        """Give the memory back to the system."""
        self.view.release()
        if self.arena is None:
            self._map.close()
        else:
            self._map.madvise(mmap.MADV_DONTNEED, self.offset, self.nbytes)


class Slots:
    """Slots of any size whose memory, used or waiting to be used again, never exceeds a limit.

    They are cut from larger mappings, which take memory as their parts are written to.
    """

    def __init__(self) -> None:
        self.allocated = 0
        self._free: dict[int, list[Slot]] = {}
        self._vacant: dict[int, list[tuple[mmap.mmap, int]]] = {}  # places without memory

    def take(self, nbytes: int, limit: int) -> Slot:
        """A slot. Waiting slots of other sizes are given back where the limit asks for it."""
        waiting = self._free.get(nbytes)
        if waiting:
            return waiting.pop()
        while self.allocated + nbytes > limit:
            size = next((size for size, slots in self._free.items() if slots), None)
            if size is None:
                raise ValueError(f"{nbytes} bytes more than {self.allocated} exceed {limit}")
            self._give_back(self._free[size].pop())
        self.allocated += nbytes
        vacant = self._vacant.setdefault(nbytes, [])
        if not vacant:
            arena = _mapping(max(_ARENA // nbytes, 1) * nbytes)
            vacant += [(arena, offset) for offset in range(0, len(arena), nbytes)]
            vacant.reverse()
        return Slot(nbytes, *vacant.pop())

    def put(self, slot: Slot) -> None:
        """A slot is not used any more."""
        self._free.setdefault(slot.nbytes, []).append(slot)

    def lose(self, slot: Slot) -> None:
        """A slot that somebody may still write into counts no more until it is found again."""
        self.allocated -= slot.nbytes

    def find(self, slot: Slot) -> None:
        """A lost slot can be used again."""
        self.allocated += slot.nbytes
        self.put(slot)

    def _give_back(self, slot: Slot) -> None:
        slot.free()
        self.allocated -= slot.nbytes
        if slot.arena is not None:
            self._vacant.setdefault(slot.nbytes, []).append((slot.arena, slot.offset))

    def close(self) -> None:
        """Give all waiting memory back."""
        for slots in self._free.values():
            for slot in slots:
                self._give_back(slot)
        self._free.clear()
        self._vacant.clear()


class SlabFile:
    """The experts' file, open for reading past the page cache where the file system allows it.

    A file that is removed or replaced by another one goes on being read: the open one is what was checked. One that is
    changed in place is refused from then on.

    Args:
        read: what reads; tests put faults there.
    """

    def __init__(self, path: Path, size: int, read: Read | None = None) -> None:
        self.path = path
        self._read: Read = read or os.preadv
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self.direct = True
            self.descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except OSError:
            self.direct = False
            self.descriptor = self._open_plain(flags)
        found = os.fstat(self.descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            os.close(self.descriptor)
            raise StoreError(f"{path}: has {found.st_size} bytes where {size} were packed; pack the model again")
        self._stamp = (found.st_size, found.st_mtime_ns)
        if self.direct and size:
            self._try_direct(flags)

    def _open_plain(self, flags: int) -> int:
        try:
            return os.open(self.path, flags)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be opened ({error.strerror})") from None

    def _try_direct(self, flags: int) -> None:
        """Some file systems open a file for direct reads and then refuse them."""
        page = Slot(PAGE)
        try:
            os.preadv(self.descriptor, [page.view], 0)
        except OSError:
            os.close(self.descriptor)
            self.direct = False
            self.descriptor = self._open_plain(flags)
        finally:
            page.free()

    def read(self, offset: int, into: memoryview) -> None:
        """Fill ``into`` from ``offset``.

        Raises:
            StoreError: the disk fails, the file ends early or was changed.
        """
        done = 0
        while done < len(into):
            try:
                count = self._read(self.descriptor, [into[done:]], offset + done)
            except OSError as error:
                raise StoreError(
                    f"{self.path}: reading at {offset + done} failed ({error.strerror or error})"
                ) from None
            if count <= 0:
                raise StoreError(
                    f"{self.path}: ends at {offset + done}; {len(into) - done} bytes of a slab are missing"
                )
            done += count
        found = os.fstat(self.descriptor)
        if (found.st_size, found.st_mtime_ns) != self._stamp:
            raise StoreError(f"{self.path}: was changed while it was in use; start again")
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, len(into), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close it."""
        os.close(self.descriptor)


def load_all(packed: Packed) -> tuple[list[Slot], dict[int, npt.NDArray[np.int64]]]:
    """Every slab in memory.

    Returns:
        The memory of each layer, to be kept as long as it is used; layer -> int64 [experts], addresses of its slabs.

    Raises:
        StoreError: the file cannot be read.
    """
    file = SlabFile(packed.path / EXPERTS, packed.files[EXPERTS][0])
    kept, addresses = [], {}
    try:
        for layer, there in packed.experts.items():
            slot = Slot(there.size)
            file.read(there.offset, slot.view)
            kept.append(slot)
            starts = np.array([there.place(expert)[0] for expert in range(there.num)], dtype=np.int64)
            addresses[layer] = slot.address + starts - there.offset
    finally:
        file.close()
    return kept, addresses
