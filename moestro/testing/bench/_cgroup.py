"""A memory cgroup of one's own, where the system lets the user make one: the kernel then keeps the limit and the peak.

Both versions of cgroups work. A group counts the pages of files for whoever touches them first, so files must be out of
the page cache before (``drop``), or a process under a limit reads what others paid for.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError


class Group:
    """A group with a limit in bytes, swap included. ``close`` removes it; its processes must have ended."""

    def __init__(self, path: Path, limit: int, version: int) -> None:
        self.path, self.limit, self.version = path, limit, version
        if version == 2:
            (path / "memory.max").write_text(str(limit))
            _write(path / "memory.swap.max", "0")
        else:
            (path / "memory.limit_in_bytes").write_text(str(limit))
            _write(path / "memory.memsw.limit_in_bytes", str(limit))

    def join(self) -> None:
        """Put the calling process into the group."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int | None:
        """The most bytes that the group ever held, by the kernel; None where it does not say (before Linux 5.19)."""
        file = self.path / ("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")
        return int(file.read_text()) if file.is_file() else None

    def close(self) -> None:
        """Remove the group."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def group(name: str, limit: int) -> Group | None:
    """A new group; None where the user may make none."""
    for parent, version in _parents():
        path = parent / f"{name}-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            return Group(path, limit, version)
        except OSError:
            path.rmdir()
    return None


def _parents() -> list[tuple[Path, int]]:
    """Where a group may be made: beside or below this process, in the hierarchies that count memory."""
    found: list[tuple[Path, int]] = []
    own = Path("/proc/self/cgroup")
    for line in own.read_text(encoding="ascii").splitlines() if own.is_file() else ():
        _, controllers, place = line.split(":", 2)
        if "memory" in controllers.split(","):
            roots, version = [Path("/sys/fs/cgroup/memory")], 1
        elif not controllers:
            roots, version = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")], 2
        else:
            continue
        for root in roots:
            here = root / place.lstrip("/")
            found += [(parent, version) for parent in (here, here.parent, root) if _is_below(parent, root)]
    return found


def _is_below(path: Path, root: Path) -> bool:
    return path.is_dir() and path.is_relative_to(root)


def _write(file: Path, text: str) -> None:
    """Where the kernel has this file."""
    with contextlib.suppress(OSError):
        file.write_text(text)


def drop(path: Path) -> None:
    """Take a file, or all files of a folder, out of the page cache.

    Raises:
        ConfigError: the system cannot.
    """
    advise: Any = getattr(os, "posix_fadvise", None)
    if advise is None:
        raise ConfigError("this system cannot drop files from its page cache; memory limits cannot be compared here")
    for file in [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are still to be written cannot be dropped
            advise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
