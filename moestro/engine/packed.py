"""Reading a packed model: a folder whose every byte range is checked before anything is allocated.

The format is described in docs/packed-model.md. ``Packed.open`` reads ``pack.json`` alone; tensors of ``resident.bin``
are read by ``Packed.resident``, slabs of ``experts.bin`` by the expert store.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError, LoadError
from moestro.core.expert_cache import Key
from moestro.engine.dialect import VECTOR, ModelSpec, Shape
from moestro.engine.layout import LAYOUTS, Bytes, aligned, matrix_bytes, unpack


FORMAT: Final = "moestro-pack"
VERSION: Final = 1
PAGE: Final = 4096
"""Tensors of the resident file, slabs and strides are multiples of this."""

INDEX, RESIDENT, EXPERTS = "pack.json", "resident.bin", "experts.bin"
MAX_INDEX_BYTES: Final = 16 << 20
MAX_BYTES: Final = 1 << 50
RAW: Final[Mapping[str, int]] = {"raw:F32": 4, "raw:F16": 2, "raw:BF16": 2, "raw:I64": 8, "raw:I32": 4, "raw:U8": 1,
                                 "raw:BOOL": 1}  # fmt: skip
"""Layouts of tensors as Transformers' modules hold them, row-major, and bytes of an element."""

_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A byte range: of a file, or of a slab. layout: of ``layout.LAYOUTS``, ``vector``, or one of ``RAW``."""

    offset: int
    nbytes: int
    layout: str
    shape: Shape

    def array(self, data: Bytes) -> npt.NDArray[Any]:
        """Its values: float32 of a matrix or vector; uint8 of a raw tensor, whose type numpy may not know."""
        if self.layout in LAYOUTS:
            return unpack(data, self.layout, *self.shape)
        flat = data[: self.nbytes]
        return flat if self.layout in RAW else flat.view(np.float32).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class LayerSlabs:
    """The experts of a layer: slab of expert e is at ``offset + e * stride`` of the experts' file.

    Attributes:
        nbytes: of a slab without the padding behind it. parts: gate, up, down and biases, offsets inside a slab.
    """

    num: int
    offset: int
    stride: int
    nbytes: int
    parts: Mapping[str, Piece]


class Packed:
    """A packed model on disk.

    Attributes:
        path: its folder. model: what it is. tensors: pieces of the resident file. experts: layer -> its slabs.
        files: name -> (size, sha256).
    """

    def __init__(
        self,
        path: Path,
        model: ModelSpec,
        tensors: Mapping[str, Piece],
        experts: Mapping[int, LayerSlabs],
        files: Mapping[str, tuple[int, str]],
    ) -> None:
        self.path, self.model, self.tensors, self.experts, self.files = path, model, tensors, experts, files

    @classmethod
    def open(cls, path: str | Path) -> "Packed":
        """Check a folder.

        Raises:
            LoadError: missing, of another version, damaged, or saying what its files do not hold.
        """
        folder = Path(path)
        where = str(folder / INDEX)
        found = _object(_read_index(folder / INDEX), where)
        if found.get("format") != FORMAT or found.get("version") != VERSION:
            raise LoadError(
                f"{where}: format {found.get('format')!r:.40} version {found.get('version')!r:.40}; this version reads "
                f"{FORMAT} {VERSION}: pack the model again"
            )
        _keys(found, {"format", "version", "model", "files", "tensors", "experts", "notes"}, where)
        files = _files(found["files"], folder, where)
        try:
            model = ModelSpec.parse(_object(found["model"], f"{where}: model"), where=f"{where}: model")
        except (ConfigError, RecursionError) as error:
            raise LoadError(f"{error or where}") from None
        tensors = _tensors(found["tensors"], files[RESIDENT][0], where)
        experts = _experts(found["experts"], files[EXPERTS][0], where)
        _fit(model, tensors, experts, where)
        return cls(folder, model, tensors, experts, files)

    def slab(self, layer: int, expert: int) -> tuple[int, int]:
        """(offset, bytes) of an expert in ``experts.bin``; both multiples of 4096."""
        there = self.experts[layer]
        if not 0 <= expert < there.num:
            raise IndexError(f"layer {layer} has no expert {expert}; it has 0 to {there.num - 1}")
        return there.offset + expert * there.stride, there.stride

    def keys(self, layer: int, ids: Iterable[int]) -> list[Key]:
        """(layer, expert) of experts.

        Raises:
            ConfigError: there is no such layer or expert, or one comes twice.
        """
        there = self.experts.get(layer)
        if there is None:
            raise ConfigError(f"layer {layer} has no experts; layers {sorted(self.experts)} have")
        keys = [(layer, int(expert)) for expert in ids]
        odd = next((key for key in keys if not 0 <= key[1] < there.num), None)
        if odd is not None or len(set(keys)) != len(keys):
            named = [expert for _, expert in keys]
            what = f"no expert {odd[1]}, it has 0 to {there.num - 1}" if odd else f"ids {named} name one twice"
            raise ConfigError(f"layer {layer}: {what}")
        return keys

    def resident(self, names: Iterable[str] | None = None) -> dict[str, Bytes]:
        """Bytes of tensors (None: all) in memory of their own, each at an address that is a multiple of 4096.

        Raises:
            LoadError: the file cannot be read or changed its size.
        """
        wanted = {name: self.tensors[name] for name in (self.tensors if names is None else names)}
        sizes = [-(-piece.nbytes // PAGE) * PAGE for piece in wanted.values()]
        place = aligned(sum(sizes), PAGE)
        found: dict[str, Bytes] = {}
        path = self.path / RESIDENT
        start = 0
        with _opened(path) as descriptor:
            for (name, piece), size in zip(wanted.items(), sizes, strict=True):
                into = place[start : start + piece.nbytes]
                _read_into(descriptor, piece.offset, into, path)
                _forget(descriptor)  # the page cache would count against the memory limit a second time
                found[name] = into
                start += size
        return found

    def verify(self) -> int:
        """Read everything and compare hashes.

        Returns:
            Bytes read.

        Raises:
            LoadError: a file is not what was written.
        """
        total = 0
        for name, (size, digest) in self.files.items():
            with _opened(self.path / name) as descriptor:
                read = hashlib.sha256()
                offset = 0
                while part := os.pread(descriptor, _CHUNK, offset):
                    read.update(part)
                    offset += len(part)
                    _forget(descriptor)
            if offset != size or read.hexdigest() != digest:
                raise LoadError(
                    f"{self.path / name}: its content ({offset} bytes) does not have the sha256 that {INDEX} says; the "
                    "file is damaged: pack the model again"
                )
            total += offset
        return total


class _opened:
    """A regular file as a descriptor, closed at the end; nothing here can block on a pipe."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> int:
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise LoadError(f"{self.path}: {getattr(error, 'strerror', None) or error}") from None
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            os.close(self.descriptor)
            raise LoadError(f"{self.path}: is not a regular file")
        return self.descriptor

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)


def _forget(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_into(descriptor: int, offset: int, into: Bytes, path: Path) -> None:
    view = memoryview(into)
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done : done + _CHUNK]], offset + done)
        except OSError as error:
            raise LoadError(f"{path}: reading at {offset + done} failed ({error.strerror})") from None
        if count == 0:
            raise LoadError(f"{path}: ends at {offset + done}, {len(view) - done} bytes early; it was changed")
        done += count


def _read_index(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise LoadError(f"{path}: a key stands there twice")
        return result

    def constant(name: str) -> float:
        raise LoadError(f"{path}: {name} is not JSON")

    with _opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > MAX_INDEX_BYTES:
            raise LoadError(f"{path}: {size} bytes; at most {MAX_INDEX_BYTES} are read")
        raw = os.read(descriptor, size + 1)
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise LoadError(f"{path}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise LoadError(f"{path}: is not valid JSON ({str(error)[:100]})") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LoadError(f"{where}: expected an object, found {value!r:.60}")
    return value


def _keys(value: dict[str, Any], names: set[str], where: str) -> None:
    for name in sorted(names - value.keys()):
        raise LoadError(f"{where}: has no {name}")
    for name in sorted(value.keys() - names):
        raise LoadError(f"{where}: has an unknown key {name!r:.60}")


def _whole(value: Any, where: str, least: int = 0, of: int = 1) -> int:
    if type(value) is not int or not least <= value <= MAX_BYTES or value % of:
        what = f" and a multiple of {of}" if of > 1 else ""
        raise LoadError(f"{where}: {value!r:.60} is no whole number from {least} to 2^50{what}")
    return value


def _files(value: Any, folder: Path, where: str) -> dict[str, tuple[int, str]]:
    entries = _object(value, f"{where}: files")
    _keys(entries, {RESIDENT, EXPERTS}, f"{where}: files")
    found: dict[str, tuple[int, str]] = {}
    for name, entry in entries.items():
        _keys(_object(entry, f"{where}: {name}"), {"size", "sha256"}, f"{where}: {name}")
        size = _whole(entry["size"], f"{where}: size of {name}")
        if not isinstance(entry["sha256"], str) or len(entry["sha256"]) != 64:
            raise LoadError(f"{where}: {name} has no sha256")
        with _opened(folder / name) as descriptor:
            there = os.fstat(descriptor).st_size
        if there != size:
            raise LoadError(f"{folder / name}: has {there} bytes, {INDEX} says {size}; pack the model again")
        found[name] = (size, entry["sha256"])
    return found


def _piece(value: Any, where: str, *, of: int) -> Piece:
    entry = _object(value, where)
    _keys(entry, {"offset", "nbytes", "layout", "shape"}, where)
    shape, layout = entry["shape"], entry["layout"]
    if not isinstance(shape, list) or not 1 <= len(shape) <= 8:
        raise LoadError(f"{where}: shape {shape!r:.60} is no list of 1 to 8 numbers")
    dims = tuple(_whole(dim, f"{where}: shape", least=1) for dim in shape)
    offset, nbytes = _whole(entry["offset"], f"{where}: offset", of=of), _whole(entry["nbytes"], f"{where}: nbytes", 1)
    total = 1
    for dim in dims:
        total *= dim
    if total > MAX_BYTES:
        raise LoadError(f"{where}: {total} values are too many")
    if layout in LAYOUTS and len(dims) == 2:
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


def _apart(ranges: Iterable[tuple[int, int, str]], size: int, where: str) -> None:
    """Raise LoadError where ranges (start, bytes, name) overlap or leave [0, size)."""
    end, before = 0, ""
    for start, nbytes, name in sorted(ranges):
        if start < end:
            raise LoadError(f"{where}: {name} at {start} overlaps {before}, which ends at {end}")
        end, before = start + nbytes, name
    if end > size:
        raise LoadError(f"{where}: {before} ends at {end}, after the end at {size}")


def _tensors(value: Any, size: int, where: str) -> dict[str, Piece]:
    found: dict[str, Piece] = {}
    for name, raw in _object(value, f"{where}: tensors").items():
        entry = dict(_object(raw, f"{where}: tensor {name!r:.80}"))
        if entry.pop("file", None) != RESIDENT:
            raise LoadError(f"{where}: tensor {name!r:.80} is not in {RESIDENT}")
        found[name] = _piece(entry, f"{where}: tensor {name!r:.80}", of=PAGE)
    _apart(((p.offset, p.nbytes, name) for name, p in found.items()), size, f"{where}: {RESIDENT}")
    return found


def _experts(value: Any, size: int, where: str) -> dict[int, LayerSlabs]:
    found: dict[int, LayerSlabs] = {}
    for key, raw in _object(value, f"{where}: experts").items():
        here = f"{where}: experts of layer {key!r:.20}"
        if not (key.isascii() and key.isdecimal() and str(int(key[:10])) == key):
            raise LoadError(f"{here}: no number of a layer")
        entry = _object(raw, here)
        _keys(entry, {"num", "offset", "stride", "parts"}, here)
        parts = {name: _piece(p, f"{here}: {name}", of=64) for name, p in _object(entry["parts"], here).items()}
        stride = _whole(entry["stride"], f"{here}: stride", PAGE, of=PAGE)
        _apart(((p.offset, p.nbytes, name) for name, p in parts.items()), stride, f"{here}: slab")
        nbytes = max((p.offset + p.nbytes for p in parts.values()), default=0)
        num, offset = _whole(entry["num"], f"{here}: num", 1), _whole(entry["offset"], f"{here}: offset", of=PAGE)
        found[int(key)] = LayerSlabs(num, offset, stride, nbytes, parts)
    _apart(((s.offset, s.num * s.stride, f"layer {i}") for i, s in found.items()), size, f"{where}: {EXPERTS}")
    return found


def _fit(model: ModelSpec, tensors: Mapping[str, Piece], experts: Mapping[int, LayerSlabs], where: str) -> None:
    """Raise LoadError unless the pieces are those that the model's settings call for."""
    routed = {index for index, layer in enumerate(model.layers) if layer.experts}
    if routed != experts.keys():
        raise LoadError(f"{where}: experts of layers {sorted(experts)}, the settings say {sorted(routed)}")
    for index in routed:
        layer, there = model.layers[index], experts[index]
        shapes = {name: piece.shape for name, piece in there.parts.items()}
        if there.num != layer.experts or shapes != layer.parts(model.hidden):
            raise LoadError(
                f"{where}: layer {index} has {there.num} experts of {shapes}, the settings say {layer.experts} of "
                f"{layer.parts(model.hidden)}"
            )
    if model.dialect == "modules":
        return
    wanted = model.tensors()
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise LoadError(f"{where}: tensor {name!r:.80} is {'missing' if name in wanted else 'not called for'}")
    for name, shape in wanted.items():
        piece = tensors[name]
        if piece.shape != shape or piece.layout in RAW:
            raise LoadError(
                f"{where}: tensor {name} is {piece.layout} {list(piece.shape)}, the settings say {list(shape)}"
            )
