"""Packed matrices as wholes: round to nearest, dequantise, multiply."""

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.core.errors import ConfigError
from moestro.ops.counters import count
from moestro.ops.formats._base import Format, Packing, Params, Parts, check_packing, format_named
from moestro.ops.route import compute_dtype


TILE = 256
"""Rows of a matrix that are dequantised at a time: a panel that stays in the second-level cache."""


def nearest(weight: Tensor, used: Packing, form: Format | None = None) -> tuple[Tensor, Params]:
    """Round to the nearest codes, group by group.

    Args:
        weight: float [..., out, in]. form: instead of the registered format of the packing's name, one with other
            settings.

    Returns:
        Codes uint8 [..., out, in] and params [..., out, groups].

    Raises:
        ConfigError: weights that are no floats, a group wider than a row, a scale that its type cannot hold.
    """
    if not weight.is_floating_point():
        raise ConfigError(f"weights of type {weight.dtype} are no floats; quantise the float checkpoint")
    form = form or format_named(used.format)
    used = check_packing(used, weight.shape[-1])
    weight = weight.float()
    step = used.group or weight.shape[-1]
    codes, shared = [], []
    for part in torch.split(weight, step, -1):
        params = form.fit(part, used)
        codes.append(form.round(part, params))
        shared.append(params)
    return torch.cat(codes, -1), {name: torch.cat([p[name] for p in shared], -1) for name in shared[0]}


def quantise(weight: Tensor, used: Packing, form: Format | None = None) -> tuple[Parts, Packing]:
    """``nearest``, packed: float [E, out, in] as stored tensors [E, ...]."""
    codes, params = nearest(weight, used, form)
    return format_named(used.format).pack(codes, params, check_packing(used, weight.shape[-1]))


def dequantise(parts: Parts, shape: tuple[int, int], used: Packing) -> Tensor:
    """Float32 [..., out, in] of stored tensors."""
    return format_named(used.format).dequantise(parts, shape, used)


def packed_nbytes(shape: tuple[int, int], used: Packing) -> int:
    """Stored bytes of one matrix [out, in], scales and zero points included."""
    return format_named(used.format).nbytes(shape, used)


def packed_linear(rows_NI: Tensor, parts: Parts, shape: tuple[int, int], used: Packing) -> Tensor:
    """rows W^T [N, out] for a packed matrix W [out, in], in the rows' type; differentiable in the rows.

    ``TILE`` rows of W are floats at a time. Half precisions are multiplied in float32 on a CPU.
    """
    count("packed_linear")
    form = format_named(used.format)
    kind = compute_dtype(rows_NI.dtype) if rows_NI.device.type == "cpu" else rows_NI.dtype
    wide = rows_NI.to(kind)
    tiles = []
    for start in range(0, shape[0], TILE):
        stop = min(start + TILE, shape[0])
        tile = form.dequantise(form.rows(parts, start, stop), (stop - start, shape[1]), used)
        tiles.append(F.linear(wide, tile.to(kind)))
    return torch.cat(tiles, -1).to(rows_NI.dtype)
