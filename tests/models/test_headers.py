"""Safetensors headers, indexes and configs: good ones are read exactly, each kind of bad one has its own
message.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moestro.core.errors import LoadError
from moestro.models.headers import (
    read_headers,
    read_safetensors_header,
    weight_files,
)
from moestro.models.safety import check_no_remote_code


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors file byte by byte; `header` may be bytes, and `length` may lie."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_good_file_is_read_as_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4, dtype=torch.int64),
        "scalar": torch.tensor(7, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_safetensors_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    assert header.size == (tmp_path / "x.safetensors").stat().st_size
    raw = (tmp_path / "x.safetensors").read_bytes()
    with safe_open(tmp_path / "x.safetensors", "pt") as reference:
        assert set(reference.keys()) == set(header.tensors)
        for name, info in header.tensors.items():
            assert info.shape == tuple(reference.get_slice(name).get_shape())
            assert info.dtype == reference.get_slice(name).get_dtype()
            flat = tensors[name].flatten().view(torch.uint8) if tensors[name].numel() else torch.zeros(0)
            assert raw[info.start : info.start + info.nbytes] == bytes(flat.tolist())


BAD = {
    "empty file": (b"", None, "0 bytes are too few"),
    "cut before the header ends": ({"a": entry()}, 10_000, "claims 10000 bytes but the file has"),
    "header length of 2^63": ({}, 1 << 63, "claims 9223372036854775808 bytes"),
    "header length just over the limit": ({}, 100_000_001, "claims 100000001 bytes"),
    "not JSON": (b"{" + b"x" * 20, None, "not valid JSON"),
    "not an object": (b"[1, 2, 3, 4, 5]", None, "does not begin with"),
    "leading space": (b' {"a": 1}', None, "does not begin with"),
    "not UTF-8": (b'{"\xff\xfe": 1}  ', None, "not UTF-8"),
    "nested a hundred thousand deep": (
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        None,
        "nested too deeply",
    ),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", None, "not valid JSON"),
    "NaN": (b'{"a": NaN, "b": 0}', None, "NaN is not JSON"),
    "the same tensor twice": (b'{"a": {}, "a": {}}', None, "'a' stands there twice"),
    "metadata with a number": ({"__metadata__": {"format": 1}}, None, "__metadata__"),
    "metadata not a map": ({"__metadata__": "pt"}, None, "__metadata__"),
    "an entry that is a list": ({"a": [1]}, None, "tensor 'a': needs exactly"),
    "an entry with a further field": ({"a": {**entry(), "more": 1}}, None, "tensor 'a': needs exactly"),
    "an entry without offsets": ({"a": {"dtype": "F32", "shape": [2]}}, None, "tensor 'a': needs exactly"),
    "an unknown type": ({"a": entry("F31")}, None, "type 'F31' is not one of"),
    "a type that is a list": ({"a": entry(["F32"])}, None, "is not one of"),
    "a negative dimension": ({"a": entry(shape=[-2])}, None, "whole numbers >= 0"),
    "a dimension of true": ({"a": entry(shape=[True, 2])}, None, "whole numbers >= 0"),
    "a fractional dimension": ({"a": entry(shape=[2.0])}, None, "whole numbers >= 0"),
    "a shape that is a number": ({"a": entry(shape=2)}, None, "whole numbers >= 0"),
    "a thousand dimensions": ({"a": entry(shape=[1] * 1000)}, None, "at most 16"),
    "a product that overflows": ({"a": entry(shape=[1 << 40, 1 << 40])}, None, "asks for more than"),
    "an overflow behind a zero": (
        {"a": entry(shape=[0, 1 << 40, 1 << 40], offsets=[0, 0])},
        None,
        "asks for more than",
    ),
    "a dimension of 2^64": ({"a": entry(shape=[1 << 64])}, None, "whole numbers >= 0"),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, None, "data_offsets must be"),
    "a negative offset": ({"a": entry(offsets=[-8, 0])}, None, "data_offsets must be"),
    "offsets the wrong way round": ({"a": entry(offsets=[8, 0])}, None, "hold -8"),
    "a shape that does not fit": ({"a": entry(shape=[3])}, None, "takes 12 bytes, but the offsets"),
    "beyond the end of the file": ({"a": entry(offsets=[8, 16])}, None, "the file is cut"),
    "a name with a line break": ({"a\nb": entry()}, None, "cannot be printed"),
    "a name with half a surrogate": (b'{"\\ud800": {"dtype": 1}}', None, "cannot be printed"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_fast_with_one_line(tmp_path: Path, case: str) -> None:
    header, length, message = BAD[case]
    path = tmp_path / "x.safetensors"
    if header == b"":
        path.write_bytes(b"")
    else:
        raw_file(path, header, b"\0" * 8, length)
    start = time.process_time()
    with pytest.raises(LoadError) as caught:
        read_safetensors_header(path)
    took = time.process_time() - start
    assert message in str(caught.value)
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))
    assert took < 0.05


def test_hole_overlap_and_trailing_bytes_are_told_apart(tmp_path: Path) -> None:
    def refused(second: list[int], data: int, message: str) -> None:
        path = raw_file(tmp_path / "x.safetensors", {"a": entry(), "b": entry(offsets=second)}, b"\0" * data)
        with pytest.raises(LoadError, match=message):
            read_safetensors_header(path)

    refused([4, 12], 12, "tensor 'b' overlaps the tensor before it: begins at byte 4, expected 8")
    refused([0, 8], 8, "overlaps")
    refused([12, 20], 20, "tensor 'b' leaves a hole before it: begins at byte 12, expected 8")
    refused([8, 16], 17, "the tensors end at byte")
    path = raw_file(tmp_path / "x.safetensors", {"b": entry(offsets=[8, 16]), "a": entry()}, b"\0" * 16)
    assert list(read_safetensors_header(path).tensors) == ["a", "b"]


def test_pipes_devices_folders_and_missing_files_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "missing", "no such file"),
        (Path("a\0b"), "cannot be opened"),
    ):
        with pytest.raises(LoadError, match=message):
            read_safetensors_header(path)


def sharded(folder: Path) -> dict[str, str]:
    """Two shards with two tensors each, and their index."""
    weight_map = {}
    for shard in (1, 2):
        name = f"model-{shard:05}-of-00002.safetensors"
        save_file({f"t{shard}{part}": torch.full((4,), float(shard)) for part in "ab"}, folder / name)
        weight_map |= {f"t{shard}{part}": name for part in "ab"}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_sharded_folder_is_checked_as_a_whole(tmp_path: Path) -> None:
    good = sharded(tmp_path)
    headers = read_headers(tmp_path)
    assert {name for header in headers.values() for name in header.tensors} == set(good)
    one, two = sorted(set(good.values()))
    cases = [
        (
            {**good, "t3": one},
            "tensor 't3' should be in model-00001-of-00002.safetensors by the index, but it is in no shard",
        ),
        (
            {**good, "t1a": two},
            "should be in model-00002-of-00002.safetensors by the index, but it is in model-00001",
        ),
        (
            {name: shard for name, shard in good.items() if name != "t1a"},
            "'t1a' is in .* in the index it is missing",
        ),
    ]
    for weight_map, message in cases:
        write_index(tmp_path, weight_map)
        with pytest.raises(LoadError, match=message):
            read_headers(tmp_path)
    save_file({"t1a": torch.zeros(4), "t2a": torch.zeros(4), "t2b": torch.zeros(4)}, tmp_path / two)
    write_index(tmp_path, good)
    with pytest.raises(
        LoadError,
        match=r"'t1a' is in model-00002-of-00002\.safetensors, but in the index it is in model-00001",
    ):
        read_headers(tmp_path)
    (tmp_path / two).unlink()
    with pytest.raises(LoadError, match="no such file"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "sub\\x.safetensors",
        "C:x.safetensors",
        "con.safetensors",
        "NUL.safetensors",
        ".x.safetensors",
        "x.bin",
        "x\n.safetensors",
        "",
    ],
)
def test_a_shard_path_cannot_lead_out_of_the_folder(tmp_path: Path, shard: str) -> None:
    write_index(tmp_path, {"a": shard})
    with pytest.raises(LoadError, match="is not a plain"):
        weight_files(tmp_path)


@pytest.mark.parametrize("weight_map", [[], {}, None, {"a": 3}, {"a": ["x.safetensors"]}])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(LoadError, match=r"index\.json"):
        weight_files(tmp_path)


def test_links_stay_inside_the_folder_or_the_hubs_own_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    for folder in (snapshot, blobs, tmp_path / "plain"):
        folder.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, blobs / "1234")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    assert list(read_headers(snapshot)["model.safetensors"].tensors) == ["a"]
    (tmp_path / "plain" / "model.safetensors").symlink_to(blobs / "1234")
    with pytest.raises(LoadError, match="is a link out of its folder"):
        read_headers(tmp_path / "plain")
    (tmp_path / "plain" / "model.safetensors").unlink()
    (tmp_path / "plain" / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(LoadError, match=r"no such file|no model\.safetensors"):
        read_headers(tmp_path / "plain")


def test_ambiguous_and_pickled_folders_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="is it a model folder"):
        weight_files(tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "x.pth", "last.ckpt"):
        (tmp_path / name).write_bytes(b"\x80\x04")
        with pytest.raises(LoadError, match=rf"{name}: a pickled checkpoint .* convert it to safetensors"):
            weight_files(tmp_path)
        (tmp_path / name).unlink()
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert weight_files(tmp_path) == [tmp_path / "one.safetensors"]
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(LoadError, match="2 safetensors files but no"):
        weight_files(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    write_index(tmp_path, {"a": "one.safetensors"})
    with pytest.raises(LoadError, match="holds both"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"]
)
@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"text_config": {"vision": [{"auto_map": "x"}]}},
        {"attn_implementation": "someone/kernel"},
        {"sub": {"_attn_implementation": {"": "someone/kernel"}}},
        {"_experts_implementation_internal": "someone/kernel"},
    ],
)
def test_remote_code_cannot_be_switched_on(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    (tmp_path / name).write_text(json.dumps(config))
    with pytest.raises(LoadError, match="never runs remote code"):
        check_no_remote_code(tmp_path)
    (tmp_path / name).write_text('{"model_type": "llama", "auto_map": null, "attn_implementation": "sdpa"}')
    check_no_remote_code(tmp_path)
