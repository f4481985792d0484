"""A packed model under a memory limit: the same bits whether its experts are resident or come and go."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moestro
from moestro.core.errors import ConfigError, LoadError
from moestro.engine import room
from moestro.engine.open_native import Native
from moestro.engine.pack import pack_model
from moestro.engine.packed import EXPERTS, Packed
from moestro.testing.tiny import tiny_folder


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process holds PyTorch; a serving one does not, and tiny models need no working space."""
    monkeypatch.setattr(room, "resident_set", lambda: 0)
    monkeypatch.setattr(room, "working_bytes", lambda model: 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_folder("qwen3_moe", tmp_path / "model", head_dim=16)
    return tmp_path / "model"


def packed(folder: Path, bits: int) -> Path:
    out = folder.parent / f"packed-{bits}"
    pack_model(folder, out, bits=bits)
    return out


def batch(ids: list[int], start: int = 0) -> Any:
    count = len(ids)
    return SimpleNamespace(
        tokens=np.array(ids, np.int32),
        positions=np.arange(start, start + count, dtype=np.int32),
        rows_of=np.zeros(count, np.int32),
        sequences=[0],
        tables=np.arange(4, dtype=np.int32)[None],
        want=np.arange(count, dtype=np.int32),
        routes=None,
    )


IDS = [3, 17, 4, 22, 9, 1, 30, 5]


def needs(out: Path, experts: float) -> int:
    """Memory for all that is no expert, 64 positions, and this many of the largest experts."""
    opened = Packed.open(out)
    largest = max(there.stride for there in opened.experts.values())
    model = opened.model
    kept = len(model.layers) * 4 * 2 * 16 * model.kv_heads * model.head_dim * 4
    return kept + sum(piece.nbytes for piece in opened.tensors.values()) + int(experts * largest)


def test_float32_is_what_transformers_says(folder: Path) -> None:
    model = moestro.load(folder)
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0].numpy()
    native = Native(packed(folder, 32), 1 << 30, context=64)
    assert native.store is None
    shape = Packed.open(folder.parent / "packed-32").model
    assert native.forward.page_bytes == len(shape.layers) * 2 * 16 * shape.kv_heads * shape.head_dim * 4  # as budgeted
    found = native.forward.step(batch(IDS))
    native.close()
    assert np.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("policy", ["serve.lru", "serve.lfu", "serve.lfru", "serve.next_need"])
def test_few_slots_change_no_bit(bits: int, policy: str, folder: Path) -> None:
    out = packed(folder, bits)
    whole = Native(out, 1 << 30, context=64)
    few = Native(out, needs(out, 2), context=64, policy=policy)
    assert whole.store is None
    assert few.store is not None
    for start, ids in ((0, IDS), (8, [7]), (9, [7]), (10, [2, 8, 30])):
        assert np.array_equal(whole.forward.step(batch(ids, start)), few.forward.step(batch(ids, start)))
        held = sum(entry.slot.nbytes for entry in few.store._entries.values())
        assert held <= few.budget
    counted = few.counters()
    assert counted["misses"] > 0
    assert counted["bytes"] >= counted["misses"] * min(there.stride for there in few.store.packed.experts.values())
    assert whole.counters() == {}
    whole.close()
    few.close()


def test_too_little_memory_is_told_before_anything_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = packed(folder, 8)
    monkeypatch.setattr(Packed, "resident", lambda self: pytest.fail("read"))
    with pytest.raises(ConfigError, match=r"bytes are too few: the process 0, what every token needs [\d,]+, keys and"):
        Native(out, needs(out, 1), context=64)


def test_models_without_a_native_forward(tmp_path: Path) -> None:
    tiny_folder("gpt_oss", tmp_path / "model")
    with pytest.raises(LoadError, match="no native forward for this model"):
        Native(packed(tmp_path / "model", 8), 1 << 30)


def test_neither_torch_nor_transformers_is_imported(folder: Path) -> None:
    out = packed(folder, 8)
    code = (
        "import sys; from pathlib import Path; from moestro.engine.open_native import Native;"
        f"native = Native(Path({str(out)!r}), 1 << 30, context=64); native.close();"
        "print(*sorted({'torch', 'transformers', 'pyarrow', 'scipy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
    assert (out / EXPERTS).stat().st_size > 0
