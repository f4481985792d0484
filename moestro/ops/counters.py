"""Proof that a path ran: one call counter per backend."""

from collections.abc import Iterator
from contextlib import contextmanager


calls: dict[str, int] = {}
"""Calls of every backend since the process started, by name."""


class CallCount:
    """Calls of one backend since the block began; compares equal to an int; keeps counting while open."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._start = calls.get(backend, 0)
        self._end: int | None = None

    def close(self) -> None:
        """Freeze the count."""
        self._end = calls.get(self.backend, 0)

    def __int__(self) -> int:
        return (calls.get(self.backend, 0) if self._end is None else self._end) - self._start

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int | CallCount) and int(self) == int(other)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"{int(self)} call(s) of {self.backend}"


def count(backend: str) -> None:
    """Note one call of `backend`."""
    calls[backend] = calls.get(backend, 0) + 1


@contextmanager
def counting(backend: str) -> Iterator[CallCount]:
    """Count the calls of `backend` inside the block:

    `with counting("segments") as calls: ...; assert calls == 1`.
    """
    counted = CallCount(backend)
    try:
        yield counted
    finally:
        counted.close()
