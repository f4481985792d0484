"""How a matrix of weights lies in bytes: one layout for decoding and for prompts, for every instruction set.

A matrix [N out, K in] of a quantised layout is cut into blocks of 16 outputs x 64 inputs (N and K padded with weights
of
0); blocks stand row block by row block, inside one group by group. A block is its codes, then 16 float16 scales, then,
in layouts that have them, 16 zero points (uint8), one of each per output:

    weight[n, k] = scale[n, k // 64] * (code[n, k] - zero[n, k // 64])

The code of output r (0..15) and input 4 q + j has the place 64 q + 4 r + j among the 1024 of its block: four inputs of
16 outputs lie together, which is what one 64-byte multiply-add of integers reads. Places become bytes by planes: a
plane of S bytes holds ``w`` bits a code, byte i those of places i, i + S, i + 2 S ... from the low bits up.

======= ============ ================= ===================================
layout  zero         bytes a block     planes
======= ============ ================= ===================================
q8      128          1024 + 32         the codes themselves
q4      8            512 + 32          4 bits
q3      stored       384 + 32 + 16     the low 2 bits, then the third one
q2      stored       256 + 32 + 16     2 bits
q1      stored       128 + 32 + 16     1 bit
s1      -            128 + 32          1 bit: weight = scale * (2 code - 1)
f16 f32 -            2 or 4 a weight   [row block][input][16 outputs]
======= ============ ================= ===================================
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError


Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

LANES: Final = 16
GROUP: Final = 64
PLACES: Final = LANES * GROUP
ALIGN: Final = 64
"""Every matrix starts at a multiple of this many bytes."""

BITS: Final[Mapping[str, int]] = {"q8": 8, "q4": 4, "q3": 3, "q2": 2, "q1": 1, "s1": 1}
ZERO: Final[Mapping[str, int]] = {"q8": 128, "q4": 8}
"""What stands for zero in layouts that store no zero points."""

FIXED: Final[tuple[str, ...]] = (*ZERO, "s1")
"""Layouts that store no zero points."""

FLOATS: Final[Mapping[str, Any]] = {"f32": np.float32, "f16": np.float16}
LAYOUTS: Final[tuple[str, ...]] = (*FLOATS, *BITS)
OF_BITS: Final[Mapping[int, str]] = {32: "f32", 16: "f16", 8: "q8", 4: "q4", 3: "q3", 2: "q2", 1: "q1"}

_PLANES: Final[Mapping[str, tuple[tuple[int, int], ...]]] = {  # (width in bits, first bit of the code)
    "q8": ((8, 0),),
    "q4": ((4, 0),),
    "q3": ((2, 0), (1, 2)),
    "q2": ((2, 0),),
    "q1": ((1, 0),),
    "s1": ((1, 0),),
}
_ROWS = 1024  # rows quantised at a time: temporaries stay small beside a matrix of embeddings


def check_layout(layout: str) -> None:
    """Raise ConfigError unless there is such a layout."""
    if layout not in LAYOUTS:
        raise ConfigError(f"no matrix layout {layout!r}; there are {', '.join(LAYOUTS)}")


def block_bytes(layout: str) -> int:
    """Bytes of a block of a quantised layout."""
    return PLACES * BITS[layout] // 8 + 2 * LANES + (0 if layout in FIXED else LANES)


def matrix_bytes(layout: str, n: int, k: int) -> int:
    """Bytes of a matrix [n, k], padding included.

    Raises:
        ConfigError: no such layout, or an empty matrix.
    """
    check_layout(layout)
    if n < 1 or k < 1:
        raise ConfigError(f"a matrix [{n}, {k}] holds no weights")
    rows = -(-n // LANES)
    if layout in FLOATS:
        return rows * LANES * k * np.dtype(FLOATS[layout]).itemsize
    return rows * -(-k // GROUP) * block_bytes(layout)


def aligned(nbytes: int, boundary: int = ALIGN) -> Bytes:
    """Zeroed bytes in memory whose address is a multiple of ``boundary``."""
    raw = np.zeros(nbytes + boundary, dtype=np.uint8)
    start = -raw.ctypes.data % boundary
    return raw[start : start + nbytes]


def pack(weight: Any, layout: str, out: Bytes | None = None) -> Bytes:
    """A matrix [N, K] of floats in a layout, rounded to nearest.

    Args:
        weight: an array, or whatever has a ``shape`` and gives arrays for slices of rows.
        out: uint8 [matrix_bytes], filled and returned; made when None.

    Raises:
        ConfigError: not a matrix, no such layout, or weights that are NaN or infinite (float16: too large).
    """
    if len(weight.shape) != 2:
        raise ConfigError(f"a matrix has two axes; got the shape {list(weight.shape)}")
    n, k = weight.shape
    size = matrix_bytes(layout, n, k)
    out = aligned(size) if out is None else out
    if out.shape != (size,) or out.dtype != np.uint8:
        raise ConfigError(f"{layout} [{n}, {k}] takes {size} bytes; the place has {out.dtype} {list(out.shape)}")
    stride = size // -(-n // LANES)
    for first in range(0, n, _ROWS):
        part = np.asarray(weight[first : first + _ROWS], dtype=np.float32)
        if not np.isfinite(part).all():
            row, column = np.argwhere(~np.isfinite(part))[0]
            raise ConfigError(f"the weight [{first + row}, {column}] is {part[row, column]}")
        place = out[first // LANES * stride : -(-(first + len(part)) // LANES) * stride]
        if layout in FLOATS:
            place[:] = _floats(part, layout)
        else:
            place[:] = pack_codes(*quantise(part, layout), layout)
    return out


def _floats(part: Floats, layout: str) -> Bytes:
    padded = np.zeros((-(-len(part) // LANES) * LANES, part.shape[1]), dtype=FLOATS[layout])
    with np.errstate(over="ignore"):
        padded[: len(part)] = part
    if not np.isfinite(padded).all():
        raise ConfigError(f"a weight of {np.abs(part).max():.3g} does not fit float16; store 32 or 8 bits")
    stored = padded.reshape(-1, LANES, part.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)


def quantise(weight: Floats, layout: str) -> tuple[Bytes, npt.NDArray[np.float16], Bytes | None]:
    """Codes uint8 [N, K], scales float16 [N, G] and zero points uint8 [N, G] (None where the layout fixes them).

    q8: scale = max|w| / 127. q4: the weight of largest magnitude becomes the code 0, scale = -it / 8, so that all 16
    codes are used; the scale's sign follows. s1: scale = mean|w|.
    Others: scale = (max - min) / top with min <= 0 <= max.
    """
    n, k = weight.shape
    groups = -(-k // GROUP)
    padded = np.zeros((n, groups * GROUP), dtype=np.float32)
    padded[:, :k] = weight
    group = padded.reshape(n, groups, GROUP)
    top = (1 << BITS[layout]) - 1
    zero: Bytes | None = None
    if layout == "s1":
        counts = np.minimum(k - GROUP * np.arange(groups), GROUP).astype(np.float32)
        wide = np.abs(group).sum(-1) / counts
    elif layout == "q8":
        wide = np.abs(group).max(-1) / np.float32(127)
    elif layout == "q4":
        largest = np.take_along_axis(group, np.abs(group).argmax(-1)[..., None], -1)[..., 0]
        wide = largest / np.float32(-8)
    else:
        wide = (np.maximum(group.max(-1), 0) - np.minimum(group.min(-1), 0)) / np.float32(top)
    if np.abs(wide).max(initial=0) > np.finfo(np.float16).max:
        raise ConfigError(f"weights of {np.abs(group).max():.3g} need a scale that float16 cannot hold; store 32 bits")
    scale = wide.astype(np.float16)
    if layout == "s1":
        return (weight >= 0).astype(np.uint8), scale, None
    step = scale.astype(np.float32)[..., None]
    safe = np.where(step == 0, np.float32(1), step)
    if layout in ZERO:
        offset: Any = np.float32(ZERO[layout])
    else:
        low = np.minimum(group.min(-1), 0)
        offset = np.rint(-low[..., None] / safe).clip(0, top)
        zero = offset[..., 0].astype(np.uint8)
    steps = np.where(step == 0, np.float32(0), np.rint(group / safe))
    codes = (steps + offset).clip(0, top).astype(np.uint8)
    return codes.reshape(n, -1)[:, :k], scale, zero


def pack_codes(codes: npt.ArrayLike, scale: npt.ArrayLike, zero: npt.ArrayLike | None, layout: str) -> Bytes:
    """Codes of a matrix as its bytes.

    Args:
        codes: uint8 [N, K]. scale: [N, G], exact in float16. zero: uint8 [N, G], for layouts that store zero points.

    Raises:
        ConfigError: codes or scales that the layout cannot hold, shapes that do not fit one another.
    """
    codes = np.asarray(codes, dtype=np.uint8)
    n, k = codes.shape
    rows, groups = -(-n // LANES), -(-k // GROUP)
    kept = np.zeros((rows * LANES, groups), dtype=np.float16)
    zeros = np.full((rows * LANES, groups), ZERO.get(layout, 0), dtype=np.uint8)
    if layout not in BITS or (zero is None) != (layout in FIXED):
        raise ConfigError(f"layout {layout!r} of codes {'without' if zero is None else 'with'} zero points")
    if np.shape(scale) != (n, groups) or (zero is not None and np.shape(zero) != (n, groups)):
        raise ConfigError(f"codes [{n}, {k}] need scales [{n}, {groups}]; got {list(np.shape(scale))}")
    if codes.max(initial=0) >> BITS[layout]:
        raise ConfigError(f"a code of {codes.max()} does not fit {layout}")
    kept[:n] = scale
    if zero is not None:
        zeros[:n] = zero
    padded = np.repeat(zeros, GROUP, axis=1)
    padded[:n, :k] = codes
    placed = padded.reshape(rows, LANES, groups, LANES, 4).transpose(0, 2, 3, 1, 4).reshape(rows, groups, PLACES)
    parts = [_plane(placed, width, shift) for width, shift in _PLANES[layout]]
    parts.append(_by_block(kept, rows).view(np.uint8))
    if zero is not None:
        parts.append(_by_block(zeros, rows))
    return np.concatenate(parts, axis=-1).reshape(-1)


def _by_block(values: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """[N, G] -> [row blocks, G, 16]."""
    return np.ascontiguousarray(values.reshape(rows, LANES, -1).transpose(0, 2, 1))


def _plane(placed: Bytes, width: int, shift: int) -> Bytes:
    """[..., 1024] codes -> [..., S] bytes of one plane."""
    if width == 8:
        return placed
    bits = (placed >> shift) & ((1 << width) - 1)
    parts = bits.reshape(*bits.shape[:-1], 8 // width, PLACES * width // 8)
    out = np.zeros_like(parts[..., 0, :])
    for index in range(8 // width):
        out |= parts[..., index, :] << np.uint8(index * width)
    return out


def codes_of(data: Bytes, layout: str, n: int, k: int) -> tuple[Bytes, npt.NDArray[np.float16], Bytes]:
    """The inverse of ``pack_codes``: codes uint8 [N, K], scales float16 [N, G], zero points uint8 [N, G]."""
    rows, groups = -(-n // LANES), -(-k // GROUP)
    block = np.asarray(data)[: matrix_bytes(layout, n, k)].reshape(rows, groups, block_bytes(layout))
    placed = np.zeros((rows, groups, PLACES), dtype=np.uint8)
    start = 0
    for width, shift in _PLANES[layout]:
        plane = block[..., start : start + PLACES * width // 8]
        start += PLACES * width // 8
        parts = [(plane >> np.uint8(at)) & np.uint8((1 << width) - 1) for at in range(0, 8, width)]
        placed |= np.concatenate(parts, axis=-1) << np.uint8(shift)
    codes = placed.reshape(rows, groups, LANES, LANES, 4).transpose(0, 3, 1, 2, 4)
    scale = np.ascontiguousarray(block[..., start : start + 2 * LANES]).view(np.float16)
    if layout in FIXED:
        zero = np.full((rows, groups, LANES), ZERO.get(layout, 0), dtype=np.uint8)
    else:
        zero = block[..., start + 2 * LANES :]
    flat = codes.reshape(rows * LANES, groups * GROUP)[:n, :k]
    return flat, _by_row(scale)[:n], _by_row(zero)[:n]


def _by_row(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[row blocks, G, 16] -> [N, G]."""
    return values.transpose(0, 2, 1).reshape(-1, values.shape[1])


def unpack(data: Bytes, layout: str, n: int, k: int) -> Floats:
    """The weights float32 [N, K] that the bytes of a matrix stand for."""
    size = matrix_bytes(layout, n, k)
    if len(data) < size:
        raise ConfigError(f"{layout} [{n}, {k}] takes {size} bytes; {len(data)} are there")
    if layout in FLOATS:
        stored = np.asarray(data)[:size].view(FLOATS[layout]).reshape(-1, k, LANES).transpose(0, 2, 1)
        return stored.reshape(-1, k)[:n].astype(np.float32)
    codes, scale, zero = codes_of(data, layout, n, k)
    if layout == "s1":
        return (2 * codes.astype(np.float32) - 1) * np.repeat(scale.astype(np.float32), GROUP, axis=1)[:, :k]
    steps = codes.astype(np.float32) - np.repeat(zero, GROUP, axis=1)[:, :k].astype(np.float32)
    return steps * np.repeat(scale.astype(np.float32), GROUP, axis=1)[:, :k]
