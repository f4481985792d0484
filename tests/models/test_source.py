"""Tensor sources: what they hand out is what was saved, views never write through, and headers are checked
first.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from moestro.core.errors import LoadError
from moestro.models.source import (
    DTYPES,
    MemorySource,
    SafetensorsSource,
    TensorSource,
    fingerprint,
)
from moestro.models.writer import write_source


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(40, 30, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "big": torch.randn(300, 100, generator=generator),
    }


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    weight_map = {}
    for number, key in enumerate(tensors, 1):
        name = f"model-{number:05}-of-{len(tensors):05}.safetensors"
        save_file({key: tensors[key]}, folder / name)
        weight_map[key] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def sources(folder: Path) -> list[TensorSource]:
    tensors = example()
    for name in ("one", "shards"):
        (folder / name).mkdir()
    save_file(tensors, folder / "one" / "model.safetensors", metadata={"format": "pt"})
    sharded(folder / "shards", tensors)
    return [
        SafetensorsSource(folder / "one"),
        SafetensorsSource(folder / "one" / "model.safetensors"),
        SafetensorsSource(folder / "shards"),
        MemorySource(tensors),
    ]


def test_every_source_hands_out_the_same_tensors(tmp_path: Path) -> None:
    tensors = example()
    for source in sources(tmp_path):
        assert isinstance(source, TensorSource)
        assert sorted(source.keys()) == sorted(tensors)
        for key, tensor in tensors.items():
            assert source.shape(key) == tuple(tensor.shape)
            assert source.dtype(key) == tensor.dtype
            assert source.nbytes(key) == tensor.numel() * tensor.dtype.itemsize
            assert torch.equal(source.get(key), tensor)
        source.close()
        assert torch.equal(source.get("w"), tensors["w"])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_survives_a_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(48, dtype=torch.uint8).remainder(2).view(dtype if dtype.itemsize > 1 else torch.uint8)
    tensor = tensor if dtype.itemsize > 1 else tensor.view(dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    found = SafetensorsSource(tmp_path / "x.safetensors").get("x")
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_a_view_costs_no_copy_and_never_reaches_the_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    source = SafetensorsSource(tmp_path)
    first, second = source.get("w"), source.get("w")
    assert first.data_ptr() == second.data_ptr()  # both look at the mapped file
    first.mul_(3)
    source.close()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert first.sum() == 3000  # stays valid after close
    assert SafetensorsSource(tmp_path).get("w").sum() == 1000


def test_tensors_that_are_not_aligned_are_read_right(tmp_path: Path) -> None:
    # The library sorts by type size; a hand-made file need not.
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    data = bytes([1, 2, 3]) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + data)
    assert SafetensorsSource(tmp_path / "x.safetensors").get("b").tolist() == [1.5, -2.0]


def test_a_file_that_changes_under_the_source_is_noticed(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 500)
    with pytest.raises(LoadError, match="has 500 now"):
        source.get("w")


def test_an_unknown_tensor_names_the_nearest(tmp_path: Path) -> None:
    for source in sources(tmp_path):
        for ask in (source.get, source.shape, source.dtype, source.nbytes):
            with pytest.raises(LoadError, match="holds no tensor 'scaler'; the nearest is 'scalar'"):
                ask("scaler")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(2)})
    save_file({"b": torch.zeros(2), "a": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(LoadError, match=r"'a' is in model-00001-of-00002\.safetensors and in model-00002"):
        SafetensorsSource(tmp_path)


def test_memory_refuses_types_no_file_can_hold() -> None:
    with pytest.raises(LoadError, match="complex128"):
        MemorySource({"z": torch.zeros(2, dtype=torch.complex128)})


def test_fingerprints_see_names_types_shapes_and_contents_but_not_containers(tmp_path: Path) -> None:
    prints = {fingerprint(source) for source in sources(tmp_path)}
    assert len(prints) == 1
    tensors = example()

    def of(change: dict[str, torch.Tensor], full: bool = False) -> str:
        return fingerprint(MemorySource({**tensors, **change}), full=full)

    assert of(dict(reversed(tensors.items()))) in prints
    changed = [
        of({"new": torch.zeros(1)}),
        of({"w": tensors["w"].reshape(30, 40)}),
        of({"bytes": tensors["bytes"].to(torch.int8)}),
        of({"scalar": torch.tensor(1.25)}),
        of({"big": tensors["big"] * 1.001}),
        of({"w": tensors["w"].t().contiguous().t() + 1e-3}),
    ]
    assert len(set(changed) | prints) == len(changed) + 1
    # One weight in the middle of a large tensor: only the full one promises to see it.
    touched = tensors["big"].clone()
    touched.view(-1)[1500] += 1
    assert of({"big": touched}, full=True) != of({}, full=True)


def test_a_fingerprint_is_stable_across_versions() -> None:
    # Written in traces and receipts: it must not change silently.
    assert (
        fingerprint(MemorySource({"a": torch.arange(4, dtype=torch.float32)}))
        == "28b947b66f2901f180325a3dd3f5c24cc7b99860618bd18a207e2cfbcaeb36f0"
    )


def test_save_and_memory_agree_on_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(save(example()))
    assert fingerprint(SafetensorsSource(tmp_path / "m.safetensors"), full=True) == fingerprint(
        MemorySource(example()), full=True
    )


@pytest.mark.parametrize("shard_bytes", [1 << 30, 9000, 1])
def test_any_source_can_be_written_whole_or_in_shards(tmp_path: Path, shard_bytes: int) -> None:
    tensors = example() | {"last": torch.arange(5, dtype=torch.uint8)}
    write_source(MemorySource(tensors), tmp_path, shard_bytes=shard_bytes)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == {1 << 30: 1, 9000: 3, 1: len(tensors)}[shard_bytes]
    assert (tmp_path / "model.safetensors.index.json").exists() == (len(files) > 1)
    found = SafetensorsSource(tmp_path)
    assert fingerprint(found, full=True) == fingerprint(MemorySource(tensors), full=True)
    assert found.metadata["format"] == "pt"
    # The library reads what we write.
    peer = {key: value for name in files for key, value in load_file(tmp_path / name).items()}
    assert peer.keys() == tensors.keys()
    assert all(torch.equal(peer[key], tensors[key]) for key in tensors)
