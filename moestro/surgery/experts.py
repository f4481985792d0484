"""One expert made of its sources: take inner units, reorder, draw anew, mask, add noise, scale, sum.

An expert is a mapping of names to tensors: ``gate`` and ``up`` [I, D], ``down`` [O, I], and with biases ``gate_bias``
and ``up_bias`` [I], ``down_bias`` [O]. Random draws depend on the plan's seed and on where a tensor goes, never on the
order in which experts are made.
"""

import functools
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from moestro.core.plan import ExpertSource


INNER_AXIS = {"gate": 0, "up": 0, "down": 1, "gate_bias": 0, "up_bias": 0, "down_bias": None}
"""The axis of a tensor that runs over the inner units of its expert."""

Read = Callable[[ExpertSource, str], Tensor]
"""The tensor of that name of the expert a source names, whole and unchanged."""


def generator(seed: int, *where: int | str) -> torch.Generator:
    """A random generator for one purpose: the same for the same seed and place, independent for others."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in where]
    state = np.random.SeedSequence([abs(seed), *words]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def taken_units(source: ExpertSource, inner: int) -> list[int] | None:
    """Inner units of the donor's expert in the order in which they are used; None for all as they are."""
    if source.rows is None and source.permutation is None:
        return None
    rows: Sequence[int] = range(inner) if source.rows is None else source.rows
    order: Sequence[int] = range(len(rows)) if source.permutation is None else source.permutation
    return [rows[place] for place in order]


def redrawn_units(source: ExpertSource, inner: int, draw: torch.Generator) -> Tensor | None:
    """The floor(r * I) inner units that drop-upcycling draws anew, int64, or None when there are none.

    Source: Drop-Upcycling (2502.19261, section 3): one set of units for all matrices of an expert.
    """
    count = int(source.redraw * inner)
    return torch.randperm(inner, generator=draw)[:count] if count else None


def make_tensor(
    sources: Sequence[ExpertSource],
    name: str,
    read: Read,
    seed: int,
    where: tuple[int, int],
    *,
    moments: bool = False,
) -> Tensor:
    """One tensor of a new expert.

    A single source that asks for nothing gives the donor's very tensor: a copy then has its bits. Everything else is
    computed in float32 at least.

    Args:
        sources: of the expert. name: of the tensor. read: where the donors' tensors come from.
        seed: of the plan. where: (layer, expert) that is made.
        moments: ``read`` gives an optimiser's state. It is taken, reordered and averaged like the weights it belongs
            to; that of units drawn anew and of masked or cut weights is zero; noise and scaling leave it alone.
    """
    total: Tensor | None = None
    for index, source in enumerate(sources):
        if moments:
            source = source.model_copy(update={"noise": 0.0, "scale_down": 1.0, "scale_bias": 1.0})
        draws = functools.partial(generator, seed, *where, index)
        part = _altered(source, name, read(source, name), draws, fresh=not moments)
        if len(sources) == 1 and source.weight == 1.0:
            return part
        part = _exact(part) * source.weight
        total = part if total is None else total + part
    assert total is not None
    return total


def _exact(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _altered(
    source: ExpertSource, name: str, tensor: Tensor, draw: Callable[..., torch.Generator], *, fresh: bool = True
) -> Tensor:
    """A donor's tensor with all that its source asks for but ``weight``; ``fresh`` False puts zeros for new draws."""
    axis = INNER_AXIS[name]
    if axis is not None:
        units = taken_units(source, tensor.shape[axis])
        if units is not None:
            tensor = tensor.index_select(axis, torch.tensor(units, device=tensor.device))
        redrawn = redrawn_units(source, tensor.shape[axis], draw("redraw"))
        if redrawn is not None:
            tensor = _redraw(tensor, axis, redrawn.to(tensor.device), draw("redraw", name) if fresh else None)
    matrix = not name.endswith("_bias")
    if source.mask and matrix:
        gone = torch.rand(tensor.shape, generator=draw("mask", name)) < source.mask
        tensor = tensor.masked_fill(gone.to(tensor.device), 0.0)
    if source.cut and name == "down":
        silent = torch.randperm(tensor.shape[1], generator=draw("cut"))[: int(source.cut * tensor.shape[1])]
        tensor = tensor.index_fill(1, silent.to(tensor.device), 0.0)
    if source.noise and matrix:
        exact = _exact(tensor)
        normal = torch.randn(tensor.shape, generator=draw("noise", name), dtype=exact.dtype).to(tensor.device)
        tensor = exact + normal * (source.noise * exact.std(correction=0))
    scale = {"down": source.scale_down, "down_bias": source.scale_bias}.get(name, 1.0)
    return tensor if scale == 1.0 else _exact(tensor) * scale


def _redraw(tensor: Tensor, axis: int, units: Tensor, draw: torch.Generator | None) -> Tensor:
    """``tensor`` with the slices ``units`` along ``axis`` drawn from N(mean, std) of what they replace; or zero."""
    old = _exact(tensor.index_select(axis, units))
    if draw is None:
        new = torch.zeros_like(old)
    else:
        normal = torch.randn(old.shape, generator=draw, dtype=old.dtype).to(old.device)
        new = old.mean() + normal * old.std(correction=0)
    return tensor.index_copy(axis, units, new.to(tensor.dtype))
