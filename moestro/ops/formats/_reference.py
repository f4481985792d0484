"""The plain twins: bits and weights one by one, for tests. Slow, and obviously right."""

import heapq
import math
from collections.abc import Sequence

from moestro.ops.formats._base import Packing


def pack_row(codes: Sequence[int], bits: int) -> bytes:
    """One row of codes as a stream of bits, low bits first."""
    stream = sum(code << (index * bits) for index, code in enumerate(codes))
    return stream.to_bytes(-(-len(codes) * bits // 8), "little")


def unpack_row(packed: bytes, bits: int, count: int) -> list[int]:
    """The first ``count`` codes of a row."""
    stream = int.from_bytes(packed, "little")
    return [stream >> (index * bits) & ((1 << bits) - 1) for index in range(count)]


def weight_at(code: int, group: int, used: Packing, scale: Sequence[float], zero: Sequence[int]) -> float:
    """The weight of one code of the integer and sign formats, from its group's scale and zero point."""
    bits = int(used.format[-1])
    if used.format == "sign1":
        return scale[group] if code else -scale[group]
    return (code - (zero[group] if used.format.startswith("uint") else 1 << (bits - 1))) * scale[group]


Trits = tuple[int, ...]


def _costs(zeros: int) -> tuple[int, int]:
    return round(-math.log2(zeros / 1000) * 2**20), round(-math.log2((1000 - zeros) / 2000) * 2**20)


def pair_strings(zeros: int, words: int, max_pairs: int) -> list[Trits]:
    """The strings of ``ternary14`` as its paper finds them: the cheapest first, from a queue that every string refills
    with its nine continuations."""
    cost = _costs(zeros)
    queue: list[tuple[int, int, int, Trits]] = [(0, 0, 0, ())]
    found: list[Trits] = []
    while len(found) < words:
        price, length, other, string = heapq.heappop(queue)
        if string:
            found.append(string)
        for pair in [(a, b) for a in range(3) for b in range(3)] if length < max_pairs else []:
            used = sum(symbol > 0 for symbol in pair)
            more = (price + (2 - used) * cost[0] + used * cost[1], length + 1, other + used, string + pair)
            heapq.heappush(queue, more)
    return sorted(found, key=lambda string: (len(string), string))


def leaf_strings(zeros: int, words: int) -> list[Trits]:
    """The strings of ``ternary``: the cheapest leaf branches until there are as many leaves as there can be."""
    cost = _costs(zeros)
    leaves: list[tuple[int, int, int, Trits]] = [(0, 0, 0, ())]
    while len(leaves) + 2 <= words:
        price, length, other, string = heapq.heappop(leaves)
        for symbol in range(3):
            more = (price + cost[symbol > 0], length + 1, other + (symbol > 0), (*string, symbol))
            heapq.heappush(leaves, more)
    return sorted((string for *_, string in leaves), key=lambda string: (len(string), string))


def encode_row(symbols: Sequence[int], strings: Sequence[Trits]) -> list[int]:
    """Words of one row: the longest string that fits, again and again; zeros follow the row."""
    known = {string: word for word, string in enumerate(strings)}
    longest = max(map(len, strings))
    padded, place, words = (*symbols, *[0] * longest), 0, []
    while place < len(symbols):
        length = next(n for n in range(longest, 0, -1) if tuple(padded[place : place + n]) in known)
        if length > len(symbols) - place:  # strings that end with the row (and a zero to make it even) are enough
            left = len(symbols) - place
            short = range(left + left % 2, 0, -1)
            length = next((n for n in short if tuple(padded[place : place + n]) in known), length)
        words.append(known[tuple(padded[place : place + length])])
        place += length
    return words
