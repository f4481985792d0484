"""Small codes as bytes: each row is a stream of bits, low bits first, and starts at a byte of its own."""

import torch
from torch import Tensor


BLOCKS = {1: (8, 1), 2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}
"""Bits of a code -> (codes, bytes) of the shortest run that ends at a byte."""


def row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of ``count`` codes."""
    return -(-count * bits // 8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] in 0 .. 2^bits - 1 as uint8 [..., ceil(n bits / 8)].

    Code i of a row takes the bits i * bits to (i + 1) * bits - 1 of the row; bit b of a row is bit b % 8 of its byte
    b // 8. What is left of the last byte is 0.
    """
    per, size = BLOCKS[bits]
    count = codes.shape[-1]
    short = -count % per
    padded = torch.nn.functional.pad(codes, (0, short)) if short else codes
    blocks = padded.reshape(*codes.shape[:-1], -1, per)
    word = blocks[..., 0].to(torch.int32)
    for place in range(1, per):
        word = word | (blocks[..., place].to(torch.int32) << (bits * place))
    packed = torch.stack([(word >> (8 * byte)) & 255 for byte in range(size)], -1).to(torch.uint8)
    return packed.flatten(-2)[..., : row_bytes(count, bits)].contiguous()


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of ``pack_rows``: uint8 codes [..., count]."""
    if bits == 8:
        return packed
    per, size = BLOCKS[bits]
    if size > 1:
        short = -packed.shape[-1] % size
        packed = torch.nn.functional.pad(packed, (0, short)) if short else packed
        runs = packed.reshape(*packed.shape[:-1], -1, size).to(torch.int32)
        word = runs[..., 0]
        for byte in range(1, size):
            word = word | (runs[..., byte] << (8 * byte))
    else:
        word = packed
    mask = (1 << bits) - 1
    codes = torch.stack([(word >> (bits * place)) & mask for place in range(per)], -1).to(torch.uint8)
    return codes.flatten(-2)[..., :count]
