"""The reader of packed models: whatever its index says, no byte outside the files is read and nothing large is made."""

import contextlib
import copy
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.core.errors import LoadError
from moestro.engine.pack import pack_model
from moestro.engine.packed import EXPERTS, INDEX, RESIDENT, Packed
from moestro.testing.tiny import tiny_folder


Index = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed")
    tiny_folder("qwen2_moe", path / "model")
    pack_model(path / "model", path / "packed")
    return path / "packed"


@pytest.fixture
def index(folder: Path, tmp_path: Path) -> Callable[[Callable[[Index], Any]], Path]:
    """A copy of the folder whose index a function has changed in place."""
    whole = json.loads((folder / INDEX).read_text())
    Packed.open(folder)

    def change(how: Callable[[Index], Any]) -> Path:
        values = copy.deepcopy(whole)
        how(values)
        for name in (RESIDENT, EXPERTS):
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).hardlink_to(folder / name)
        (tmp_path / INDEX).write_text(json.dumps(values))
        return tmp_path

    return change


def put(*path: Any) -> Callable[[Index], None]:
    """Set the value at a path; the last item is the value."""

    def how(values: Index) -> None:
        place: Any = values
        for step in path[:-2]:
            place = place[step]
        place[path[-2]] = path[-1]

    return how


Q = ("tensors", "layers.0.q")
E = ("experts", "0")
HOSTILE: dict[str, tuple[Callable[[Index], Any], str]] = {
    "another format": (put("format", "gguf"), "format 'gguf' version 1; this version reads moestro-pack 1"),
    "another version": (put("version", 3), "pack the model again"),
    "no model": (lambda v: v.pop("model"), "has no model"),
    "unknown key": (put("extra", 1), "unknown key 'extra'"),
    "offset 2^63": (put(*Q, "offset", 1 << 63), "no whole number from 0 to 2"),
    "offset outside": (put(*Q, "offset", 1 << 40), "after the end"),
    "offset not aligned": (put(*Q, "offset", 64), "multiple of 4096"),
    "negative": (put(*Q, "offset", -4096), "no whole number"),
    "a boolean": (put(*Q, "nbytes", True), "no whole number"),
    "a float": (put(*Q, "nbytes", 4096.0), "no whole number"),
    "a text": (put(*Q, "offset", "0"), "no whole number"),
    "too few bytes": (put(*Q, "nbytes", 1), "takes 2112 bytes, pack.json says 1"),
    "overlap": (lambda v: v["tensors"]["layers.0.k"].update(offset=v["tensors"]["layers.0.q"]["offset"]), "overlaps"),
    "shape product": (put(*Q, "shape", [1 << 49, 1 << 49]), "too many"),
    "shape too deep": (put(*Q, "shape", [1] * 9), "no list of 1 to 8"),
    "empty shape": (put(*Q, "shape", []), "no list of 1 to 8"),
    "zero rows": (put(*Q, "shape", [0, 64]), "no whole number from 1"),
    "layout": (put(*Q, "layout", "q5"), "layout 'q5' of 2 axes"),
    "layout no text": (put(*Q, "layout", ["q8"]), "is not known"),
    "vector as matrix": (put(*Q, "layout", "vector"), "layout 'vector' of 2 axes"),
    "another file": (put(*Q, "file", "../../etc/passwd"), "is not in resident.bin"),
    "file entry": (put("files", "../x", {"size": 1, "sha256": "0" * 64}), "unknown key '../x'"),
    "file size": (put("files", RESIDENT, "size", 1), "has .* bytes, pack.json says 1"),
    "no hash": (put("files", EXPERTS, "sha256", 5), "no sha256"),
    "missing tensor": (lambda v: v["tensors"].pop("layers.1.v"), "layers.1.v' is missing"),
    "stray tensor": (lambda v: v["tensors"].update(x=v["tensors"].pop("final_norm")), "'final_norm' is missing"),
    "other shape": (put("model", "heads", 2), "the settings say"),
    "many experts": (put(*E, "num", 1 << 40), "after the end|overlaps"),
    "more experts": (put(*E, "num", 6), "after the end|6 experts|overlaps"),
    "stride": (put(*E, "stride", 4096), "ends at"),
    "part outside the slab": (put(*E, "parts", "down", "offset", 1 << 20), "ends at"),
    "part not aligned": (put(*E, "parts", "down", "offset", 8), "multiple of 64"),
    "parts overlap": (put(*E, "parts", "up", "offset", 0), "overlaps"),
    "no parts": (put(*E, "parts", {}), "the settings say"),
    "layers overlap": (lambda v: v["experts"]["2"].update(offset=v["experts"]["0"]["offset"]), "overlaps"),
    "dense layer with experts": (lambda v: v["experts"].update({"1": v["experts"].pop("2")}), "the settings say"),
    "layer number": (lambda v: v["experts"].update({"00": v["experts"].pop("0")}), "no number of a layer"),
    "layer name": (lambda v: v["experts"].update({"²": v["experts"].pop("0")}), "no number of a layer"),
    "top_k": (put("model", "layers", 0, "router", "top_k", 99), "top_k=99 of 5 experts"),
    "width": (put("model", "hidden", 1 << 40), "less than or equal"),
    "kind": (put("model", "layers", 0, "router", "kind", "soft"), "softmax_topk"),
    "layers": (put("model", "layers", [{}] * 70000), "at most 4096"),
    "a number as text": (put("model", "vocab", "97"), "valid integer"),
    "tensors a list": (put("tensors", []), "expected an object"),
    "a tensor a list": (put("tensors", "head", []), "expected an object"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_indices_are_refused_at_once(name: str, index: Any) -> None:
    how, words = HOSTILE[name]
    path = index(how)
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(LoadError, match=words):
            Packed.open(path)
        took, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
    assert took < 2


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "expected an object"),
        (b'{"a": 1, "a": 2}', "a key stands there twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[" * 200000, "nested too deeply|not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * ((16 << 20) + 1), "at most"),
    ],
)
def test_what_is_no_index_is_refused(raw: bytes, words: str, index: Any) -> None:
    path = index(lambda values: None)
    (path / INDEX).write_bytes(raw)
    with pytest.raises(LoadError, match=words):
        Packed.open(path)


def test_every_truncation_of_the_index_is_refused(index: Any) -> None:
    path = index(lambda values: None)
    whole = (path / INDEX).read_bytes()
    for part in range(64):
        (path / INDEX).write_bytes(whole[: len(whole) * part // 64])
        with pytest.raises(LoadError):
            Packed.open(path)


def test_random_changes_never_do_worse_than_an_error(index: Any) -> None:
    """Every value of the index, one after another, becomes something else."""
    rng = np.random.default_rng(0)
    odd = [None, True, -1, 0, 1 << 70, 1.5, "", "x", [], {}, [1], {"a": 1}]
    path = index(lambda values: None)
    whole = json.loads((path / INDEX).read_text())
    places = list(leaves(whole))
    opened = 0
    for number in rng.choice(len(places), 400, replace=False):
        values = copy.deepcopy(whole)
        put(*places[number], odd[rng.integers(len(odd))])(values)
        (path / INDEX).write_text(json.dumps(values))
        with contextlib.suppress(LoadError):
            Packed.open(path)
            opened += 1
    assert opened < 150  # notes, names and switches may become another valid value


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from leaves(inner, (*path, key))


def test_truncated_and_damaged_files_are_found(index: Any) -> None:
    path = index(lambda values: None)
    packed = Packed.open(path)
    for name in (RESIDENT, EXPERTS):
        whole = (path / name).read_bytes()
        (path / name).unlink()
        (path / name).write_bytes(whole[:-1])
        with pytest.raises(LoadError, match=f"{name}: has {len(whole) - 1} bytes"):
            Packed.open(path)
        damaged = bytearray(whole)
        damaged[len(whole) // 3] ^= 4
        (path / name).write_bytes(damaged)
        with pytest.raises(LoadError, match=rf"{name}: its content .* damaged"):
            packed.verify()
        (path / name).write_bytes(whole)
    assert packed.verify() == sum(size for size, _ in packed.files.values())
    (path / RESIDENT).write_bytes(b"")
    with pytest.raises(LoadError, match=r"ends at .* bytes early"):
        packed.resident()
    (path / RESIDENT).unlink()
    (path / RESIDENT).mkdir()
    with pytest.raises(LoadError, match="not a regular file"):
        Packed.open(path)


def test_resident_tensors_are_aligned_and_slabs_addressed(folder: Path) -> None:
    packed = Packed.open(folder)
    some = packed.resident(["embedding", "layers.1.q"])
    assert [data.ctypes.data % 4096 for data in some.values()] == [0, 0]
    assert some["layers.1.q"].size == packed.tensors["layers.1.q"].nbytes
    offset, size = packed.slab(2, 3)
    assert offset == packed.experts[2].offset + 3 * size
    with pytest.raises(IndexError, match="layer 2 has no expert 5; it has 0 to 4"):
        packed.slab(2, 5)
