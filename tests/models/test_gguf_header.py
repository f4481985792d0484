"""GGUF headers: good files are read exactly; hostile ones are refused fast, before a size of theirs is
believed.
"""

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.core.errors import LoadError
from moestro.models.gguf_header import read_gguf_header


U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
SETTINGS = settings(max_examples=150)


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str | bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def build(
    entries: list[bytes] = (),
    infos: list[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    num_tensors, num_entries = counts or (len(infos), len(entries))
    content = magic + struct.pack("<IQQ", version, num_tensors, num_entries) + b"".join(entries) + b"".join(infos)
    return content + b"\0" * (-len(content) % alignment) + data


ARCH = entry("general.architecture", STRING, text("llama"))
GOOD = build(
    [
        ARCH,
        entry("a.int", U32, struct.pack("<I", 7)),
        entry("a.float", F32, struct.pack("<f", 0.5)),
        entry("a.flag", BOOL, b"\1"),
        entry("a.words", ARRAY, struct.pack("<IQ", STRING, 2) + text("one") + text("zwölf")),
        entry("a.numbers", ARRAY, struct.pack("<IQ", F32, 3) + struct.pack("<3f", 1, 2, 3)),
    ],
    [info("x", [4, 2]), info("y", [32], 8, 32)],
    b"\1" * 32 + b"\2" * 34,
)


def read(content: bytes, folder: Path) -> Any:
    path = folder / "x.gguf"
    path.write_bytes(content)
    return read_gguf_header(path)


def test_a_good_file_is_read_exactly(tmp_path: Path) -> None:
    header = read(GOOD, tmp_path)
    numbers = header.metadata.pop("a.numbers")
    assert numbers.tolist() == [1, 2, 3]
    assert header.metadata == {
        "general.architecture": "llama",
        "a.int": 7,
        "a.float": 0.5,
        "a.flag": True,
        "a.words": ["one", "zwölf"],
    }
    x, y = header.tensors["x"], header.tensors["y"]
    assert (x.type_name, x.shape, x.nbytes) == ("F32", (2, 4), 32)
    assert (y.type_name, y.shape, y.nbytes) == ("Q8_0", (32,), 34)
    assert GOOD[x.start : x.start + x.nbytes] == b"\1" * 32
    assert GOOD[y.start : y.start + y.nbytes] == b"\2" * 34


def test_a_file_of_the_packages_writer_is_read_as_its_reader_does(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "w.gguf"), "llama")
    writer.add_custom_alignment(64)
    writer.add_array("some.tokens", ["a", "b"])
    writer.add_float64("some.double", 0.1)
    writer.add_int64("some.long", -5)
    writer.add_tensor("a", np.ones((3, 5), np.float32))
    writer.add_tensor(
        "b", gguf.quants.quantize(np.ones((2, 256), np.float32), gguf.GGMLQuantizationType.Q8_0), raw_dtype=8
    )
    writer.add_tensor("c", np.ones(7, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header, peer = read_gguf_header(tmp_path / "w.gguf"), gguf.GGUFReader(tmp_path / "w.gguf")
    for tensor in peer.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.start, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert ours.type == tensor.tensor_type
    for key, value in header.metadata.items():
        assert peer.fields[key].contents() == value


BAD = {
    "empty": (b"", "0 bytes are too few"),
    "not GGUF": (build(magic=b"GGML", data=b"\0" * 32), "does not begin with GGUF"),
    "version 1": (build(version=1), "is GGUF version 1"),
    "version 4": (build(version=4), "is GGUF version 4"),
    "big-endian": (build(version=3 << 24), "big-endian"),
    "2^63 tensors": (build(counts=(1 << 63, 0)), "claims 9223372036854775808 tensors"),
    "2^63 entries": (build(counts=(0, 1 << 63)), "claims 9223372036854775808 metadata entries"),
    "more tensors than bytes": (build(counts=(100, 0)), "claims 100 tensors"),
    "a key of 2^62 bytes": (build([struct.pack("<Q", 1 << 62) + b"\0" * 32]), "a metadata key claims"),
    "a key behind the end": (build([struct.pack("<Q", 900) + b"\0" * 32]), "needs 900 bytes"),
    "a key that is not UTF-8": (build([entry(b"\xff\xfe", U8, b"\0")]), "a metadata key is not UTF-8"),
    "a key twice": (build([ARCH, ARCH]), "'general.architecture' stands there twice"),
    "an unknown value type": (build([entry("k", 13, b"\0" * 8)]), "'k' has the unknown type 13"),
    "a truth value of 2": (build([entry("k", BOOL, b"\2")]), "'k' is a truth value of 2"),
    "a string of 2^63 bytes": (build([entry("k", STRING, struct.pack("<Q", 1 << 63))]), "'k' claims"),
    "an array of 2^62 bytes": (build([entry("k", ARRAY, struct.pack("<IQ", U8, 1 << 62))]), "'k' claims"),
    "an array of 2^23 numbers": (
        build([entry("k", ARRAY, struct.pack("<IQ", U64, 1 << 23))]),
        "needs 67108864 bytes",
    ),
    "an array of 2^40 strings": (
        build([entry("k", ARRAY, struct.pack("<IQ", STRING, 1 << 40))]),
        "claims 1099511627776",
    ),
    "an array of arrays": (
        build([entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + b"\0" * 12)]),
        "unknown type 9",
    ),
    "a string in an array that is cut": (
        build([entry("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + struct.pack("<Q", 1 << 60))]),
        "'k': a string of 1152921504606846976 bytes",
    ),
    "a string in an array that is not UTF-8": (
        build([entry("k", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"\xc3"))]),
        "'k': string 0 is not UTF-8",
    ),
    "alignment 3": (build([entry("general.alignment", U32, struct.pack("<I", 3))]), "must be a power of two"),
    "alignment 0": (build([entry("general.alignment", U32, struct.pack("<I", 0))]), "must be a power of two"),
    "alignment 2^31": (
        build([entry("general.alignment", U32, struct.pack("<I", 1 << 31))]),
        "must be a power of two",
    ),
    "alignment as text": (build([entry("general.alignment", STRING, text("32"))]), "must be a power of two"),
    "a tensor without a name": (build([], [info("", [4])], b"\0" * 16), "the name is empty"),
    "a tensor name with a line break": (build([], [info("a\nb", [4])], b"\0" * 16), "cannot be printed"),
    "no dimensions": (build([], [info("x", [])], b"\0" * 32), "'x' has 0 dimensions"),
    "five dimensions": (build([], [info("x", [1] * 5)], b"\0" * 16), "'x' has 5 dimensions"),
    "2^32 - 1 dimensions": (
        build([], [text("x") + struct.pack("<I", (1 << 32) - 1) + b"\0" * 32], b"\0" * 16),
        "'x' has 4294967295 dimensions",
    ),
    "a dimension of 0": (build([], [info("x", [0, 4])], b"\0" * 16), "with nothing in it"),
    "a product that overflows to 16": (
        build([], [info("x", [1 << 32, 1 << 32, 4])], b"\0" * 16),
        "asks for more than",
    ),
    "an unknown type": (build([], [info("x", [32], 99)], b"\0" * 64), "ggml type 99 cannot be dequantised"),
    "a type without a dequantiser": (build([], [info("x", [32], 9)], b"\0" * 64), "ggml type 9 cannot"),
    "rows that are not whole blocks": (
        build([], [info("x", [33], 8)], b"\0" * 64),
        "rows of 33 are not whole Q8_0",
    ),
    "beyond the end": (build([], [info("x", [4], 0, 32)], b"\0" * 32), "the file is cut"),
    "an offset of 2^64 - 32": (build([], [info("x", [4], 0, (1 << 64) - 32)], b"\0" * 32), "the file is cut"),
    "an offset that is not aligned": (build([], [info("x", [4], 0, 8)], b"\0" * 32), "not a multiple of 32"),
    "overlap": (build([], [info("x", [16]), info("y", [4], 0, 32)], b"\0" * 64), "inside the one before it"),
    "a hole": (build([], [info("x", [4]), info("y", [4], 0, 128)], b"\0" * 144), "a hole of"),
    "a tensor twice": (
        build([], [info("x", [4]), info("x", [4], 0, 32)], b"\0" * 48),
        "'x' stands there twice",
    ),
    "something behind the end": (
        build([], [info("x", [4])], b"\0" * 16 + b"PK\3\4" * 20),
        "the tensors end at byte",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_hostile_file_is_refused_fast_with_one_line(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    (tmp_path / "x.gguf").write_bytes(content)
    start = time.process_time()
    with pytest.raises(LoadError) as caught:
        read_gguf_header(tmp_path / "x.gguf")
    took = time.process_time() - start
    assert message in str(caught.value)
    assert "x.gguf" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert took < 0.05


@pytest.fixture(scope="module", autouse=True)
def _package_is_loaded() -> None:
    # The first look at a tensor type imports the `gguf` package; the times above are without that.
    from moestro.models.gguf_header import quant_type

    quant_type(0, "")


@pytest.mark.parametrize("part", range(64))
def test_a_file_cut_at_any_64th_is_refused(tmp_path: Path, part: int) -> None:
    with pytest.raises(LoadError):
        read(GOOD[: len(GOOD) * part // 64], tmp_path)


def survives(content: bytes, folder: Path) -> None:
    """A header that holds, or `LoadError` in one line; nothing else, and nothing that points out of the
    file.
    """
    try:
        header = read(content, folder)
    except LoadError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert all(t.start >= 0 and t.start + t.nbytes <= len(content) for t in header.tensors.values())
    assert len(refusal.splitlines()) <= 1
    assert refusal.encode() is not None


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD)
    for place, value in changes:
        content[place] = value
    survives(bytes(content), tmp_path_factory.getbasetemp())


@SETTINGS
@given(st.integers(0, len(GOOD)), st.binary(min_size=1, max_size=32), st.integers(0, 40))
def test_inserted_and_deleted_bytes(
    tmp_path_factory: pytest.TempPathFactory, place: int, extra: bytes, dropped: int
) -> None:
    survives(GOOD[:place] + extra + GOOD[place + dropped :], tmp_path_factory.getbasetemp())


numbers = st.integers(0, 64) | st.integers(0, (1 << 64) - 1)
kinds = st.integers(0, 42) | st.integers(0, (1 << 32) - 1)
infos = st.builds(info, st.text(max_size=4), st.lists(numbers, max_size=5), kinds, numbers)
entries = st.builds(entry, st.sampled_from(["general.alignment", "a", "b"]), kinds, st.binary(max_size=24))


@SETTINGS
@given(st.lists(entries, max_size=4), st.lists(infos, max_size=4), st.binary(max_size=256))
def test_structured_files(
    tmp_path_factory: pytest.TempPathFactory, some: list[bytes], tensors: list[bytes], data: bytes
) -> None:
    survives(build(some, tensors, data), tmp_path_factory.getbasetemp())
