"""Matrices of three values a row in words of 16 bits: how they lie in bytes, and what they stand for.

    weight[n, k] = (0, low[n], high[n])[symbol[n, k]]

A matrix [N, K] of the layout ``t1`` begins with B + 1 offsets (uint32), B = ceil(N / 16): where its row blocks begin,
and where the last one ends. A row block is 16 low values, 16 high values (bfloat16), how many words each of its 16 rows
has (uint16), and the words, row after row; rows beyond N have none. All matrices of a model share one table of strings:
entry w, a number of 64 bits, holds the string of word w from its lowest bit on, two bits a symbol, and in its highest
byte the length in quadruples of symbols, 1 to ``LONGEST``. A string thus takes whole bytes. The strings of a row, one
behind the other, are its K symbols and up to three zeros.

Numpy only: a serving process reads with this; ``moestro.engine.pack_ternary`` writes.
"""

from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError
from moestro.engine.layout import LANES, Bytes, Floats


Table = npt.NDArray[np.uint64]
Shorts = npt.NDArray[np.uint16]

CODED: Final = "t1"
WORDS: Final = 1 << 16
LONGEST: Final = 7
QUADS: Final = 81
HEAD: Final = 6 * LANES
"""Bytes of a row block in front of its words."""


def check_table(table: Table) -> None:
    """Raise ConfigError for a table whose strings are empty, too long, or hold a symbol that does not exist."""
    length = table >> np.uint64(56)
    bits = table & np.uint64((1 << 56) - 1)
    sound = (length >= 1) & (length <= LONGEST)
    sound &= bits >> np.uint64(8) * np.minimum(length, np.uint64(LONGEST)) == 0
    sound &= bits & (bits >> np.uint64(1)) & np.uint64(0x5555_5555_5555_5555) == 0
    if table.shape != (WORDS,) or not sound.all():
        wrong = "" if table.shape != (WORDS,) else f"; the entry {int(np.argmin(sound))} is damaged"
        raise ConfigError(f"a table of strings has {WORDS} entries, this one {table.size}{wrong}")


def most_bytes(n: int, k: int) -> int:
    """Bytes that a matrix [N, K] takes at most: words of a quadruple each."""
    rows = -(-n // LANES)
    return 4 * (rows + 1) + rows * HEAD + 2 * n * -(-k // 4)


def blocks(data: Bytes, n: int) -> npt.NDArray[np.int64]:
    """Where the row blocks of a matrix begin, and where the last one ends.

    Raises:
        ConfigError: they do not lie in the data.
    """
    count = -(-n // LANES)
    if len(data) < 4 * (count + 1):
        raise ConfigError(f"a t1 matrix of {n} rows begins with {4 * (count + 1)} bytes; {len(data)} are there")
    starts = np.frombuffer(data[: 4 * (count + 1)].tobytes(), dtype="<u4").astype(np.int64)
    ordered = bool((np.diff(starts) >= HEAD).all()) and starts[0] >= 4 * (count + 1)
    if not ordered or starts[-1] > len(data):
        raise ConfigError(f"the row blocks of a t1 matrix do not lie in its {len(data)} bytes")
    return starts


def parts(data: Bytes, n: int) -> tuple[Floats, Floats, Shorts, Shorts]:
    """Low and high values float32 [N], the words of each row [N], and all words, of a matrix [N, ...].

    Raises:
        ConfigError: damaged data.
    """
    starts = blocks(data, n)
    values, counts, words = [], [], []
    for first, end in pairwise(starts):
        head = np.frombuffer(data[first : first + HEAD].tobytes(), dtype="<u2")
        values.append(head[: 2 * LANES])
        counts.append(head[2 * LANES :])
        size = 2 * int(counts[-1].sum(dtype=np.int64))
        if first + HEAD + size > end:
            raise ConfigError(f"the words of a row block take {size} bytes, {end - first - HEAD} are there")
        words.append(np.frombuffer(data[first + HEAD : first + HEAD + size].tobytes(), dtype="<u2"))
    both = (np.stack(values).astype(np.uint32) << 16).view(np.float32).reshape(-1, 2, LANES)
    low, high = (both[:, side].reshape(-1)[:n] for side in (0, 1))
    return low, high, np.concatenate(counts)[:n], np.concatenate(words)


def symbols(data: Bytes, n: int, k: int, table: Table) -> Bytes:
    """The symbols uint8 [N, K] of a matrix.

    Raises:
        ConfigError: damaged data.
    """
    _, _, counts, words = parts(data, n)
    entry = table[words]
    length = 4 * (entry >> np.uint64(56)).astype(np.int64)
    ends = np.cumsum(counts, dtype=np.int64)
    before = np.append(0, np.cumsum(length))
    total = before[ends] - before[ends - counts]
    if (total < k).any():
        row = int(np.argmax(total < k))
        raise ConfigError(f"row {row} of a t1 matrix has {int(total[row])} symbols, not {k}")
    found = np.zeros((n, int(total.max())), dtype=np.uint8)
    rows = np.repeat(np.arange(n), counts)
    start = before[:-1] - before[ends - counts][rows]
    for place in range(4 * LONGEST):
        here = length > place
        found[rows[here], start[here] + place] = (entry[here] >> np.uint64(2 * place)) & np.uint64(3)
    return found[:, :k]


def unpack(data: Bytes, n: int, k: int, table: Table) -> Floats:
    """The weights float32 [N, K]."""
    low, high, _, _ = parts(data, n)
    codes: Any = symbols(data, n, k, table)
    found: Floats = np.where(codes == 1, low[:, None], np.where(codes == 2, high[:, None], np.float32(0)))
    return found
