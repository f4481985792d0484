"""`moestro compress`: data in, coverage printed and kept, a smaller model out."""

import json
from pathlib import Path

import pytest
import torch

import moestro
from moestro.cli import main
from moestro.core.layer import mixture_layers
from moestro.data.tokens import byte_tokenizer
from moestro.testing.tiny import tiny_folder


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    tiny_folder("olmoe", tmp_path / "parent", vocab_size=300)
    byte_tokenizer().save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("prune_experts", ["--keep", "4", "--criterion", "reap", "--policy", "raised", "--raise-to", "4"]),
        ("merge_experts", ["--keep", "0.5"]),
        ("uncurl", ["--keep", "3"]),
    ],
)
def test_a_smaller_model_from_the_command_line(
    method: str, flags: list[str], parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = parent.parent / "out"
    data = ["--data", "builtin:stdlib-docs", "--tokens", "400"]
    assert main(["compress", method, str(parent), str(out), *flags, *data]) == 0
    told = capsys.readouterr().out
    assert "calibration: 400 tokens, policy" in told
    assert "smallest" in told
    assert "rows written" in told
    model = moestro.load(out)
    wanted = 4 if method == "prune_experts" else 3
    assert [layer.bank.num_experts for layer in mixture_layers(model).values()] == [wanted] * 2
    receipt = json.loads((out / "receipt.json").read_text())
    (surgery,) = receipt["surgery"] if "surgery" in receipt else receipt["facts"]["surgery"]
    note = surgery["notes"]["calibration"]
    assert note["tokens"] == 400
    assert [len(row["tokens"]) for row in note["layers"]] == [6, 6]
    chosen = 4 if method == "prune_experts" else 3
    assert [sum(row["tokens"]) for row in note["layers"]] == [400 * chosen] * 2
    assert [sum(row["natural_tokens"]) for row in note["layers"]] == [1200] * 2
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_missing_data_and_too_few_experts_are_one_line(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = parent.parent / "out"
    assert main(["compress", "prune-experts", str(parent), str(out)]) == 2
    assert "measures experts on data with these settings; give calibration data" in capsys.readouterr().err
    assert main(["compress", "prune-experts", str(parent), str(out), "--criterion", "random", "--keep", "2"]) == 2
    assert "each token chooses 3; keep at least 3" in capsys.readouterr().err
    assert not out.exists()
