"""Mutated safetensors files: a reader answers with a header that holds or with `LoadError`, never with
anything else.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from moestro.core.errors import LoadError
from moestro.models.headers import SafetensorsHeader, read_headers, read_safetensors_header


GOOD = save(
    {
        "b": torch.arange(12.0).reshape(3, 4),
        "a": torch.zeros(5, dtype=torch.bfloat16),
        "c": torch.zeros(0, 2),
    },
    metadata={"format": "pt"},
)


def read(content: bytes) -> SafetensorsHeader | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        try:
            header = read_safetensors_header(path)
        except LoadError as error:
            refusal = str(error)
            header = None
    if header is None:
        # One line that any terminal or log can take.
        assert len(refusal.splitlines()) == 1
        assert refusal.encode()
        return None
    assert sum(info.nbytes for info in header.tensors.values()) == len(content) - 8 - int.from_bytes(
        content[:8], "little"
    )
    return header


def test_the_file_that_is_mutated_is_good() -> None:
    assert read(GOOD) is not None


@pytest.mark.parametrize("part", range(64))
def test_a_file_cut_at_any_64th_is_refused(part: int) -> None:
    assert read(GOOD[: len(GOOD) * part // 64]) is None


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes(changes: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD)
    for place, value in changes:
        content[place] = value
    read(bytes(content))


@given(st.integers(0, len(GOOD)), st.binary(min_size=1, max_size=16))
def test_inserted_bytes_never_pass(place: int, extra: bytes) -> None:
    # One byte more anywhere breaks the exact cover, whatever it is.
    if place != 0 or extra[0] != GOOD[0]:
        assert read(GOOD[:place] + extra + GOOD[place:]) is None


@given(st.binary(max_size=200))
def test_noise(content: bytes) -> None:
    read(content)
    read(len(content).to_bytes(8, "little") + content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F4", ""]) | json_values,
        "shape": st.lists(st.integers(-1, 5) | st.integers(), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(0, 64) | st.integers(), min_size=2, max_size=2) | json_values,
    }
)


@given(st.dictionaries(st.text(max_size=6), entries | json_values, max_size=5), st.binary(max_size=64))
def test_structured_headers(header: dict[str, object], data: bytes) -> None:
    content = json.dumps(header).encode()
    read(len(content).to_bytes(8, "little") + content + data)


@given(
    json_values | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=6), st.text() | json_values)})
)
def test_structured_indexes(index: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x.safetensors").write_bytes(GOOD)
        Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(LoadError):
            read_headers(Path(folder))
