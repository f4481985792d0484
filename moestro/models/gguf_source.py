"""GGUF files as a tensor source: Hugging Face names and layouts, float32, dequantised one tensor at a
time.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moestro.core.errors import LoadError
from moestro.models.gguf_header import GGUFTensor, quant_type, read_gguf_header
from moestro.models.gguf_plan import Piece, build_config, tensor_pieces
from moestro.models.headers import TensorInfo, open_regular
from moestro.models.source import TableSource


# The package dequantises groups of 16 rows at a time; rows of this size keep a group in the CPU's cache.
_ROW_BYTES = 6144
_CHUNK_BYTES = 1 << 22


class GGUFSource(TableSource):
    """The tensors of a GGUF file under their Hugging Face names; experts come one by one.

    Everything is float32: exactly what the `gguf` package's dequantiser gives, with the converter's changes
    undone. The header is checked, and every tensor of the file accounted for, when the source is made
    (`LoadError`, `FamilyError`). `config` is the Hugging Face config as `config.json` holds it. Thread-safe.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.header = read_gguf_header(self.path)
        self.config: dict[str, Any] = build_config(self.header)
        self._pieces = tensor_pieces(self.header, self.config)
        self._infos = {key: _info(piece) for key, piece in self._pieces.items()}
        self.metadata: Mapping[str, str] = {"format": "pt"}
        self._data: NDArray[np.uint8] | None = None
        self._lock = threading.Lock()

    def get(self, key: str) -> Tensor:
        self._info(key)
        piece = self._pieces[key]
        values = dequantize(self._bytes(piece), piece.tensor)
        return torch.from_numpy(undo(values, piece))

    def close(self) -> None:
        self._data = None

    def _bytes(self, piece: Piece) -> NDArray[np.uint8]:
        """The raw bytes of a piece: all of its GGUF tensor, or one expert's share, which is contiguous."""
        with self._lock:
            if self._data is None:
                self._data = map_readonly(self.path, self.header.size)
            data = self._data
        tensor, start, nbytes = piece.tensor, piece.tensor.start, piece.tensor.nbytes
        if piece.expert is not None:
            nbytes //= tensor.shape[0]
            start += piece.expert * nbytes
        return data[start : start + nbytes]


def map_readonly(path: Path, size: int) -> NDArray[np.uint8]:
    """Map a file for reading. Raises `LoadError` when it no longer has the size its header was checked
    with.
    """
    with open_regular(path) as file:
        data = np.memmap(file, np.uint8, "r")
    if data.size != size:
        raise LoadError(f"{path}: had {size} bytes when its header was checked and has {data.size} now; load it again")
    return data


def _info(piece: Piece) -> TensorInfo:
    nbytes = 4 * int(np.prod(piece.shape, dtype=np.int64))
    return TensorInfo(piece.name, "F32", piece.shape, piece.tensor.start, nbytes)


def dequantize(raw: NDArray[np.uint8], tensor: GGUFTensor) -> NDArray[np.float32]:
    """Dequantise whole blocks, flat: bit for bit what `gguf.quants.dequantize` gives, several times as fast.

    `raw` are the bytes of any number of blocks of the tensor's type; the result has one float32 per element.
    Blocks do not depend on each other, so they may be arranged in rows of any length.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as dequantize_rows

    kind = GGMLQuantizationType(tensor.type)
    _, block, block_bytes = quant_type(tensor.type, tensor.name)
    out = np.empty(raw.size // block_bytes * block, np.float32)
    row_bytes = -(-_ROW_BYTES // block_bytes) * block_bytes
    chunk_bytes = _CHUNK_BYTES // row_bytes * row_bytes
    begin = at = 0
    while begin < raw.size:
        end = min(begin + chunk_bytes, raw.size)
        # The last, shorter chunk is cut into whole rows and a remainder.
        whole = (end - begin) // row_bytes * row_bytes or end - begin
        rows = raw[begin : begin + whole].reshape(-1, min(row_bytes, whole))
        values = dequantize_rows(rows, kind)
        out[at : at + values.size] = values.reshape(-1)
        begin, at = begin + whole, at + values.size
    return out


def undo(values: NDArray[np.float32], piece: Piece) -> NDArray[np.float32]:
    """Undo what llama.cpp's converter did to a tensor; float32, contiguous, of the piece's shape."""
    if piece.op == "unpermute":
        heads = values.reshape(piece.heads, piece.shape[0] // piece.heads // 2, 2, -1)
        return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(piece.shape)
    if piece.op == "minus_one":
        values = values - np.float32(1)
    return values.reshape(piece.shape)
