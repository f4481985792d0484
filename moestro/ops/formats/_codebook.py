"""Fixed words of 16 bits for strings of trits of variable length: what codes rows that are mostly zeros.

Symbols 0, 1, 2 stand for zero, the low and the high value of a row. A codebook lists strings; a row is cut into strings
of the list, and each is stored as its place in it. Strings are cheap by their cost in a model of independent symbols,

    cost = z c_0 + k c_1,   c_0 = -log2 p_0,   c_1 = -log2((1 - p_0) / 2),   z zeros, k other symbols,

in units of 2^-20 bit, so that the order of strings is the same on every machine. Ties: shorter first, then fewer
non-zeros, then lexicographic.

    ``tree``   the leaves of the tree in which the cheapest 32767 strings (the empty one counts) branch three ways; no
               leaf begins another, so a row is cut in one way only. What is open at the end of a row is filled up with
               zeros. This is the best one can do with strings that are independent of what came before.
    ``pairs``  the cheapest 65536 strings of 1 to 14 pairs of symbols. A beginning of a listed string is listed as well,
               so the longest match always ends on a word, at the end of a row too (of even width; odd ones get a zero).

Source: ``pairs`` QMoE (2310.16795, section 4.2); ``tree`` B. P. Tunstall, Synthesis of noiseless compression codes,
Georgia Institute of Technology, 1967.
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moestro.core.errors import ConfigError


Kind = Literal["tree", "pairs"]
Ints = NDArray[np.int64]

WORDS: Final = 1 << 16
MAX_PAIRS: Final = 14
UNIT: Final = float(1 << 20)
CHUNK: Final = 1 << 22
"""Symbols that a thread encodes at a time."""


@dataclass(frozen=True)
class Codebook:
    """Strings by word, and the steps that cut rows into them.

    Attributes:
        length_W: int32, symbols of each string. nonzero_KW: int16, its k-th other symbol at place p as 2 p + (symbol -
            1), -1 where there are fewer; K is the most that a string has.
        step: int64 [states * 9], the state (times 9) after a state and a pair of symbols. word: uint16 [states * 9],
            the word that ends within that step. ends: a step into a state below this one (times 9) ends a word.
        start: the state (times 9) before the first pair. flush: int64 [2, states], the word for what is open at the end
            of a row of even and of odd width, -1 for nothing.
    """

    length_W: Tensor
    nonzero_KW: Tensor
    step: Ints
    word: NDArray[np.uint16]
    ends: int
    start: int
    flush: Ints


@functools.lru_cache(maxsize=64)
def codebook(kind: Kind, zeros: int = 885, words: int = WORDS, max_pairs: int = MAX_PAIRS) -> Codebook:
    """The codebook for rows with ``zeros`` zeros in a thousand symbols; the same on every machine.

    Args:
        words: at most so many, for smaller books. max_pairs: of ``pairs``.

    Raises:
        ConfigError: zeros that are no share of the most frequent symbol, or so few words that they miss a pair.
    """
    if not 334 <= zeros <= 999:
        raise ConfigError(f"{zeros / 1000:g} zeros; a codebook is for shares above 1/3 and below 1 (0.334 to 0.999)")
    if not 27 <= words <= WORDS:
        raise ConfigError(f"{words} words; a codebook has 27 to {WORDS}")
    cost = (round(-math.log2(zeros / 1000) * UNIT), round(-math.log2((1000 - zeros) / 2000) * UNIT))
    if kind == "tree":
        return _tree(_grow(cost, (words - 1) // 2 - 1, 1, None), words)
    return _pairs(_grow(cost, words, 2, max_pairs))


def quads(zeros: int, words: int = WORDS, most: int = 7) -> "Strings":
    """The cheapest strings of 1 to ``most`` quadruples of symbols, among them all single ones; see ``Strings``."""
    cost = (round(-math.log2(zeros / 1000) * UNIT), round(-math.log2((1000 - zeros) / 2000) * UNIT))
    return _grow(cost, words, 4, most)


@dataclass(frozen=True)
class Strings:
    """Strings, shorter first, then lexicographic: place of the string without the last unit (-1: empty), the last unit
    (a symbol or a pair, base 3), number of units, non-zeros as in Codebook."""

    parent: Ints
    last: Ints
    depth: Ints
    nonzero: Ints


def _cheapest(cost: tuple[int, int], count: int, unit: int, most: int | None) -> dict[tuple[int, int], int]:
    """How many strings to take of n units and k non-zeros: all of the cheapest kinds, a part of the last one."""
    chosen: dict[tuple[int, int], int] = {}
    limit = 64 if most is None else most
    while True:
        kinds = sorted(
            ((unit * n - k) * cost[0] + k * cost[1], n, k) for n in range(1, limit + 1)
            for k in range(min(unit * n, 16) + 1)
        )  # fmt: skip
        chosen.clear()
        if unit > 2:  # so few words that rare units would be missed, without which not every row can be written
            chosen |= {(1, k): math.comb(unit, k) << k for k in range(unit + 1)}
        left = count - sum(chosen.values())
        for _, n, k in kinds:
            if (n, k) in chosen:
                continue
            chosen[n, k] = min(left, math.comb(unit * n, k) << k)
            left -= chosen[n, k]
            if not left:
                break
        if most is not None or (not left and max(n for n, _ in chosen) < limit):
            return chosen
        limit *= 2


def _grow(cost: tuple[int, int], count: int, unit: int, most: int | None) -> Strings:
    """The cheapest strings of units of ``unit`` symbols, level by level."""
    chosen = _cheapest(cost, count, unit, most)
    arity = 3**unit
    symbols = np.array([[value // 3 ** (unit - 1 - place) % 3 for place in range(unit)] for value in range(arity)])
    widest = max(k for _, k in chosen)
    parents, lasts, depths, nonzeros = [], [], [], []
    ids, total = np.array([-1]), 0
    table, used = np.full((1, widest), -1), np.zeros(1, dtype=np.int64)
    for n in range(1, max(n for n, _ in chosen) + 1):
        last = np.tile(np.arange(arity), len(ids))
        more = np.repeat(used, arity) + (symbols > 0).sum(1)[last]
        keep = np.zeros(len(last), dtype=bool)
        for k in np.unique(more):
            keep[np.flatnonzero(more == k)[: chosen.get((n, int(k)), 0)]] = True
        row, last = np.repeat(np.arange(len(ids)), arity)[keep], last[keep]
        parents.append(ids[row])
        table, used = table[row].copy(), used[row].copy()
        for place in range(unit):
            symbol = symbols[last, place]
            hit = np.flatnonzero(symbol)
            table[hit, used[hit]] = 2 * (unit * (n - 1) + place) + symbol[hit] - 1
            used[hit] += 1
        lasts.append(last)
        depths.append(np.full(len(last), n))
        nonzeros.append(table)
        ids = np.arange(total, total + len(last))
        total += len(last)
    return Strings(*(np.concatenate(part) for part in (parents, lasts, depths, nonzeros)))


def _pairs(strings: Strings) -> Codebook:
    """States are the strings themselves, the first nine the single pairs; a pair that does not go on starts anew."""
    count = len(strings.parent)
    if not np.array_equal(strings.last[strings.parent < 0], np.arange(9)):
        raise ConfigError(f"{count} words miss some single pair; take more words")
    step = np.tile(np.arange(9), (count + 1, 1))  # the last state is the start
    inner = np.flatnonzero(strings.parent >= 0)
    step[strings.parent[inner], strings.last[inner]] = inner
    return Codebook(
        length_W=torch.from_numpy(2 * strings.depth).to(torch.int32),
        nonzero_KW=torch.from_numpy(strings.nonzero.T.copy()).to(torch.int16),
        step=(9 * step).ravel(),
        word=np.repeat(np.arange(count + 1), 9).astype(np.uint16),
        ends=9 * 9,
        start=9 * count,
        flush=np.tile(np.append(np.arange(count), -1), (2, 1)),
    )


def _tree(strings: Strings, words: int) -> Codebook:
    """States are the strings that branch, the empty one first; words are the leaves in the order of their parents."""
    count = len(strings.parent) + 1
    child = np.full((count, 3), -1)
    child[strings.parent + 1, strings.last] = np.arange(1, count)
    if bool((child[0] < 0).any()):
        raise ConfigError(f"{words} words are too few for so many zeros; take more words")
    leaf = child < 0
    owner, symbol = np.nonzero(leaf)
    child[leaf] = -1 - np.arange(len(owner))  # a leaf is below 0
    depth = np.append(0, strings.depth)
    nonzero = np.concatenate([np.full((1, strings.nonzero.shape[1]), -1), strings.nonzero])
    used = (nonzero >= 0).sum(1)
    table = np.concatenate([nonzero[owner], np.full((len(owner), 1), -1)], 1)
    hit = np.flatnonzero(symbol)
    table[hit, used[owner[hit]]] = 2 * depth[owner[hit]] + symbol[hit] - 1
    first, second = np.repeat(np.arange(3), 3), np.tile(np.arange(3), 3)
    middle = child[:, first]
    after = child[np.maximum(middle, 0), second]
    word = np.where(middle < 0, -1 - middle, np.where(after < 0, -1 - after, 0))
    flush = np.full((2, count), -1)
    for state in range(count - 1, 0, -1):
        beyond = child[state, 0]
        flush[:, state] = -1 - beyond if beyond < 0 else flush[0, beyond]
    flush[1, child[0, 0]] = -1  # all that is open is the zero after an odd row
    return Codebook(
        length_W=torch.from_numpy(depth[owner] + 1).to(torch.int32),
        nonzero_KW=torch.from_numpy(table.T[: int((table >= 0).sum(1).max())].copy()).to(torch.int16),
        step=(9 * np.where(after < 0, 0, after)).ravel(),
        word=word.astype(np.uint16).ravel(),
        ends=9 * 4,  # only after the end of a word is the state the empty string or a single symbol
        start=0,
        flush=flush,
    )


def encode(symbols_RI: Tensor, book: Codebook) -> tuple[Tensor, Tensor]:
    """Words of rows, one row after the other.

    Args:
        symbols_RI: uint8, 0, 1 or 2; on a CPU.

    Returns:
        Words uint16 [words], and how many each row has, int64 [R].
    """
    rows, width = symbols_RI.shape
    if not rows or not width:
        raise ConfigError(f"rows to encode have the shape {[rows, width]}; both must be at least 1")
    size = max(1, min(CHUNK // width, -(-rows // torch.get_num_threads())))
    parts = [symbols_RI[at : at + size].numpy() for at in range(0, rows, size)]
    if torch.get_num_threads() > 1 and len(parts) > 1:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            done = list(pool.map(functools.partial(_encode, book=book), parts))
    else:
        done = [_encode(part, book) for part in parts]
    words, counts = (np.concatenate(found) for found in zip(*done, strict=True))
    return torch.from_numpy(words), torch.from_numpy(counts)


def _encode(symbols_RI: NDArray[np.uint8], book: Codebook) -> tuple[NDArray[np.uint16], Ints]:
    """All rows take a step at the same time, pair by pair."""
    rows, width = symbols_RI.shape
    pair_RT = symbols_RI[:, 0::2] * np.uint8(3)
    pair_RT[:, : width // 2] += symbols_RI[:, 1::2]
    pair_TR = np.ascontiguousarray(pair_RT.T)
    steps = len(pair_TR)
    at_TR = np.empty((steps, rows), dtype=np.int64)
    state_R = np.full(rows, book.start)
    ended_TR = np.empty((steps + 1, rows), dtype=bool)
    for pair_R, at_R, ended_R in zip(pair_TR, at_TR, ended_TR, strict=False):
        np.add(state_R, pair_R, out=at_R)
        np.take(book.step, at_R, out=state_R, mode="clip")
        np.less(state_R, book.ends, out=ended_R)
    if book.start:
        ended_TR[0] = False  # the first pair of all begins a word and ends none
    flush_R = book.flush[width % 2, state_R // 9]
    ended_TR[steps] = flush_R >= 0
    row, time = np.nonzero(np.ascontiguousarray(ended_TR.T))
    place = np.minimum(time, steps - 1) * rows + row
    words = book.word[at_TR.ravel()[place]]
    last = time == steps
    words[last] = flush_R[row[last]].astype(np.uint16)
    return words, ended_TR.sum(0)


def decode(words: Tensor, counts_R: Tensor, width: int, book: Codebook) -> tuple[Tensor, Tensor]:
    """Where a stack of rows is not zero.

    Args:
        words: uint16, those of all rows, more may follow. counts_R: words of each row.

    Returns:
        Places int64 [n] in the flattened rows [R, width], and booleans [n]: high (symbol 2) or low (1).
    """
    count_R = counts_R.long()
    word_N = words[: int(count_R.sum())].to(torch.int64)
    length_N = book.length_W.to(words.device)[word_N].long()
    before_N = length_N.cumsum(0) - length_N
    first_R = count_R.cumsum(0) - count_R
    row_R = torch.arange(len(count_R), device=words.device)
    live_R = count_R > 0
    base_R = torch.zeros_like(count_R)
    base_R[live_R] = row_R[live_R] * width - before_N[first_R[live_R]]
    start_N = before_N + base_R.repeat_interleave(count_R)
    places, high = [], []
    for nonzero_W in book.nonzero_KW.to(words.device):
        found_N = nonzero_W[word_N]
        here_N = found_N >= 0
        found_N = found_N[here_N]
        places.append(start_N[here_N] + (found_N >> 1))
        high.append((found_N & 1).bool())
    return torch.cat(places), torch.cat(high)
