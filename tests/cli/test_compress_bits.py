"""`moestro compress finequant` and `mc_moe`: a model in, a packed one out, with what it took on the screen."""

import json
from pathlib import Path

import pytest
import torch

from moestro.cli import main
from moestro.core.layer import mixture_layers
from moestro.core.packed import PackedFFN
from moestro.core.plan import BitPlan
from moestro.data.tokens import byte_tokenizer
from moestro.models.load import load
from moestro.testing.tiny import tiny_folder


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    tiny_folder("qwen3_moe", tmp_path / "parent", vocab_size=300)
    byte_tokenizer().save_pretrained(tmp_path / "parent")
    (tmp_path / "texts.txt").write_text("Some words to calibrate on. " * 40)
    return tmp_path / "parent"


def test_finequant_never_opens_the_model(
    parent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plan = parent.parent / "out", parent.parent / "plan.json"
    monkeypatch.setattr("moestro.cli._stage_run._load", lambda request: pytest.fail("opened"))
    flags = ["--bits", "4", "--group-size", "16", "--plan", str(plan), "--no-compare"]
    assert main(["compress", "finequant", str(parent), str(out), *flags]) == 0
    told = capsys.readouterr().out
    assert "layer 1 down: 5 x int4:g16:f32" in told
    assert "ledger: 30 of 30 rows written" in told
    assert "experts: 32.000 bits a weight before, 6.400 after" in told
    assert "answers were not compared" in told
    assert len(BitPlan.load(plan).bits) == 30
    assert all(isinstance(layer.bank, PackedFFN) for layer in mixture_layers(load(out)).values())
    assert (out / "tokenizer_config.json").exists()


def test_mc_moe_calibrates_on_the_texts(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, texts = parent.parent / "out", str(parent.parent / "texts.txt")
    flags = ["--avg-bits", "2", "--group-size", "16", "--data", texts, "--tokens", "600"]
    assert main(["compress", "mc_moe", str(parent), str(out), *flags]) == 0
    told = capsys.readouterr().out
    assert "layer 2: bits " in told
    assert "choices of experts that changed: " in told
    receipt = json.loads((out / "receipt.json").read_text())["surgery"][0]
    assert receipt["rounding"]["method"] == "compress.mc_moe"
    assert [sum(note["bits"]) for note in receipt["notes"]["layers"]] == [10, 10]
    with torch.no_grad():
        assert load(out)(torch.arange(20)[None]).logits.isfinite().all()


def test_wishes_that_cannot_be_met_are_one_line(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = parent.parent / "out"
    assert main(["compress", "mc_moe", str(parent), str(out)]) == 2
    assert "compress.mc_moe measures experts on data" in capsys.readouterr().err
    assert main(["compress", "finequant", str(parent), str(out), "--group-size", "64"]) == 2
    assert "group_size=64 is wider than rows of 32 inputs" in capsys.readouterr().err
    assert main(["compress", "finequant", str(parent), str(out), "--group-size", "16"]) == 0
    assert main(["compress", "finequant", str(out), str(parent.parent / "again"), "--group-size", "16"]) == 2
    assert "packed ones are not packed again" in capsys.readouterr().err
    assert not (parent.parent / "again").exists()
