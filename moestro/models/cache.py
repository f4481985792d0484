"""Conversions that are made once and kept: atomic folders under `$MOESTRO_CACHE` or `~/.cache/moestro`.

An entry's name begins with what it was made from, for people who look, and ends with a key over all that it
depends on, so that an entry is never out of date: a changed input or a changed conversion has another key.
Any entry may be deleted at any time.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from moestro.core.errors import LoadError, SaveError
from moestro.core.files import cache_root
from moestro.models.atomic import BusyError, atomic_folder, recover, verify_folder
from moestro.models.gguf_source import GGUFSource
from moestro.models.gguf_tokenizer import write_tokenizer
from moestro.models.headers import open_regular
from moestro.models.writer import write_source


# Part of every key: raise it when a conversion writes something else from the same input.
VERSION = 1
_SAMPLE_BYTES = 1 << 16
_NUM_SAMPLES = 32
_POLL_SECONDS = 0.2


def cached_folder(name: str, key: str, build: Callable[[Path], None], *, nbytes: int = 0) -> Path:
    """The entry of `name` and `key`; `build` fills it when it is not there or not complete.

    Two processes that ask for one entry make it once: the second waits for the first. `nbytes` is what
    `build` is going to write, and held against the free space beforehand. Raises `LoadError` when the entry
    cannot be made.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:80] or "entry"
    target = cache_root() / f"{plain}-{key[:16]}"
    while True:
        recover(target)
        if _is_complete(target):
            return target
        try:
            with atomic_folder(target, overwrite=True) as folder:
                _check_space(folder, nbytes)
                build(folder)
        except BusyError:
            time.sleep(_POLL_SECONDS)
        except SaveError as error:
            raise LoadError(f"{error} (MOESTRO_CACHE names another folder for the cache)") from None


def _is_complete(target: Path) -> bool:
    try:
        verify_folder(target)
    except LoadError:
        return False
    return True


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise SaveError(f"{folder.parent}: {nbytes} bytes are needed and {free} are free")


def file_key(path: Path) -> str:
    """A sha256 over a file's size, time of change, first mebibyte and 32 samples: fast for files of any size.

    The time is part of it because samples alone could miss an edit in place.
    """
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        digest = hashlib.sha256(json.dumps([VERSION, status.st_size, status.st_mtime_ns]).encode())
        digest.update(file.read(1 << 20))
        last = max(status.st_size - _SAMPLE_BYTES, 0)
        for number in range(_NUM_SAMPLES):
            file.seek(last * number // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def convert_gguf(path: Path) -> Path:
    """A Hugging Face folder (config, tokenizer, float32 safetensors) for a GGUF file, made at the first call.

    Raises `LoadError` or `FamilyError` when the file is damaged or of an unknown architecture.
    """

    def build(folder: Path) -> None:
        source = GGUFSource(path)
        _check_space(folder, sum(map(source.nbytes, source.keys())))
        (folder / "config.json").write_text(json.dumps(source.config, indent=2) + "\n")
        write_tokenizer(source.header, folder)
        write_source(source, folder)
        source.close()

    return cached_folder(path.name.removesuffix(".gguf"), file_key(path), build)
