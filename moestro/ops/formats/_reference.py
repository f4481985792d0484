"""The plain twins: bits and weights one by one, for tests. Slow, and obviously right."""

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
