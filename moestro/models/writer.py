"""Stream any tensor source into safetensors files, one tensor in memory at a time (per worker)."""

import itertools
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from moestro.models.atomic import check_room
from moestro.models.headers import INDEX_NAME, SINGLE_NAME
from moestro.models.source import DTYPE_CODES, TensorSource


SHARD_BYTES = 5 << 30


def write_source(source: TensorSource, folder: Path, *, shard_bytes: int = SHARD_BYTES, workers: int = 2) -> None:
    """Write all tensors of `source` as `model.safetensors`, or as shards with an index when they exceed
    `shard_bytes`.

    Tensors are fetched by `workers` threads ahead of the writer, so at most `2 * workers` are in memory.
    Meant for the inside of `atomic_folder`, which turns a full disk into one clear line.

    Raises:
        SaveError: the disk has less room than all tensors take; nothing was fetched.
    """
    check_room(folder.parent, sum(map(source.nbytes, source.keys())))
    shards: list[list[str]] = [[]]
    filled = 0
    for key in source.keys():  # noqa: SIM118 - a source is not a dict
        if shards[-1] and filled + source.nbytes(key) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += source.nbytes(key)
    if len(shards) == 1:
        write_file(source, folder / SINGLE_NAME, shards[0], workers=workers)
        return
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(source, folder / name, keys, workers=workers)
        weight_map |= dict.fromkeys(keys, name)
    write_index(folder, weight_map, sum(map(source.nbytes, source.keys())))


def write_index(folder: Path, weight_map: dict[str, str], total: int) -> None:
    """Write the index of shards: tensor name -> file name, and the bytes of all tensors."""
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_file(source: TensorSource, path: Path, keys: list[str], *, workers: int = 2) -> None:
    """Write the tensors `keys` of `source` to one safetensors file, large types first so that all are
    aligned.
    """
    keys = sorted(keys, key=lambda key: -source.dtype(key).itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **source.metadata}}
    reached = 0
    for key in keys:
        end = reached + source.nbytes(key)
        code, shape = DTYPE_CODES[source.dtype(key)], list(source.shape(key))
        header[key] = {"dtype": code, "shape": shape, "data_offsets": [reached, end]}
        reached = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for tensor in _ahead(source, keys, workers):
            if tensor.numel():
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _ahead(source: TensorSource, keys: list[str], workers: int) -> Iterator[Tensor]:
    """The tensors in order, fetched a few ahead by threads."""
    pending: deque[Future[Tensor]] = deque()
    remaining = iter(keys)
    with ThreadPoolExecutor(workers) as pool:
        pending += (pool.submit(source.get, key) for key in itertools.islice(remaining, 2 * workers))
        while pending:
            tensor = pending.popleft().result()
            pending += (pool.submit(source.get, key) for key in itertools.islice(remaining, 1))
            yield tensor
