"""Reversible weight operations: how one tensor of a model is cut into the tensors of a checkpoint, and
joined again.

Each operation has two directions. ``split`` cuts a whole into parts; ``join`` puts the parts together again
and returns the same bits. Where operations cut by *views*, a chain of them joins by filling: the whole is
allocated once, cut into views, and every part is copied into its view. Nothing is stacked and then
concatenated, so loading one fused tensor costs its own size and one part, whatever the chain. Shapes of
parts come from running the same ``split`` on a tensor without storage, so headers are checked with the very
code that moves the data.

A chain of operations is a tuple, applied left to right when splitting: ``(Concat(2, dim=1), Stack())`` cuts
a ``gate_up_proj [E, 2I, D]`` into ``gate [E, I, D]`` and ``up [E, I, D]``, and each of them into E matrices
``[I, D]``. This module imports torch inside functions only: tables of families must be readable without it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from moestro.core.errors import LoadError


if TYPE_CHECKING:
    from torch import Tensor, dtype


def _equal_part(tensor: "Tensor", dim: int, count: int) -> int:
    """Length of one of ``count`` equal parts along ``dim``; a LoadError where they would not be equal."""
    length, rest = divmod(tensor.shape[dim], count)
    if rest:
        raise LoadError(
            f"a tensor of shape {list(tensor.shape)} cannot be cut into {count} equal parts along dimension {dim}"
        )
    return length


class WeightOp(Protocol):
    """One reversible operation. ``views`` says that the parts share the whole's storage."""

    views: ClassVar[bool]

    def split(self, whole: "Tensor") -> "list[Tensor]":
        """Cut ``whole`` into its parts."""

    def join(self, parts: "Sequence[Tensor]") -> "Tensor":
        """The inverse of ``split``: ``join(split(x))`` has the bits of ``x``."""


@dataclass(frozen=True)
class Stack:
    """A module list on disk, one tensor in memory: ``[n, *shape]`` is n tensors of ``shape``."""

    dim: int = 0
    views: ClassVar[bool] = True

    def split(self, whole: "Tensor") -> "list[Tensor]":
        return list(whole.unbind(self.dim))

    def join(self, parts: "Sequence[Tensor]") -> "Tensor":
        import torch

        return torch.stack(list(parts), self.dim)


@dataclass(frozen=True)
class Concat:
    """``count`` parts of equal length laid end to end along ``dim``."""

    count: int
    dim: int = 0
    views: ClassVar[bool] = True

    def split(self, whole: "Tensor") -> "list[Tensor]":
        _equal_part(whole, self.dim, self.count)
        return list(whole.chunk(self.count, self.dim))

    def join(self, parts: "Sequence[Tensor]") -> "Tensor":
        import torch

        return torch.cat(list(parts), self.dim)


@dataclass(frozen=True)
class Transpose:
    """The last two dimensions exchanged: ``x W`` on disk, ``W x`` in memory."""

    views: ClassVar[bool] = True

    def split(self, whole: "Tensor") -> "list[Tensor]":
        return [whole.transpose(-1, -2)]

    def join(self, parts: "Sequence[Tensor]") -> "Tensor":
        (part,) = parts
        return part.transpose(-1, -2).contiguous()


@dataclass(frozen=True)
class Interleave:
    """Halves in memory ``[a; b]``, alternating on disk ``a0 b0 a1 b1 ...`` along ``dim`` (gpt-oss's gate and
    up).
    """

    dim: int = 1
    count: int = 2
    views: ClassVar[bool] = False

    def split(self, whole: "Tensor") -> "list[Tensor]":
        dim = self.dim % whole.dim()
        lengths = (self.count, _equal_part(whole, dim, self.count))
        halves: Tensor = whole.reshape(*whole.shape[:dim], *lengths, *whole.shape[dim + 1 :])
        return [halves.transpose(dim, dim + 1).flatten(dim, dim + 1)]

    def join(self, parts: "Sequence[Tensor]") -> "Tensor":
        (part,) = parts
        dim = self.dim % part.dim()
        lengths = (_equal_part(part, dim, self.count), self.count)
        pairs: Tensor = part.reshape(*part.shape[:dim], *lengths, *part.shape[dim + 1 :])
        return pairs.transpose(dim, dim + 1).flatten(dim, dim + 1).contiguous()


@dataclass(frozen=True)
class Permute:
    """Entries along ``dim`` in another order: ``part[i] = whole[order[i]]``."""

    order: tuple[int, ...]
    dim: int = 0
    views: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise LoadError(f"{list(self.order)[:8]} is not a permutation of 0..{len(self.order) - 1}")

    def split(self, whole: "Tensor") -> "list[Tensor]":
        return [self._pick(whole, self.order)]

    def join(self, parts: "Sequence[Tensor]") -> "Tensor":
        (part,) = parts
        inverse = [0] * len(self.order)
        for new, old in enumerate(self.order):
            inverse[old] = new
        return self._pick(part, inverse)

    def _pick(self, tensor: "Tensor", order: Sequence[int]) -> "Tensor":
        import torch

        if tensor.shape[self.dim] != len(order):
            raise LoadError(
                f"a permutation of {len(order)} entries does not fit dimension {self.dim} of {list(tensor.shape)}"
            )
        return tensor.index_select(self.dim, torch.tensor(order, device=tensor.device))


Chain = tuple[WeightOp, ...]


def split(whole: "Tensor", chain: Chain) -> "list[Tensor]":
    """Cut ``whole`` by every operation of ``chain`` in turn. Parts may be views: make them contiguous to
    write them.
    """
    parts = [whole]
    for op in chain:
        parts = [piece for part in parts for piece in op.split(part)]
    return parts


def part_shapes(shape: Sequence[int], chain: Chain) -> list[tuple[int, ...]]:
    """Shapes of the parts of a tensor of ``shape``, from the operations themselves; no data is touched."""
    import torch

    return [tuple(part.shape) for part in split(torch.empty(tuple(shape), device="meta"), chain)]


def join(parts: "Iterable[Tensor]", shape: Sequence[int], chain: Chain, dtype: "dtype | None" = None) -> "Tensor":
    """The inverse of ``split``: the tensor of ``shape`` whose parts these are.

    Args: parts: in the order in which ``split`` returns them; taken one by one, so a generator that reads a
            file as it goes keeps one part in memory at a time.
        shape: of the whole.
        chain: the operations.
        dtype: of the whole; None keeps that of the first part.

    Raises:
        LoadError: too few or too many parts, or a part of another shape.
    """
    import torch

    views = next((i for i, op in enumerate(chain) if not op.views), len(chain))
    slots = split(torch.empty(tuple(shape), device="meta"), chain[:views])
    whole: Tensor | None = None
    supply = iter(parts)
    for index in range(len(slots)):
        piece = _join_all(supply, tuple(slots[index].shape), chain[views:])
        if whole is None:
            whole = torch.empty(tuple(shape), dtype=dtype or piece.dtype, device=piece.device)
            slots = split(whole, chain[:views])
        slots[index].copy_(piece)
    if whole is None:
        raise LoadError(f"no parts for a tensor of shape {list(shape)}")
    if next(supply, None) is not None:
        raise LoadError(f"too many parts for a tensor of shape {list(shape)}")
    return whole


def _join_all(supply: "Iterator[Tensor]", shape: tuple[int, ...], chain: Chain) -> "Tensor":
    """Take from ``supply`` what a tensor of ``shape`` needs and join it by copies, innermost operation
    first.
    """
    if chain:
        shapes = part_shapes(shape, chain[:1])
        return chain[0].join([_join_all(supply, piece, chain[1:]) for piece in shapes])
    part = next(supply, None)
    if part is None:
        raise LoadError("too few parts")
    if tuple(part.shape) != shape:
        raise LoadError(f"a part has shape {list(part.shape)}, expected {list(shape)}")
    return part
