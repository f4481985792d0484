"""One step's rows, and the pages that hold the keys and values of sequences.

A page holds the positions 16 i .. 16 i + 15 of a sequence. Full pages are known by a hash over all tokens up to their
end, so that a sequence with the same beginning takes them instead of computing them again. A page that somebody else
may read is never written: its would-be writer gets a copy.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
OnRoute = Callable[[int, Ints, Floats], None]


@dataclass(frozen=True)
class Batch:
    """What one step computes: R rows of S sequences.

    Attributes:
        tokens, positions, rows_of: int32 [R]; ``rows_of`` indexes ``sequences`` and ``tables``. Rows of a sequence
            stand in order of position.
        sequences: ids, the same over the life of a sequence.
        tables: int32 [S, P], page ids of each sequence, -1 behind the last.
        want: int32 [L], rows whose logits are wanted.
        routes: int32 [R], index into the forward's ``overrides``; None: the model's own routing for all.
    """

    tokens: Ints
    positions: Ints
    rows_of: Ints
    sequences: list[int]
    tables: Ints
    want: Ints
    routes: Ints | None = None


class Forward(Protocol):
    """A model with a paged cache of keys and values.

    Attributes:
        vocab: tokens it knows. page: positions of a page. pages: how many there are. page_bytes: of one.
        layers: their number. experts: experts of each layer, 0 for a dense one.
        on_route: called with (layer, ids [R, k], weights [R, k]) of what was followed; -1 is no expert.
    """

    vocab: int
    page: int
    pages: int
    page_bytes: int
    layers: int
    experts: tuple[int, ...]
    on_route: OnRoute | None

    def step(self, batch: Any) -> Floats:
        """Logits float32 [L, vocab] of the wanted rows; writes keys and values of every row at its position."""

    def forget(self, sequence: int) -> None:
        """The sequence is over."""

    def copy_page(self, src: int, dst: int) -> None:
        """Keys and values of one page, all layers."""


@dataclass(eq=False)
class Table:
    """The pages of one sequence.

    Attributes:
        id: of the sequence. pages: page ids in order. length: positions whose keys and values are written.
        promised: pages it may still take. chain: for each full page, the hash over all tokens up to its end.
    """

    id: int
    pages: list[int]
    length: int
    promised: int
    chain: list[bytes]
    salt: bytes = b""


@dataclass
class Pages:
    """Hands out pages; a promise made when a sequence opens is always kept, so that no sequence waits half-way.

    Args:
        count: pages there are. page: positions of one. share: keep full pages for sequences that begin alike.
    """

    count: int
    page: int = 16
    share: bool = True
    hit_tokens: int = 0
    _free: list[int] = field(default_factory=list)
    _refs: list[int] = field(default_factory=list)
    _key_of: dict[int, bytes] = field(default_factory=dict)
    _page_of: dict[bytes, int] = field(default_factory=dict)
    _idle: "OrderedDict[int, None]" = field(default_factory=OrderedDict)
    _promised: int = 0
    _next: int = 0

    def __post_init__(self) -> None:
        self._free = list(range(self.count - 1, -1, -1))
        self._refs = [0] * self.count

    @property
    def room(self) -> int:
        """Pages that nobody holds and nobody was promised."""
        return len(self._free) + len(self._idle) - self._promised

    @property
    def used(self) -> int:
        """Pages that sequences hold."""
        return self.count - len(self._free) - len(self._idle)

    def needed(self, positions: int) -> int:
        """Pages of so many positions."""
        return -(-positions // self.page)

    def open(self, tokens: Sequence[int], positions: int, salt: bytes = b"") -> Table | None:
        """A table for a sequence that starts with ``tokens`` and grows to ``positions``; None while there is no room.

        The positions that shared pages cover are already written: at most all tokens but the last, whose logits are
        wanted.

        Args:
            salt: sequences share only with those of the same salt (another routing gives other keys and values).
        """
        found, chain = self._match(tokens, salt)
        length = min(len(found) * self.page, len(tokens) - 1)
        # A match up to the last token ends inside a shared page: one more, for the copy of it.
        need = self.needed(positions) - len(found) + (1 if length < len(found) * self.page else 0)
        idle = sum(1 for page in found if self._refs[page] == 0)
        if need > self.room - idle:
            return None
        for page in found:
            self._refs[page] += 1
            self._idle.pop(page, None)
        self._promised += need
        self.hit_tokens += length
        self._next += 1
        return Table(self._next, found, length, need, chain, salt)

    def write(self, table: Table, stop: int) -> list[tuple[int, int]]:
        """Make positions ``table.length`` .. ``stop - 1`` writable; (from, to) pages to copy before the step."""
        copies = []
        for index in range(table.length // self.page, self.needed(stop)):
            if index == len(table.pages):
                table.pages.append(self._take(table))
            elif self._refs[table.pages[index]] > 1 or table.pages[index] in self._key_of:
                old = table.pages[index]
                table.pages[index] = self._take(table)
                copies.append((old, table.pages[index]))
                del table.chain[index:]
                self._drop(old)
        return copies

    def written(self, table: Table, tokens: Sequence[int], length: int) -> None:
        """The first ``length`` positions hold ``tokens`` now; full pages become known to others."""
        table.length = length
        if not self.share:
            return
        for index in range(len(table.chain), table.length // self.page):
            before = table.chain[-1] if table.chain else table.salt
            key = _link(before, tokens[index * self.page : (index + 1) * self.page])
            table.chain.append(key)
            if key not in self._page_of:
                page = table.pages[index]
                self._page_of[key], self._key_of[page] = page, key

    def close(self, table: Table) -> None:
        """The sequence is over: its pages are free, or idle when others may still want them."""
        for page in reversed(table.pages):
            self._drop(page)
        self._promised -= table.promised
        table.pages, table.promised = [], 0

    def _match(self, tokens: Sequence[int], salt: bytes) -> tuple[list[int], list[bytes]]:
        found: list[int] = []
        chain: list[bytes] = []
        if self.share:
            for start in range(0, len(tokens) - self.page + 1, self.page):
                key = _link(chain[-1] if chain else salt, tokens[start : start + self.page])
                page = self._page_of.get(key)
                if page is None:
                    break
                found.append(page)
                chain.append(key)
        return found, chain

    def _take(self, table: Table) -> int:
        if table.promised < 1:
            raise IndexError(f"sequence {table.id} wants a page more than it was promised")
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)  # the one that was longest of no use
            del self._page_of[self._key_of.pop(page)]
        table.promised -= 1
        self._promised -= 1
        self._refs[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._refs[page] -= 1
        if self._refs[page] == 0:
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)


def _link(before: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a page and of all before it; 128 bits, keyed by nothing: equal hashes mean equal tokens."""
    digest = hashlib.blake2b(before, digest_size=16)
    digest.update(np.asarray(tokens, dtype=np.int64).tobytes())
    return digest.digest()
