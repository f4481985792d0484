"""What an index of a packed model says of its bytes, checked: ranges, matrices, slabs; see ``packed``."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moestro.core.errors import LoadError
from moestro.engine import ternary
from moestro.engine.dialect import VECTOR, Shape
from moestro.engine.layout import LANES, LAYOUTS, Bytes, matrix_bytes, unpack
from moestro.engine.ternary import CODED, Table


INDEX, RESIDENT, EXPERTS = "pack.json", "resident.bin", "experts.bin"
PAGE: Final = 4096
"""Tensors of the resident file, slabs and strides are multiples of this."""

MAX_BYTES: Final = 1 << 50
RAW: Final[Mapping[str, int]] = {"raw:F32": 4, "raw:F16": 2, "raw:BF16": 2, "raw:I64": 8, "raw:I32": 4, "raw:U8": 1,
                                 "raw:BOOL": 1}  # fmt: skip
"""Layouts of tensors as Transformers' modules hold them, row-major, and bytes of an element."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A byte range: of a file, or of a slab. layout: of ``layout.LAYOUTS``, ``vector``, or one of ``RAW``."""

    offset: int
    nbytes: int
    layout: str
    shape: Shape

    def array(self, data: Bytes, words: Table | None = None) -> npt.NDArray[Any]:
        """Its values: float32 of a matrix or vector; uint8 of a raw tensor, whose type numpy may not know.

        ``words`` is the model's table of strings, for matrices of the layout t1.
        """
        if self.layout == CODED:
            assert words is not None
            return ternary.unpack(data[: self.nbytes], *self.shape, words)
        if self.layout in LAYOUTS:
            return unpack(data, self.layout, *self.shape)
        flat = data[: self.nbytes]
        return flat if self.layout in RAW else flat.view(np.float32).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class SlabKind:
    """A form of slab: bytes from one to the next, bytes without the padding, and its parts."""

    stride: int
    nbytes: int
    parts: Mapping[str, Piece]


@dataclass(frozen=True, slots=True)
class LayerSlabs:
    """The experts of a layer: slab of expert e is at ``offset + e * stride`` of the experts' file, where all are alike.

    Attributes:
        nbytes: of a slab without the padding behind it. parts: gate, up, down and biases, offsets inside a slab.
        kinds, kind_of: the forms of slabs that differ, and the number of each expert's; stride, nbytes and parts are
            then those of the largest. starts: offsets of such slabs in the file, and where the last one ends.
    """

    num: int
    offset: int
    stride: int
    nbytes: int
    parts: Mapping[str, Piece]
    kinds: tuple[SlabKind, ...] = ()
    kind_of: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()

    def place(self, expert: int) -> tuple[int, int]:
        """(offset, bytes) of an expert in the experts' file."""
        if self.kinds:
            return self.starts[expert], self.kinds[self.kind_of[expert]].stride
        return self.offset + expert * self.stride, self.stride

    def parts_of(self, expert: int) -> Mapping[str, Piece]:
        """The parts of an expert's slab."""
        return self.kinds[self.kind_of[expert]].parts if self.kinds else self.parts

    @property
    def size(self) -> int:
        """Bytes of all slabs."""
        return self.starts[-1] - self.offset if self.kinds else self.num * self.stride


def object_of(value: Any, where: str) -> dict[str, Any]:
    """The value as an object; LoadError naming the place where it is none."""
    if not isinstance(value, dict):
        raise LoadError(f"{where}: expected an object, found {value!r:.60}")
    return value


def check_keys(value: dict[str, Any], names: set[str], where: str) -> None:
    """Raise LoadError unless an object has exactly these keys."""
    for name in sorted(names - value.keys()):
        raise LoadError(f"{where}: has no {name}")
    for name in sorted(value.keys() - names):
        raise LoadError(f"{where}: has an unknown key {name!r:.60}")


def whole(value: Any, where: str, least: int = 0, of: int = 1) -> int:
    """The value as a whole number from ``least`` to 2^50, a multiple of ``of``; else LoadError."""
    if type(value) is not int or not least <= value <= MAX_BYTES or value % of:
        what = f" and a multiple of {of}" if of > 1 else ""
        raise LoadError(f"{where}: {value!r:.60} is no whole number from {least} to 2^50{what}")
    return value


def piece_of(value: Any, where: str, *, of: int) -> Piece:
    """A byte range whose offset is a multiple of ``of`` bytes and whose bytes are those of its layout and shape.

    Raises:
        LoadError: it is none.
    """
    entry = object_of(value, where)
    check_keys(entry, {"offset", "nbytes", "layout", "shape"}, where)
    shape, layout = entry["shape"], entry["layout"]
    if not isinstance(shape, list) or not 1 <= len(shape) <= 8:
        raise LoadError(f"{where}: shape {shape!r:.60} is no list of 1 to 8 numbers")
    dims = tuple(whole(dim, f"{where}: shape", least=1) for dim in shape)
    offset, nbytes = whole(entry["offset"], f"{where}: offset", of=of), whole(entry["nbytes"], f"{where}: nbytes", 1)
    total = 1
    for dim in dims:
        total *= dim
    if total > MAX_BYTES:
        raise LoadError(f"{where}: {total} values are too many")
    if layout == CODED and len(dims) == 2 and nbytes > 4 * (-(-dims[0] // LANES) + 1):
        needed = nbytes  # as long as its words are
    elif layout in LAYOUTS and len(dims) == 2:
        needed = matrix_bytes(layout, *dims)
    elif layout == VECTOR and len(dims) == 1:
        needed = 4 * total
    elif isinstance(layout, str) and layout in RAW:
        needed = RAW[layout] * total
    else:
        raise LoadError(f"{where}: layout {layout!r:.40} of {len(dims)} axes is not known")
    if nbytes != needed:
        raise LoadError(f"{where}: {layout} {list(dims)} takes {needed} bytes, {INDEX} says {nbytes}")
    return Piece(offset, nbytes, layout, dims)


def check_apart(ranges: Iterable[tuple[int, int, str]], size: int, where: str) -> None:
    """Raise LoadError where ranges (start, bytes, name) overlap or leave [0, size)."""
    end, before = 0, ""
    for start, nbytes, name in sorted(ranges):
        if start < end:
            raise LoadError(f"{where}: {name} at {start} overlaps {before}, which ends at {end}")
        end, before = start + nbytes, name
    if end > size:
        raise LoadError(f"{where}: {before} ends at {end}, after the end at {size}")


def experts_of(value: Any, size: int, where: str) -> dict[int, LayerSlabs]:
    """Layer -> its slabs, which lie apart in a file of ``size`` bytes.

    Raises:
        LoadError: they do not, or are no slabs.
    """
    found: dict[int, LayerSlabs] = {}
    for key, raw in object_of(value, f"{where}: experts").items():
        here = f"{where}: experts of layer {key!r:.20}"
        if not (key.isascii() and key.isdecimal() and str(int(key[:10])) == key):
            raise LoadError(f"{here}: no number of a layer")
        entry = object_of(raw, here)
        differ = "kinds" in entry
        check_keys(entry, {"num", "offset", *(("kinds", "kind_of") if differ else ("stride", "parts"))}, here)
        num, offset = whole(entry["num"], f"{here}: num", 1), whole(entry["offset"], f"{here}: offset", of=PAGE)
        if differ:
            found[int(key)] = _different(entry, num, offset, here)
        else:
            kind = _kind({"stride": entry["stride"], "parts": entry["parts"]}, here)
            found[int(key)] = LayerSlabs(num, offset, kind.stride, kind.nbytes, kind.parts)
    check_apart(((s.offset, s.size, f"layer {i}") for i, s in found.items()), size, f"{where}: {EXPERTS}")
    return found


def _kind(value: Any, here: str) -> SlabKind:
    entry = object_of(value, here)
    check_keys(entry, {"stride", "parts"}, here)
    parts = {name: piece_of(p, f"{here}: {name}", of=64) for name, p in object_of(entry["parts"], here).items()}
    stride = whole(entry["stride"], f"{here}: stride", PAGE, of=PAGE)
    check_apart(((p.offset, p.nbytes, name) for name, p in parts.items()), stride, f"{here}: slab")
    return SlabKind(stride, max((p.offset + p.nbytes for p in parts.values()), default=0), parts)


def _different(entry: dict[str, Any], num: int, offset: int, here: str) -> LayerSlabs:
    """Slabs of several forms, one behind the other."""
    kinds, kind_of = entry["kinds"], entry["kind_of"]
    if not isinstance(kinds, list) or not isinstance(kind_of, list) or not kinds or len(kind_of) != num:
        raise LoadError(f"{here}: kinds and kind_of are no lists of forms, and of one for each of {num} experts")
    made = tuple(_kind(kind, f"{here}: kind {index}") for index, kind in enumerate(kinds))
    odd = next((kind for kind in kind_of if type(kind) is not int or not 0 <= kind < len(made)), None)
    if odd is not None:
        raise LoadError(f"{here}: there is no kind {odd!r:.40}; there are {len(made)}")
    starts = [offset]
    for kind in kind_of:
        starts.append(starts[-1] + made[kind].stride)
    largest = max(made, key=lambda kind: kind.stride)
    return LayerSlabs(num, offset, largest.stride, largest.nbytes, largest.parts, made, tuple(kind_of), tuple(starts))
