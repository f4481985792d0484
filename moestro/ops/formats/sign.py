"""One bit: ``sign1``, w = s or -s with the mean |w| of a group as s, which is the s that comes nearest to the group.

Source: XNOR-Net (1603.05279, section 3.1): s = |w|_1 / n minimises ||w - s sign(w)||.
"""

import torch
from torch import Tensor

from moestro.ops.formats._base import Format, Packing, Params, Parts, stored
from moestro.ops.formats._bits import pack_rows, row_bytes, unpack_rows


class Sign(Format):
    """Codes 1 for w >= 0 and 0 else. Parts: ``codes`` uint8 [out, ceil(in / 8)], ``scale`` [out, groups].

    A group of zeros has scale 0: it is stored exactly.
    """

    name = "sign1"
    bits = 1

    def fit(self, weight: Tensor, packing: Packing) -> Params:
        """See Format."""
        mean = weight.abs().mean(-1, keepdim=True)
        return {"scale": torch.where(mean > 0, stored(torch.where(mean > 0, mean, 1.0), packing), 0.0)}

    def round(self, weight: Tensor, params: Params) -> Tensor:
        """See Format."""
        return (weight >= 0).to(torch.uint8)

    def values(self, codes: Tensor, params: Params) -> Tensor:
        """See Format."""
        return (codes.float() * 2 - 1) * params["scale"]

    def parts(self, shape: tuple[int, int], packing: Packing) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Format."""
        out, width = shape
        return {
            "codes": ((out, row_bytes(width, 1)), torch.uint8),
            "scale": ((out, packing.groups(width)), packing.scale_type),
        }

    def pack(self, codes: Tensor, params: Params, packing: Packing) -> tuple[Parts, Packing]:
        """See Format."""
        return {"codes": pack_rows(codes, 1), "scale": params["scale"].to(packing.scale_type)}, packing

    def unpack(self, parts: Parts, shape: tuple[int, int], packing: Packing) -> tuple[Tensor, Params]:
        """See Format."""
        return unpack_rows(parts["codes"], 1, shape[1]), {"scale": parts["scale"].float()}


FORMATS: tuple[Format, ...] = (Sign(),)
