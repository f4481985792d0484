"""The header of a GGUF file, checked in full before the `gguf` package or an allocation sees a size from it.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: magic, version, number of
tensors and of metadata entries, the entries, the tensor infos, padding, the data. The package's own reader
trusts counts, lengths and offsets; this one trusts none of them. Whatever is wrong is one `LoadError` that
names the file.
"""

import functools
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from moestro.core.errors import LoadError
from moestro.models.headers import checked_product, open_regular, shown


MAX_TENSORS = 1 << 20
MAX_ENTRIES = 1 << 16
MAX_NAME_BYTES = 1 << 10
MAX_STRING_BYTES = 1 << 26
# The largest vocabularies hold some 300,000 tokens and as many merges.
MAX_STRINGS = 1 << 22
MAX_NUMBERS = 1 << 24
DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 16
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
# The shortest entry (empty key, type, one byte) and tensor info (one dimension): counts must fit the file.
_MIN_ENTRY_BYTES = 8 + 4 + 1
_MIN_INFO_BYTES = 8 + 4 + 8 + 4 + 8

Value = int | float | bool | str | list[str] | np.ndarray


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: ggml type (number and name), shape in torch's order (rows first), byte range."""

    name: str
    type: int
    type_name: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """A checked header. `metadata` has Python scalars, lists of strings and NumPy arrays of numbers."""

    path: Path
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, GGUFTensor]
    size: int


class _Cursor:
    """A position in the mapped file that cannot leave it."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.size, self.at = data, path, len(data), 0

    def fail(self, message: str) -> NoReturn:
        raise LoadError(f"{self.path}: {message}")

    def take(self, count: int, what: str) -> int:
        """Advance by `count` bytes and return where they begin."""
        begin = self.at
        if count > self.size - begin:
            self.fail(f"{what} needs {count} bytes at byte {begin} of a file of {self.size}; it is cut or damaged")
        self.at = begin + count
        return begin

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize(code), what))[0]

    def text(self, limit: int, what: str) -> str:
        length = self.number("Q", what)
        if length > limit:
            self.fail(f"{what} claims {length} bytes (at most {limit})")
        begin = self.take(length, what)
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")


def read_gguf_header(path: str | Path) -> GGUFHeader:
    """Read and check the header of a GGUF file (version 2 or 3, little-endian).

    Checked: magic and version; counts, string lengths, array lengths and dimensions against the file and
    fixed limits; UTF-8; no key or tensor twice; tensor types that can be dequantised; rows of whole blocks;
    offsets aligned, in the file, without overlap and without holes beyond the padding. Raises `LoadError`.
    """
    path = Path(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise LoadError(f"{path}: {size} bytes are too few for a GGUF file; it is cut or empty")
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(data, path))


def _read(cursor: _Cursor) -> GGUFHeader:
    if cursor.data[cursor.take(4, "the magic") : 4] != b"GGUF":
        cursor.fail("does not begin with GGUF; not a GGUF file")
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0:
        cursor.fail("is a big-endian GGUF file; convert it to little-endian")
    if version not in (2, 3):
        cursor.fail(f"is GGUF version {version}; versions 2 and 3 are read")
    num_tensors = _count(cursor, "tensors", MAX_TENSORS, _MIN_INFO_BYTES)
    num_entries = _count(cursor, "metadata entries", MAX_ENTRIES, _MIN_ENTRY_BYTES)
    metadata: dict[str, Value] = {}
    for _ in range(num_entries):
        key = cursor.text(MAX_NAME_BYTES, "a metadata key")
        if key in metadata:
            cursor.fail(f"the metadata key {shown(key)} stands there twice")
        metadata[key] = _value(cursor, cursor.number("I", "a value type"), f"metadata {shown(key)}")
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {shown(alignment)}; it must be a power of two from 8 to {_MAX_ALIGNMENT}")
    tensors = [_tensor(cursor) for _ in range(num_tensors)]
    data_start = -(-cursor.at // alignment) * alignment
    placed = [_placed(cursor, tensor, data_start) for tensor in tensors]
    _check_cover(cursor, placed, data_start, alignment)
    by_name = {tensor.name: tensor for tensor in placed}
    if len(by_name) != len(placed):
        twice = next(tensor.name for tensor in placed if by_name[tensor.name] is not tensor)
        cursor.fail(f"tensor {shown(twice)} stands there twice")
    return GGUFHeader(cursor.path, version, metadata, by_name, cursor.size)


def _count(cursor: _Cursor, what: str, limit: int, min_bytes: int) -> int:
    count = int(cursor.number("Q", f"the number of {what}"))
    possible = min(limit, (cursor.size - cursor.at) // min_bytes)
    if count > possible:
        cursor.fail(f"claims {count} {what}, but a file of {cursor.size} bytes can hold at most {possible}")
    return count


def _value(cursor: _Cursor, kind: int, what: str) -> Value:
    if kind == _STRING:
        return cursor.text(MAX_STRING_BYTES, what)
    if kind == _ARRAY:
        return _array(cursor, what)
    if kind not in _SCALARS:
        cursor.fail(f"{what} has the unknown type {kind}")
    value: int | float = cursor.number(_SCALARS[kind], what)
    if kind != _BOOL:
        return value
    if value not in (0, 1):
        cursor.fail(f"{what} is a truth value of {value}")
    return bool(value)


def _array(cursor: _Cursor, what: str) -> Value:
    kind, length = cursor.number("I", what), cursor.number("Q", what)
    if kind == _STRING:
        return _strings(cursor, length, what)
    if kind not in _SCALARS:
        cursor.fail(f"{what} is an array of the unknown type {kind}")
    dtype = np.dtype("<" + _SCALARS[kind].replace("f", "f4").replace("d", "f8"))
    if length > MAX_NUMBERS:
        cursor.fail(f"{what} claims {length} numbers (at most {MAX_NUMBERS})")
    begin = cursor.take(length * dtype.itemsize, what)
    # A copy: the map is closed when the header has been read.
    return np.frombuffer(cursor.data, dtype, length, begin).copy()


def _strings(cursor: _Cursor, length: int, what: str) -> list[str]:
    if length > min(MAX_STRINGS, (cursor.size - cursor.at) // 8):
        cursor.fail(f"{what} claims {length} strings (at most {MAX_STRINGS}, 8 bytes each and more)")
    # Written out, not by `cursor.text`: with a vocabulary, reading a header spends its time in this loop.
    data, size, at, result, unpack = cursor.data, cursor.size, cursor.at, [], struct.Struct("<Q").unpack_from
    try:
        for _ in range(length):
            (count,) = unpack(data, at)
            end = at + 8 + count
            if end > size:
                cursor.fail(f"{what}: a string of {count} bytes at byte {at} of a file of {size}; it is cut or damaged")
            result.append(data[at + 8 : end].decode("utf-8"))
            at = end
    except UnicodeDecodeError:
        cursor.fail(f"{what}: string {len(result)} is not UTF-8")
    except struct.error:
        cursor.fail(f"{what}: string {len(result)} begins behind the end of the file; it is cut or damaged")
    cursor.at = at
    return result


def _tensor(cursor: _Cursor) -> tuple[str, list[int], int, int]:
    name = cursor.text(MAX_NAME_BYTES, "a tensor name")
    what = f"tensor {shown(name)}"
    if not name or not name.isprintable():
        cursor.fail(f"{what}: the name is empty or cannot be printed")
    num_dims = cursor.number("I", what)
    if not 1 <= num_dims <= 4:
        cursor.fail(f"{what} has {num_dims} dimensions; GGUF has 1 to 4")
    dims = [cursor.number("Q", what) for _ in range(num_dims)]
    if 0 in dims:
        cursor.fail(f"{what} has the shape {dims} with nothing in it")
    return name, dims, cursor.number("I", what), cursor.number("Q", what)


def _placed(cursor: _Cursor, info: tuple[str, list[int], int, int], data_start: int) -> GGUFTensor:
    name, dims, kind, offset = info
    what = f"{cursor.path}: tensor {shown(name)}"
    type_name, block, block_bytes = quant_type(kind, what)
    checked_product(dims, 8, what)
    if dims[0] % block:
        raise LoadError(f"{what}: rows of {dims[0]} are not whole {type_name} blocks of {block}")
    nbytes = math.prod(dims) // block * block_bytes
    if data_start + offset + nbytes > cursor.size:
        raise LoadError(
            f"{what}: ends at byte {data_start + offset + nbytes} of a file of {cursor.size}; the file is cut"
        )
    return GGUFTensor(name, kind, type_name, tuple(reversed(dims)), data_start + offset, nbytes)


@functools.cache
def _quant_types() -> dict[int, tuple[str, int, int]]:
    """ggml type -> (name, elements of a block, bytes of a block), for the types the `gguf` package
    dequantises.
    """
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    known = {}
    for kind, (block, block_bytes) in GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        known[int(kind)] = (kind.name, block, block_bytes)
    return known


def quant_type(kind: int, what: str) -> tuple[str, int, int]:
    """Name, elements of a block and bytes of a block of a ggml type. Raises `LoadError` that starts with
    `what`.
    """
    known = _quant_types()
    if kind not in known:
        names = ", ".join(name for name, _, _ in known.values())
        raise LoadError(f"{what}: ggml type {kind} cannot be dequantised (known: {names})")
    return known[kind]


def _check_cover(cursor: _Cursor, tensors: list[GGUFTensor], data_start: int, alignment: int) -> None:
    reached = data_start
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        where = f"tensor {shown(tensor.name)} begins at byte {tensor.start}"
        if tensor.start % alignment:
            cursor.fail(f"{where}, which is not a multiple of {alignment}")
        if tensor.start < reached:
            cursor.fail(f"{where}, inside the one before it that ends at byte {reached}")
        if tensor.start - reached >= alignment:
            cursor.fail(f"{where}, a hole of {tensor.start - reached} bytes behind the one before it")
        reached = tensor.start + tensor.nbytes
    if tensors and cursor.size - reached >= alignment:
        cursor.fail(f"the tensors end at byte {reached} but the file has {cursor.size} bytes")
