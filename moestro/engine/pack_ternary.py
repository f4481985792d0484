"""Writing matrices of three values a row; see ``moestro.engine.ternary`` for the bytes."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError
from moestro.engine.layout import LANES, Bytes
from moestro.engine.ternary import HEAD, LONGEST, QUADS, WORDS, Table


FEWEST, MOST, STEP = 340, 990, 10


def nearest_zeros(share: float) -> int:
    """Zeros in a thousand of the table to use where a share of the symbols is zero."""
    return min(max(STEP * round(1000 * share / STEP), FEWEST), MOST)


@dataclass(frozen=True)
class Book:
    """Strings of quadruples, and the steps that cut rows into the longest of them.

    Attributes:
        table: uint64 [65536], see ``moestro.engine.ternary``. step: int32 [65537, 81], the string after a string and a
            quadruple; one below 81 is that quadruple alone: the string before has ended. The last row is the beginning.
    """

    table: Table
    step: npt.NDArray[np.int32]


@functools.lru_cache(maxsize=4)
def book(zeros: int) -> Book:
    """The strings for so many zeros in a thousand."""
    from moestro.ops.formats._codebook import quads

    strings = quads(zeros, WORDS, LONGEST)
    entry = np.zeros(WORDS, dtype=np.uint64)
    for place in strings.nonzero.T:
        here = place >= 0
        at = place[here].astype(np.uint64)
        entry[here] |= ((at & np.uint64(1)) + np.uint64(1)) << (at & ~np.uint64(1))
    step = np.tile(np.arange(QUADS, dtype=np.int32), (WORDS + 1, 1))
    inner = np.flatnonzero(strings.parent >= 0)
    step[strings.parent[inner], strings.last[inner]] = inner
    return Book(entry | strings.depth.astype(np.uint64) << np.uint64(56), step)


def encode(symbols: Bytes, found: Book) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
    """Words of rows uint8 [N, K], one row after the other, and how many each has."""
    n, k = symbols.shape
    padded = np.zeros((n, -(-k // 4) * 4), dtype=np.uint8)
    padded[:, :k] = symbols
    quad_TN = np.ascontiguousarray((padded.reshape(n, -1, 4) @ np.array([27, 9, 3, 1], np.uint8)).T)
    state_TN = np.empty((len(quad_TN), n), dtype=np.int32)
    state = np.full(n, WORDS, dtype=np.int32)
    for time, quad in enumerate(quad_TN):
        state = state_TN[time] = found.step[state, quad]
    ends = np.ones(state_TN.shape, dtype=bool)
    ends[:-1] = state_TN[1:] < QUADS
    return state_TN.T[ends.T].astype(np.uint16), ends.sum(0)


def pack(symbols: Bytes, low: Any, high: Any, zeros: int) -> Bytes:
    """A matrix.

    Args:
        symbols: uint8 [N, K], 0 zero, 1 low, 2 high. low, high: [N], exact in bfloat16. zeros: of the table.

    Raises:
        ConfigError: values that bfloat16 does not hold, or rows that are too wide.
    """
    n, k = symbols.shape
    if k >= 1 << 16:
        raise ConfigError(f"rows of {k} inputs are too wide for t1; at most {(1 << 16) - 1}")
    words, counts = encode(symbols, book(zeros))
    rows = -(-n // LANES)
    count = np.zeros(rows * LANES, dtype=np.uint16)
    count[:n] = counts
    head = np.concatenate(
        [_blocks(_bfloat(low), rows), _blocks(_bfloat(high), rows), count.reshape(rows, LANES)], axis=1
    ).astype("<u2")
    ends = np.cumsum(count.reshape(rows, LANES).sum(1, dtype=np.int64))
    sizes = HEAD + 2 * np.diff(ends, prepend=0)
    first = 4 * (rows + 1)
    starts = np.append(first, first + np.cumsum(sizes)).astype("<u4")
    parts = [starts.tobytes()]
    before = 0
    for row, end in zip(head, ends, strict=True):
        parts += [row.tobytes(), words[before:end].astype("<u2").tobytes()]
        before = int(end)
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def _bfloat(values: Any) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)
    if (bits & 0xFFFF).any():
        raise ConfigError("values of rows are no bfloat16 numbers")
    return (bits >> 16).astype(np.uint16)


def _blocks(values: npt.NDArray[np.uint16], rows: int) -> npt.NDArray[np.uint16]:
    padded = np.zeros(rows * LANES, dtype=np.uint16)
    padded[: len(values)] = values
    return padded.reshape(rows, LANES)
