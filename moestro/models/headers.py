"""Headers of safetensors files and folders, checked in full before anything is allocated.

A safetensors file is an 8-byte little-endian length N, N bytes of JSON and a byte buffer. The reader here
holds a file to all rules of the format (https://huggingface.co/docs/safetensors) and to the ones that keep a
file from being two things at once: the tensors cover the buffer without a hole or an overlap, and the file
ends where the buffer ends. Whatever is wrong is one `LoadError` that names the file and, where there is one,
the tensor.

Neither torch nor transformers is imported here, so that sizes can be read where they are not loaded.
"""

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moestro.core.errors import LoadError


MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 100_000_000
# Far above any real tensor and far below where a product of dimensions could leave 64 bits.
MAX_TENSOR_BYTES = 1 << 50
MAX_DIMENSIONS = 16

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")

# Bytes of one element. Types below one byte have no plain torch tensor and are refused by name.
ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
_DEVICE_NAME = re.compile(r"(?i)^(con|prn|aux|nul|com\d|lpt\d)(\.|$)")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a header describes it: safetensors type code, shape, byte range in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A checked header. `tensors` keeps the order of the bytes; starts count from the file's beginning."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a missing file, folder, pipe or device is a `LoadError`, and none can
    block.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise LoadError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: cannot be opened ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LoadError(f"{path}: is not a regular file")
    return os.fdopen(descriptor, "rb")


def parse_json_object(raw: bytes, where: str, *, infinities: bool = False) -> dict[str, Any]:
    """Parse one strict JSON object: UTF-8, no key twice, no NaN or Infinity unless `infinities`.

    Raises `LoadError` that starts with `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise LoadError(f"{where}: the key {shown(twice)} stands there twice")
        return result

    def constant(name: str) -> float:
        if infinities:
            return float(name)
        raise LoadError(f"{where}: {name} is not JSON")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise LoadError(f"{where}: is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise LoadError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise LoadError(f"{where}: is not valid JSON ({str(error)[:120]})") from None
    if not isinstance(value, dict):
        raise LoadError(f"{where}: is not a JSON object but a {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file of at most 100 MB. Raises `LoadError`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise LoadError(f"{path}: {size} bytes are too many for a JSON file (at most {MAX_JSON_BYTES})")
        # Configs hold infinities now and then: Python writes them, and Transformers reads them.
        return parse_json_object(file.read(), str(path), infinities=True)


def shown(value: Any) -> str:
    """A name or value from a file, fit for one line of a message: escaped, cut at 120 characters, names in
    quotes.
    """
    if isinstance(value, str):
        return ascii(value if len(value) <= 120 else value[:117] + "...")
    text = ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."


def read_safetensors_header(path: str | Path) -> SafetensorsHeader:
    """Read and check the header of one safetensors file.

    Checked: 8-byte length within the file and at most 100 MB; a UTF-8 JSON object without duplicate keys;
    known types; dimensions that are non-negative integers; products without overflow; byte ranges that fit
    the shape and cover the buffer exactly; a file that ends where the buffer ends. Raises `LoadError`.
    """
    path = Path(path)
    with open_regular(path) as file:
        return read_open_header(file, path)


def read_open_header(file: BinaryIO, path: Path) -> SafetensorsHeader:
    """`read_safetensors_header` for a file that is already open; `path` is for the messages."""
    size = os.fstat(file.fileno()).st_size
    if size < 10:
        raise LoadError(f"{path}: {size} bytes are too few for a safetensors file; it is cut or empty")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise LoadError(
            f"{path}: the header claims {length} bytes (at most {MAX_HEADER_BYTES}); not a safetensors file"
        )
    if length < 2 or 8 + length > size:
        raise LoadError(f"{path}: the header claims {length} bytes but the file has {size}; it is cut or damaged")
    raw = file.read(length)
    if len(raw) != length or raw[:1] != b"{":
        raise LoadError(f"{path}: the header does not begin with '{{'; not a safetensors file")
    entries = parse_json_object(raw, f"{path}: header")
    metadata = _checked_metadata(entries.pop("__metadata__", {}), path)
    data_start = 8 + length
    tensors = [_checked_tensor(path, name, entry, data_start, size) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    _check_cover(path, tensors, data_start, size)
    return SafetensorsHeader(path, {tensor.name: tensor for tensor in tensors}, metadata, size)


def _checked_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LoadError(f"{path}: __metadata__ must map names to strings")
    return metadata


def _checked_tensor(path: Path, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
    where = f"{path}: tensor {shown(name)}"
    if not name.isprintable():
        raise LoadError(f"{where}: the name holds characters that cannot be printed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise LoadError(f"{where}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise LoadError(f"{where}: type {shown(dtype)} is not one of {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise LoadError(f"{where}: the shape must be at most {MAX_DIMENSIONS} whole numbers >= 0, not {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise LoadError(f"{where}: data_offsets must be two whole numbers >= 0, not {shown(offsets)}")
    needed = checked_product(shape, ITEM_BYTES[dtype], where)
    begin, end = offsets
    if end - begin != needed:
        raise LoadError(
            f"{where}: {dtype} {shape} takes {needed} bytes, but the offsets [{begin}, {end}] hold {end - begin}"
        )
    if data_start + end > size:
        raise LoadError(f"{where}: ends at byte {data_start + end} of a file of {size}; the file is cut")
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, needed)


def _is_count(value: Any) -> bool:
    # JSON true is an int in Python; a shape of [true] is not a shape.
    return type(value) is int and 0 <= value <= MAX_TENSOR_BYTES


def checked_product(shape: list[int] | tuple[int, ...], item_bytes: int, where: str) -> int:
    """Bytes of a tensor, refused beyond 2**50. A zero dimension hides no overflow: the others are multiplied
    too.
    """
    total = item_bytes
    for dimension in shape:
        total *= max(dimension, 1)
        if total > MAX_TENSOR_BYTES:
            raise LoadError(f"{where}: the shape {shown(list(shape))} asks for more than {MAX_TENSOR_BYTES} bytes")
    return 0 if 0 in shape else total


def _check_cover(path: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    reached = data_start
    for tensor in tensors:
        if tensor.start != reached:
            kind = "overlaps the tensor before it" if tensor.start < reached else "leaves a hole before it"
            raise LoadError(
                f"{path}: tensor {shown(tensor.name)} {kind}: begins at byte {tensor.start - data_start}, "
                f"expected {reached - data_start}"
            )
        reached += tensor.nbytes
    if reached != size:
        raise LoadError(f"{path}: the tensors end at byte {reached} but the file has {size} bytes")


def read_index(folder: Path) -> dict[str, str]:
    """Read `model.safetensors.index.json`: tensor name -> file name of its shard. Raises `LoadError`.

    A shard must be a plain file name beside the index: no folder, drive, device name or `..`.
    """
    path = folder / INDEX_NAME
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{path}: needs a weight_map from tensor names to shard files")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise LoadError(f"{path}: tensor {shown(tensor)}: the shard must be a file name, not {shown(shard)}")
    for shard in sorted(set(weight_map.values())):
        check_plain_name(shard, path)
    return weight_map


def check_plain_name(name: str, where: Path) -> None:
    """Refuse a shard name that could lead out of its folder or to a device. Raises `LoadError`."""
    plain = name.isprintable() and not any(letter in name for letter in "/\\:") and not name.startswith(".")
    if not plain or _DEVICE_NAME.match(name) or not name.endswith(".safetensors"):
        raise LoadError(f"{where}: the shard {shown(name)} is not a plain *.safetensors file name beside the index")


def check_inside(path: Path, folder: Path) -> Path:
    """Resolve symbolic links of `path` and refuse a target outside `folder`. Raises `LoadError`.

    The hub's cache keeps `models--x/snapshots/rev/file -> ../../blobs/hash`; there the repository's own
    folder counts.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise LoadError(f"{path}: no such file") from None
    if not real.is_relative_to(root):
        raise LoadError(f"{path}: is a link out of its folder (to {real}); copy the file into the folder")
    return real


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights, sorted. Raises `LoadError` when they are pickled or
    ambiguous.
    """
    indexed, single = (folder / INDEX_NAME).is_file(), (folder / SINGLE_NAME).exists()
    if indexed and single:
        raise LoadError(f"{folder}: holds both {INDEX_NAME} and {SINGLE_NAME}; delete the one that is out of date")
    if indexed:
        return [folder / shard for shard in sorted(set(read_index(folder).values()))]
    if single:
        return [folder / SINGLE_NAME]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise LoadError(f"{folder}: {len(found)} safetensors files but no {INDEX_NAME} that says which tensor is where")
    check_not_pickled(folder)
    raise LoadError(f"{folder}: no {SINGLE_NAME} or {INDEX_NAME}; is it a model folder?")


def check_not_pickled(folder: Path) -> None:
    """Refuse a folder whose weights are pickled. Raises `LoadError`; says nothing where there are none."""
    for path in sorted(folder.iterdir()):
        if path.name.endswith(PICKLE_SUFFIXES) and path.is_file():
            raise LoadError(
                f"{path}: a pickled checkpoint can run code when it is read and is never opened; convert it "
                "to safetensors where you trust it (model.save_pretrained of Transformers writes safetensors)"
            )


def read_headers(folder: Path) -> dict[str, SafetensorsHeader]:
    """Check all shards of a folder against each other: shard file name -> header. Raises `LoadError`.

    Every indexed tensor stands exactly once, in the shard that the index names, and no shard holds another
    one.
    """
    headers = {path.name: read_safetensors_header(check_inside(path, folder)) for path in weight_files(folder)}
    if (folder / INDEX_NAME).is_file():
        check_index(folder, read_index(folder), headers)
    return headers


def check_index(folder: Path, weight_map: dict[str, str], headers: Mapping[str, SafetensorsHeader]) -> None:
    """Hold index and shards against each other. Raises `LoadError` that names the tensor and the shard."""
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard].tensors:
            elsewhere = [name for name, header in headers.items() if tensor in header.tensors]
            found = f"it is in {elsewhere[0]}" if elsewhere else "it is in no shard"
            raise LoadError(f"{folder}: tensor {shown(tensor)} should be in {shard} by the index, but {found}")
    for shard, header in headers.items():
        for tensor in header.tensors:
            if weight_map.get(tensor) != shard:
                entry = f"in {weight_map[tensor]}" if tensor in weight_map else "missing"
                raise LoadError(f"{folder}: tensor {shown(tensor)} is in {shard}, but in the index it is {entry}")
