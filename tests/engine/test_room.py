"""Where the bytes of a packed model go."""

from pathlib import Path

import pytest

from moestro.core.errors import ConfigError
from moestro.engine import room
from moestro.engine.open_native import Native
from moestro.engine.pack import pack_model
from moestro.engine.packed import EXPERTS, Packed
from moestro.testing.tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("room") / "model"
    wide = {"moe_intermediate_size": 2048, "num_experts": 8, "max_position_embeddings": 256}
    tiny_folder("qwen3_moe", path, head_dim=16, **wide)
    pack_model(path, path.parent / "packed", bits=8)
    return path.parent / "packed"


def test_the_sums_are_those_of_the_engine(folder: Path) -> None:
    packed = Packed.open(folder)
    found = room.room(packed, 1 << 30, 64, process=50 << 20)
    assert found.weights == sum(piece.nbytes for piece in packed.tensors.values())
    assert found.budget + found.needed == 1 << 30
    assert (found.slots, found.held, found.disk) == (16, found.experts, 0)
    largest = max(there.stride for there in packed.experts.values())
    few = room.room(packed, found.needed + 5 * largest + 7, 64, process=50 << 20)
    assert (few.slots, few.held, few.disk) == (5, 5 * largest, few.experts - 5 * largest)
    assert few.disk == (folder / EXPERTS).stat().st_size - 5 * largest
    native = Native(folder, 1 << 36, context=64)  # a limit that this process, full of PyTorch, is below
    assert native.forward.page_bytes * native.forward.pages == found.cache
    assert native.budget == native.room.budget == (1 << 36) - native.room.needed
    native.close()


def test_what_does_not_fit_is_refused_with_what_would(folder: Path) -> None:
    packed = Packed.open(folder)
    with pytest.raises(ConfigError, match=r"1,000 bytes are too few: .*give more memory \([\d,]+ at least\)") as error:
        room.room(packed, 1000, 64, process=0)
    least = int(str(error.value).split("give more memory (")[1].split(" ")[0].replace(",", ""))
    assert room.room(packed, least, 64, process=0).slots == 2
    with pytest.raises(ConfigError):
        room.room(packed, least - 1, 64, process=0)


def test_a_longer_context_leaves_room_for_fewer_experts(folder: Path) -> None:
    packed = Packed.open(folder)
    short, long = (room.room(packed, 1 << 30, context, process=0) for context in (64, 256))
    assert long.cache == 4 * short.cache
    assert long.budget == short.budget - 3 * short.cache
