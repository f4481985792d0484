"""Integers: ``int8`` to ``int2`` around zero, ``uint8`` to ``uint2`` with a zero point for each group."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from moestro.ops.formats._base import Format, Packing, Params, Parts, stored
from moestro.ops.formats._bits import pack_rows, row_bytes, unpack_rows


WIDTHS: Final = (8, 4, 3, 2)

RULES: Final[Mapping[str, str]] = {
    "symmetric": "max |w| / (2^(b-1) - 1), nothing is clipped",
    "ft": "max |w| / 2^(b-1), the largest positive weight is clipped by one step",
    "kim": "2 max |w| / (2^b - 1)",
}
"""Ways to choose the scale of a group of signed integers of b bits."""


def signed_scale(largest: Tensor, bits: int, rule: str = "symmetric") -> Tensor:
    """Scale of groups whose largest |w| is ``largest``; 1 where it is 0."""
    half = 1 << (bits - 1)
    steps = {"symmetric": float(half - 1), "ft": float(half), "kim": half - 0.5}[rule]
    return torch.where(largest > 0, largest / steps, 1.0)


class Signed(Format):
    """w = s (q - 2^(b-1)) with codes q of b bits and one scale s for each group of a row.

    Parts: ``codes`` uint8 [out, ceil(in b / 8)], ``scale`` [out, groups].
    """

    def __init__(self, bits: int, rule: str = "symmetric") -> None:
        self.name = f"int{bits}"
        self.bits = self._bits = bits
        self.rule = rule

    def fit(self, weight: Tensor, packing: Packing) -> Params:
        """See Format: the largest |w| of the group by ``rule``."""
        scale = signed_scale(weight.abs().amax(-1, keepdim=True), self._bits, self.rule)
        return {"scale": stored(scale, packing)}

    def round(self, weight: Tensor, params: Params) -> Tensor:
        """See Format."""
        half = 1 << (self._bits - 1)
        return (weight / params["scale"]).round().clamp(-half, half - 1).add(half).to(torch.uint8)

    def values(self, codes: Tensor, params: Params) -> Tensor:
        """See Format."""
        return (codes.float() - (1 << (self._bits - 1))) * params["scale"]

    def parts(self, shape: tuple[int, int], packing: Packing) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Format."""
        out, width = shape
        return {
            "codes": ((out, row_bytes(width, self._bits)), torch.uint8),
            "scale": ((out, packing.groups(width)), packing.scale_type),
        }

    def pack(self, codes: Tensor, params: Params, packing: Packing) -> tuple[Parts, Packing]:
        """See Format."""
        parts = {"codes": pack_rows(codes, self._bits), "scale": params["scale"].to(packing.scale_type)}
        return parts, packing

    def unpack(self, parts: Parts, shape: tuple[int, int], packing: Packing) -> tuple[Tensor, Params]:
        """See Format."""
        return unpack_rows(parts["codes"], self._bits, shape[1]), {"scale": parts["scale"].float()}


class Unsigned(Format):
    """w = s (q - z) with codes q of b bits, and for each group a scale s and a zero point z, a code itself.

    s = (max - min) / (2^b - 1) with min <= 0 <= max, z = round(-min / s).

    Parts: ``codes`` as in Signed, ``scale`` [out, groups], ``zero`` uint8 [out, ceil(groups b / 8)], packed like codes.
    """

    def __init__(self, bits: int) -> None:
        self.name = f"uint{bits}"
        self.bits = self._bits = bits

    def fit(self, weight: Tensor, packing: Packing) -> Params:
        """See Format."""
        top = (1 << self._bits) - 1
        low = weight.amin(-1, keepdim=True).clamp(max=0)
        high = weight.amax(-1, keepdim=True).clamp(min=0)
        scale = stored(torch.where(high > low, (high - low) / top, 1.0), packing)
        return {"scale": scale, "zero": (-low / scale).round().clamp(0, top)}

    def round(self, weight: Tensor, params: Params) -> Tensor:
        """See Format."""
        top = (1 << self._bits) - 1
        return ((weight / params["scale"]).round() + params["zero"]).clamp(0, top).to(torch.uint8)

    def values(self, codes: Tensor, params: Params) -> Tensor:
        """See Format."""
        return (codes.float() - params["zero"]) * params["scale"]

    def parts(self, shape: tuple[int, int], packing: Packing) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Format."""
        out, width = shape
        groups = packing.groups(width)
        return {
            "codes": ((out, row_bytes(width, self._bits)), torch.uint8),
            "scale": ((out, groups), packing.scale_type),
            "zero": ((out, row_bytes(groups, self._bits)), torch.uint8),
        }

    def pack(self, codes: Tensor, params: Params, packing: Packing) -> tuple[Parts, Packing]:
        """See Format."""
        parts = {
            "codes": pack_rows(codes, self._bits),
            "scale": params["scale"].to(packing.scale_type),
            "zero": pack_rows(params["zero"].to(torch.uint8), self._bits),
        }
        return parts, packing

    def unpack(self, parts: Parts, shape: tuple[int, int], packing: Packing) -> tuple[Tensor, Params]:
        """See Format."""
        zero = unpack_rows(parts["zero"], self._bits, packing.groups(shape[1])).float()
        params = {"scale": parts["scale"].float(), "zero": zero}
        return unpack_rows(parts["codes"], self._bits, shape[1]), params


FORMATS: tuple[Format, ...] = (*(Signed(bits) for bits in WIDTHS), *(Unsigned(bits) for bits in WIDTHS))
