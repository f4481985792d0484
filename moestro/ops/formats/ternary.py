"""Three values a row: ``trits`` with five symbols a byte, ``ternary`` and ``ternary14`` in words of variable meaning.

A row (or a group of it) has the values {low, 0, high} with low = min(0, min w) and high = max(0, max w); a weight
beyond half of one of them becomes it, all others become 0. Most do, so the symbols 0 (zero), 1 (low), 2 (high) have
less than one bit of entropy. ``ternary`` and ``ternary14`` store them in words of 16 bits, see ``_codebook``: each row
is coded by itself, and its number of words is stored, so that any rows can be decoded alone.

A packing may say how many zeros in a thousand its codebook expects (``zeros=885``, which is also what is meant without
it); ``zeros=0`` asks the coder to count them. ``words`` is what the coder found to be the length.

Source: QMoE (2310.16795, section 3.2 for the grid, section 4 for the code), whose dictionary ``ternary14`` has.
"""

import math
from typing import Final

import torch
from torch import Tensor

from moestro.core.errors import ConfigError
from moestro.ops.formats._base import Format, Packing, Params, Parts, spread_groups, stored
from moestro.ops.formats._codebook import Codebook, Kind, codebook, decode, encode


ZEROS: Final = 885
"""Zeros in a thousand symbols that a codebook expects unless told otherwise."""

FEWEST, MOST, STEP = 340, 990, 10
"""Counted zeros are moved to the nearest multiple of STEP in this range: few different codebooks are built."""

TRITS = 5
_POWERS = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)


class _Ternary(Format):
    """The grid. Params ``low`` <= 0 and ``high`` >= 0."""

    bits = math.log2(3)

    def fit(self, weight: Tensor, packing: Packing) -> Params:
        """See Format."""
        found = {"low": -weight.amin(-1, keepdim=True), "high": weight.amax(-1, keepdim=True)}
        kept = {name: torch.where(v > 0, stored(torch.where(v > 0, v, 1.0), packing), 0.0) for name, v in found.items()}
        return {"low": -kept["low"], "high": kept["high"]}

    def round(self, weight: Tensor, params: Params) -> Tensor:
        """See Format. Where there is no negative (positive) value no symbol is spent on one."""
        low, high = params["low"], params["high"]
        is_low, is_high = (weight < low / 2) & (low < 0), (weight > high / 2) & (high > 0)
        return is_low.to(torch.uint8) + is_high.to(torch.uint8) * 2

    def values(self, codes: Tensor, params: Params) -> Tensor:
        """See Format."""
        zero = params["low"].new_zeros(())
        return torch.where(codes == 1, params["low"], torch.where(codes == 2, params["high"], zero))

    def _values(self, shape: tuple[int, int], packing: Packing) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        size = (shape[0], packing.groups(shape[1]))
        return {"low": (size, packing.scale_type), "high": (size, packing.scale_type)}

    def _params(self, parts: Parts) -> Params:
        return {"low": parts["low"].float(), "high": parts["high"].float()}


class Trits(_Ternary):
    """Byte i of a row holds symbols 5 i to 5 i + 4, the first as the lowest digit of a number of base 3.

    Parts: ``codes`` uint8 [out, ceil(in / 5)], ``low`` and ``high`` [out, groups].
    """

    name = "trits"

    def parts(self, shape: tuple[int, int], packing: Packing) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Format."""
        return {"codes": ((shape[0], -(-shape[1] // TRITS)), torch.uint8), **self._values(shape, packing)}

    def pack(self, codes: Tensor, params: Params, packing: Packing) -> tuple[Parts, Packing]:
        """See Format."""
        padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % TRITS))
        blocks = padded.reshape(*codes.shape[:-1], -1, TRITS) * _POWERS.to(codes.device)
        values = {name: params[name].to(packing.scale_type) for name in ("low", "high")}
        return {"codes": blocks.sum(-1, dtype=torch.uint8), **values}, packing

    def unpack(self, parts: Parts, shape: tuple[int, int], packing: Packing) -> tuple[Tensor, Params]:
        """See Format."""
        digits = parts["codes"].unsqueeze(-1) // _POWERS.to(parts["codes"].device) % 3
        return digits.flatten(-2)[..., : shape[1]], self._params(parts)


class Coded(_Ternary):
    """Symbols in words for strings of them.

    Parts of a matrix: ``codes`` uint16 [words], the words of all rows one after the other; ``counts`` uint16 [out], the
    words of each row; ``low`` and ``high`` [out, groups]. Of matrices stacked with fewer words than the longest the
    last words mean nothing and are 0.
    """

    ragged = True

    def __init__(self, name: str, kind: Kind) -> None:
        self.name, self.kind = name, kind

    def book(self, packing: Packing) -> Codebook:
        """The codebook of a packing."""
        return codebook(self.kind, dict(packing.sizes).get("zeros") or ZEROS)

    def parts(self, shape: tuple[int, int], packing: Packing) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Format. Before a matrix is packed: room for words of two symbols, the shortest there are."""
        words = dict(packing.sizes).get("words", shape[0] * -(-shape[1] // 2))
        own = {"codes": ((words,), torch.uint16), "counts": ((shape[0],), torch.uint16)}
        return {**own, **self._values(shape, packing)}

    def pack(self, codes: Tensor, params: Params, packing: Packing) -> tuple[Parts, Packing]:
        """See Format."""
        zeros = dict(packing.sizes).get("zeros", ZEROS)
        if not zeros:
            share = 1000 * float((codes == 0).float().mean())
            zeros = min(max(STEP * round(share / STEP), FEWEST), MOST)
        if codes.shape[-1] >= 1 << 17:
            raise ConfigError(f"rows of {codes.shape[-1]} inputs are too wide for {self.name}; at most {(1 << 17) - 1}")
        book = codebook(self.kind, zeros)
        found = [encode(one.cpu(), book) for one in codes]
        words = max(len(word) for word, _ in found)
        stack = torch.zeros(len(found), words, dtype=torch.int32)
        for place, (word, _) in enumerate(found):
            stack[place, : len(word)] = word.to(torch.int32)
        parts = {
            "codes": stack.to(torch.uint16).to(codes.device),
            "counts": torch.stack([count for _, count in found]).to(torch.uint16).to(codes.device),
            "low": params["low"].to(packing.scale_type),
            "high": params["high"].to(packing.scale_type),
        }
        return parts, Packing(packing.format, packing.group, packing.scale, (("zeros", zeros), ("words", words)))

    def unpack(self, parts: Parts, shape: tuple[int, int], packing: Packing) -> tuple[Tensor, Params]:
        """See Format."""
        if parts["codes"].ndim > 1:
            each = [
                self.unpack({k: v[i] for k, v in parts.items()}, shape, packing) for i in range(len(parts["codes"]))
            ]
            return torch.stack([codes for codes, _ in each]), self._params(parts)
        place_N, high_N = decode(parts["codes"], parts["counts"], shape[1], self.book(packing))
        codes = torch.zeros(shape, dtype=torch.uint8, device=parts["codes"].device)
        codes.view(-1)[place_N] = high_N.to(torch.uint8) + 1
        return codes, self._params(parts)

    def dequantise(self, parts: Parts, shape: tuple[int, int], packing: Packing) -> Tensor:
        """See Format. Writes what is not zero, without symbols in between."""
        if parts["codes"].ndim > 1:
            return super().dequantise(parts, shape, packing)
        place_N, high_N = decode(parts["codes"], parts["counts"], shape[1], self.book(packing))
        weight = torch.zeros(shape, device=parts["codes"].device)
        params = self._params(parts)
        if packing.groups(shape[1]) == 1:
            owner_N = torch.div(place_N, shape[1], rounding_mode="floor")
            low, high = params["low"].view(-1)[owner_N], params["high"].view(-1)[owner_N]
        else:
            low, high = (spread_groups(params[k], packing, shape[1]).reshape(-1)[place_N] for k in ("low", "high"))
        weight.view(-1)[place_N] = torch.where(high_N, high, low)
        return weight

    def rows(self, parts: Parts, start: int, stop: int) -> Parts:
        """See Format."""
        count_R = parts["counts"].long()
        first = int(count_R[:start].sum())
        some = {name: part[start:stop] for name, part in parts.items() if name != "codes"}
        return {"codes": parts["codes"][first : first + int(count_R[start:stop].sum())], **some}


FORMATS: tuple[Format, ...] = (Trits(), Coded("ternary", "tree"), Coded("ternary14", "pairs"))
