"""Where tensors come from: one protocol over safetensors, GGUF and memory.

A source knows names, shapes and types from checked headers alone and hands out tensors one at a time, so that
models larger than memory can be planned, converted and compressed. Headers are validated when a source is
made; an error later can only be the disk's.
"""

import difflib
import hashlib
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from moestro.core.errors import LoadError
from moestro.models.headers import (
    INDEX_NAME,
    SafetensorsHeader,
    TensorInfo,
    check_index,
    check_inside,
    open_regular,
    read_index,
    read_open_header,
    shown,
    weight_files,
)


DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

_SAMPLED_ABOVE = 1 << 16
_SAMPLE_BYTES = 1 << 12
_NUM_SAMPLES = 16


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors that are read one at a time. All methods but `get` answer from headers alone.

    An unknown key is a `LoadError` that names the nearest known one.
    """

    name: str
    metadata: Mapping[str, str]

    def keys(self) -> list[str]:
        """All tensor names, in the order of the file."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, key: str) -> torch.dtype:
        """Type of what `get` returns."""

    def nbytes(self, key: str) -> int:
        """Bytes of what `get` returns."""

    def get(self, key: str) -> Tensor:
        """The tensor, on the CPU. It may be a view of a file: changing it never changes the file."""

    def close(self) -> None:
        """Let go of files. Tensors that were handed out stay valid."""


def fingerprint(source: TensorSource, *, full: bool = False) -> str:
    """A sha256 (hex) over names, types, shapes and contents, the same whatever the container and the order.

    Tensors of up to 64 KiB are hashed whole, larger ones by 16 evenly spaced blocks of 4 KiB with the first
    and the last (`full`: whole). It tells models apart; it does not prove that nobody changed a single
    weight: use `full`, or the manifest of an atomic folder, for that.
    """
    digest = hashlib.sha256(b"moestro-tensors-1")
    for key in sorted(source.keys()):
        tensor = source.get(key)
        code = DTYPE_CODES[tensor.dtype]
        digest.update(f"\n{len(key)}:{key} {code} {list(tensor.shape)}\n".encode())
        for part in _sampled(tensor, full):
            digest.update(part)
    return digest.hexdigest()


def _sampled(tensor: Tensor, full: bool) -> Iterable[memoryview]:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    size = len(flat)
    if full or size <= _SAMPLED_ABOVE:
        return [flat]
    starts = [(size - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1) for index in range(_NUM_SAMPLES)]
    return [flat[start : start + _SAMPLE_BYTES] for start in starts]


class TableSource:
    """What sources share: a table of infos and the answers from it. Subclasses set `name` and `_infos`."""

    name: str
    _infos: dict[str, TensorInfo]

    def keys(self) -> list[str]:
        return list(self._infos)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._info(key).shape

    def dtype(self, key: str) -> torch.dtype:
        return DTYPES[self._info(key).dtype]

    def nbytes(self, key: str) -> int:
        return self._info(key).nbytes

    def __contains__(self, key: str) -> bool:
        return key in self._infos

    def __len__(self) -> int:
        return len(self._infos)

    def _info(self, key: str) -> TensorInfo:
        try:
            return self._infos[key]
        except KeyError:
            raise unknown_tensor(self.name, key, self._infos) from None


def unknown_tensor(name: str, key: str, known: Iterable[str]) -> LoadError:
    """The error for a tensor that a source does not hold; it names the nearest one that it does."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    hint = f"; the nearest is {shown(near[0])}" if near else ""
    return LoadError(f"{name}: holds no tensor {shown(key)}{hint}")


class SafetensorsSource(TableSource):
    """The tensors of a safetensors file, or of a folder with one file or an index and its shards.

    All headers are checked when the source is made; contents are mapped, not read: `get` returns a private
    view of the file (copy on write), so that asking for a tensor costs nothing until its pages are touched.
    Thread-safe.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.name = str(path)
        self.metadata: Mapping[str, str] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._shard_of: dict[str, SafetensorsHeader] = {}
        self._lock = threading.Lock()
        if path.is_dir():
            headers = {file.name: self._add(check_inside(file, path), file.name) for file in weight_files(path)}
            if (path / INDEX_NAME).is_file():
                check_index(path, read_index(path), headers)
        else:
            self._add(path, path.name)

    def get(self, key: str) -> Tensor:
        info = self._info(key)
        dtype = DTYPES[info.dtype]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        data = self._map(self._shard_of[key])
        flat = torch.frombuffer(data, dtype=torch.uint8, count=info.nbytes, offset=info.start)
        if info.start % dtype.itemsize:
            flat = flat.clone()  # types of more than one byte can only be viewed at a multiple of their size
        return flat.view(dtype).reshape(info.shape)

    def close(self) -> None:
        with self._lock:
            self._maps.clear()

    def _add(self, path: Path, shard: str) -> SafetensorsHeader:
        with open_regular(path) as file:
            header = read_open_header(file, path)
        for key, info in header.tensors.items():
            if key in self._infos:
                raise LoadError(
                    f"{self.name}: tensor {shown(key)} is in {self._shard_of[key].path.name} and in {shard}"
                )
            self._infos[key] = info
            self._shard_of[key] = header
        self.metadata = {**self.metadata, **header.metadata}
        return header

    def _map(self, header: SafetensorsHeader) -> mmap.mmap:
        with self._lock:
            if header.path not in self._maps:
                self._maps[header.path] = map_private(header.path, header.size)
            return self._maps[header.path]


def map_private(path: Path, size: int) -> mmap.mmap:
    """Map a file of `size` bytes so that writing to the memory never reaches it. Raises `LoadError` when it
    changed.
    """
    # Linux: without MAP_NORESERVE the kernel may refuse to map files larger than the memory for writing.
    noreserve = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0
    with open_regular(path) as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise LoadError(f"{path}: had {size} bytes when its header was checked and has {found} now; load it again")
        flags, protection = mmap.MAP_PRIVATE | noreserve, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), size, flags=flags, prot=protection)


class MemorySource(TableSource):
    """Tensors that are in memory already, such as a state dict."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "memory") -> None:
        self.name = name
        self.metadata: Mapping[str, str] = {}
        self._tensors = dict(tensors)
        self._infos = {}
        for key, tensor in self._tensors.items():
            if tensor.dtype not in DTYPE_CODES:
                raise LoadError(f"{name}: tensor {shown(key)} has the type {tensor.dtype}, which no file can hold")
            code, nbytes = DTYPE_CODES[tensor.dtype], tensor.numel() * tensor.dtype.itemsize
            self._infos[key] = TensorInfo(key, code, tuple(tensor.shape), 0, nbytes)

    def get(self, key: str) -> Tensor:
        self._info(key)
        return self._tensors[key]

    def close(self) -> None:
        pass
