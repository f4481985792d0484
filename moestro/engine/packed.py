"""Reading a packed model: a folder whose every byte range is checked before anything is allocated.

The format is described in docs/packed-model.md. ``Packed.open`` reads ``pack.json`` alone; tensors of ``resident.bin``
are read by ``Packed.resident``, slabs of ``experts.bin`` by the expert store.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from moestro.core.errors import ConfigError, LoadError
from moestro.core.expert_cache import Key
from moestro.engine.dialect import TERNARY_WORDS, ModelSpec
from moestro.engine.layout import Bytes, aligned
from moestro.engine.packed_index import (
    EXPERTS,
    INDEX,
    PAGE,
    RAW,
    RESIDENT,
    LayerSlabs,
    Piece,
    check_apart,
    check_keys,
    experts_of,
    object_of,
    piece_of,
    whole,
)
from moestro.engine.ternary import CODED


__all__ = ["EXPERTS", "INDEX", "PAGE", "RAW", "RESIDENT", "LayerSlabs", "Packed", "Piece"]

FORMAT: Final = "moestro-pack"
VERSION: Final = 2
OLDEST: Final = 1
"""Versions from this one on are read. Version 2 has slabs that differ inside a layer, signs, coded ternary values."""

MAX_INDEX_BYTES: Final = 16 << 20
_CHUNK = 8 << 20


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
        found = object_of(_read_index(folder / INDEX), where)
        version = found.get("version")
        if found.get("format") != FORMAT or type(version) is not int or not OLDEST <= version <= VERSION:
            raise LoadError(
                f"{where}: format {found.get('format')!r:.40} version {version!r:.40}; this version reads "
                f"{FORMAT} {OLDEST} to {VERSION}: pack the model again"
            )
        check_keys(found, {"format", "version", "model", "files", "tensors", "experts", "notes"}, where)
        files = _files(found["files"], folder, where)
        try:
            model = ModelSpec.parse(object_of(found["model"], f"{where}: model"), where=f"{where}: model")
        except (ConfigError, RecursionError) as error:
            raise LoadError(f"{error or where}") from None
        tensors = _tensors(found["tensors"], files[RESIDENT][0], where)
        experts = experts_of(found["experts"], files[EXPERTS][0], where)
        _fit(model, tensors, experts, where)
        return cls(folder, model, tensors, experts, files)

    def slab(self, layer: int, expert: int) -> tuple[int, int]:
        """(offset, bytes) of an expert in ``experts.bin``; both multiples of 4096."""
        there = self.experts[layer]
        if not 0 <= expert < there.num:
            raise IndexError(f"layer {layer} has no expert {expert}; it has 0 to {there.num - 1}")
        return there.place(expert)

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


def _files(value: Any, folder: Path, where: str) -> dict[str, tuple[int, str]]:
    entries = object_of(value, f"{where}: files")
    check_keys(entries, {RESIDENT, EXPERTS}, f"{where}: files")
    found: dict[str, tuple[int, str]] = {}
    for name, entry in entries.items():
        check_keys(object_of(entry, f"{where}: {name}"), {"size", "sha256"}, f"{where}: {name}")
        size = whole(entry["size"], f"{where}: size of {name}")
        if not isinstance(entry["sha256"], str) or len(entry["sha256"]) != 64:
            raise LoadError(f"{where}: {name} has no sha256")
        with _opened(folder / name) as descriptor:
            there = os.fstat(descriptor).st_size
        if there != size:
            raise LoadError(f"{folder / name}: has {there} bytes, {INDEX} says {size}; pack the model again")
        found[name] = (size, entry["sha256"])
    return found


def _tensors(value: Any, size: int, where: str) -> dict[str, Piece]:
    found: dict[str, Piece] = {}
    for name, raw in object_of(value, f"{where}: tensors").items():
        entry = dict(object_of(raw, f"{where}: tensor {name!r:.80}"))
        if entry.pop("file", None) != RESIDENT:
            raise LoadError(f"{where}: tensor {name!r:.80} is not in {RESIDENT}")
        found[name] = piece_of(entry, f"{where}: tensor {name!r:.80}", of=PAGE)
    check_apart(((p.offset, p.nbytes, name) for name, p in found.items()), size, f"{where}: {RESIDENT}")
    return found


def _fit(model: ModelSpec, tensors: Mapping[str, Piece], experts: Mapping[int, LayerSlabs], where: str) -> None:
    """Raise LoadError unless the pieces are those that the model's settings call for."""
    routed = {index for index, layer in enumerate(model.layers) if layer.experts}
    if routed != experts.keys():
        raise LoadError(f"{where}: experts of layers {sorted(experts)}, the settings say {sorted(routed)}")
    for index in routed:
        layer, there = model.layers[index], experts[index]
        for parts in [kind.parts for kind in there.kinds] or [there.parts]:
            shapes = {name: piece.shape for name, piece in parts.items()}
            if there.num != layer.experts or shapes != layer.parts(model.hidden):
                raise LoadError(
                    f"{where}: layer {index} has {there.num} experts of {shapes}, the settings say {layer.experts} of "
                    f"{layer.parts(model.hidden)}"
                )
            if any(piece.layout == CODED for piece in parts.values()) and not model.ternary:
                raise LoadError(f"{where}: layer {index} has coded ternary experts, the model no table of their words")
    if model.dialect == "modules":
        return
    wanted = model.tensors()
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise LoadError(f"{where}: tensor {name!r:.80} is {'missing' if name in wanted else 'not called for'}")
    for name, shape in wanted.items():
        piece = tensors[name]
        table = name == TERNARY_WORDS
        if piece.shape != shape or (piece.layout in RAW or piece.layout == CODED) != table:
            raise LoadError(
                f"{where}: tensor {name} is {piece.layout} {list(piece.shape)}, the settings say {list(shape)}"
            )
