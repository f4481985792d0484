"""`moestro pack`: the account, verification, errors of one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moestro.cli import main
from moestro.engine.packed import EXPERTS, Packed
from moestro.testing.tiny import tiny_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_folder("qwen3_moe", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


def test_a_model_is_packed_and_verified(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "packed"
    assert main(["pack", str(model), str(out), "--bits", "4", "--resident-bits", "8"]) == 0
    told = capsys.readouterr().out
    assert "ledger: 30 of 30 rows written" in told
    assert "experts in q4" in told
    assert f"saved {out}" in told
    packed = Packed.open(out)
    assert packed.tensors["layers.1.q"].layout == "q8"
    assert packed.tensors["layers.1.router"].layout == "f32"
    assert (out / "tokenizer.json").read_text() == "{}"
    assert main(["pack", str(out), "--verify"]) == 0
    assert "are what was written" in capsys.readouterr().out
    with (out / EXPERTS).open("r+b") as file:
        file.seek(100)
        file.write(b"\x00\x01")
    assert main(["pack", str(out), "--verify"]) == 2
    assert "the file is damaged" in capsys.readouterr().err
    assert main(["pack", str(model), str(out), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["expert_layouts"] == ["q8"]


def test_what_cannot_be_packed_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([str(model)], "name the folder to write"),
        ([str(model), "x", "--bits", "5"], "bits=5; matrices are packed in 4, 8, 16, 32 bits"),
        ([str(model), "x", "--verify"], "leave OUT away"),
        ([str(tmp_path / "nothing"), str(tmp_path / "out")], "nothing"),
        ([str(model), "--verify"], "pack.json: No such file"),
    ):
        assert main(["pack", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_reading_and_storing_need_neither_torch_nor_transformers(model: Path, tmp_path: Path) -> None:
    assert main(["pack", str(model), str(tmp_path / "packed")]) == 0
    code = f"""
import sys
from moestro.core.registry import method
from moestro.engine.describe import describe
from moestro.engine.packed import Packed
from moestro.engine.store import ExpertStore
packed = Packed.open({str(tmp_path / "packed")!r})
describe(packed, packed.resident())
lru = method("serve.lru")
with ExpertStore(packed, 1 << 20, lru.module.policy(lru.configure({{}}))) as store:
    with store.acquire(1, [0, 3]) as lease:
        print(sum(len(part) for part in lease.ready()))
print([name for name in ("torch", "transformers", "pyarrow", "scipy") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["2", "[]"]
