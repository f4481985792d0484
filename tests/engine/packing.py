"""Matrices in the engine's layouts, packed by plain numpy from their description."""

import numpy as np


CODES = {"q8": (128, 8), "q4": (8, 4), "q3": (None, 3), "q2": (None, 2), "q1": (None, 1), "s1": (0, 1)}  # offset, bits


def aligned(nbytes: int) -> np.ndarray:
    """Zeroed uint8 storage that starts at a multiple of 64."""
    raw = np.zeros(nbytes + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def planes(codes: np.ndarray, size: int, width: int, shift: int) -> np.ndarray:
    """Bytes of one plane out of [..., 1024] codes: byte i holds `width` bits of bytes i, i + size, ..."""
    parts = ((codes >> shift) & ((1 << width) - 1)).reshape(*codes.shape[:-1], 1024 // size, size).astype(np.uint16)
    out = np.zeros((*parts.shape[:-2], size), dtype=np.uint16)
    for index in range(parts.shape[-2]):
        out |= parts[..., index, :] << (index * width)
    return out.astype(np.uint8)


def pack_bits(codes: np.ndarray, layout: str) -> np.ndarray:
    """[..., 1024] codes of blocks -> bytes."""
    if layout == "q8":
        return codes.astype(np.uint8)
    if layout == "q4":
        return planes(codes, 512, 4, 0)
    if layout in ("q1", "s1"):
        return planes(codes, 128, 1, 0)
    low = planes(codes, 256, 2, 0)
    return low if layout == "q2" else np.concatenate([low, planes(codes, 128, 1, 2)], axis=-1)


def pack(weight: np.ndarray, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """[N, K] float32 -> (bytes, the weights they stand for as float32 [N, K])."""
    n, k = weight.shape
    rows = -(-n // 16)
    if layout in ("f32", "f16"):
        dtype = np.float32 if layout == "f32" else np.float16
        padded = np.zeros((rows * 16, k), dtype=dtype)
        padded[:n] = weight
        flat = np.ascontiguousarray(padded.reshape(rows, 16, k).transpose(0, 2, 1)).view(np.uint8).reshape(-1)
        data = aligned(flat.size)
        data[:] = flat
        return data, padded[:n].astype(np.float32)
    groups = -(-k // 64)
    offset, bits = CODES[layout]
    padded = np.zeros((rows * 16, groups * 64), dtype=np.float32)
    padded[:n, :k] = weight
    block = padded.reshape(rows, 16, groups, 64).transpose(0, 2, 1, 3)  # [row block, group, 16, 64]
    top = (1 << bits) - 1
    if layout == "s1":
        scale, zero = np.abs(block).mean(-1).astype(np.float16), np.full(block.shape[:-1], 0.5)
    elif offset is not None:
        scale = (np.abs(block).max(-1) / (offset - 1)).astype(np.float16)
        zero = np.full(scale.shape, offset)
    else:
        low, high = np.minimum(block.min(-1), 0), np.maximum(block.max(-1), 0)
        scale = ((high - low) / top).astype(np.float16)
        zero = np.where(scale > 0, np.round(-low / np.maximum(scale.astype(np.float32), 1e-9)), 0).clip(0, top)
    wide = scale.astype(np.float32)[..., None]
    codes = np.where(wide > 0, np.round(block / np.where(wide > 0, wide, 1)), 0) + zero[..., None]
    codes = (block >= 0 if layout == "s1" else codes.clip(0, top)).astype(np.uint8)
    stored = codes.reshape(rows, groups, 16, 16, 4).transpose(0, 1, 3, 2, 4).reshape(rows, groups, 1024)
    parts = [pack_bits(stored, layout), np.ascontiguousarray(scale).view(np.uint8).reshape(rows, groups, 32)]
    if offset is None:
        parts.append(zero.astype(np.uint8))
    flat = np.ascontiguousarray(np.concatenate(parts, axis=-1)).reshape(-1)
    data = aligned(flat.size)
    data[:] = flat
    back = wide * (codes.astype(np.float32) - zero[..., None]) * (2 if layout == "s1" else 1)
    return data, back.transpose(0, 2, 1, 3).reshape(rows * 16, groups * 64)[:n, :k]
