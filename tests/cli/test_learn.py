"""`moestro learn`: from a recorded trace to a folder that a serving method names."""

from pathlib import Path

import pytest
import torch

from moestro.cli import main
from moestro.core.trace import trace
from moestro.methods.serve._parts.route_predictor import load
from moestro.models.load import load as load_model
from moestro.testing.tiny import VOCAB, tiny_folder


def record(folder: Path) -> Path:
    tiny_folder("qwen3_moe", folder / "model", head_dim=16)
    model = load_model(folder / "model")
    tokens = torch.randint(3, VOCAB, (10, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), trace(model, folder / "run.trace"):
        model(input_ids=tokens)
    return folder / "run.trace"


def test_a_predictor_from_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded, out = record(tmp_path), tmp_path / "out"
    arguments = ["learn", "expertflow", str(recorded), str(out), "--dim", "16", "--heads", "2", "--epochs", "3"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "token_table_recall: " in printed
    assert f"saved {out}" in printed
    first = load(out)
    assert first.header.dim == 16
    assert main(arguments) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--seed", "1", "--json"]) == 0
    assert '"predictor_recall": ' in capsys.readouterr().out
    assert load(out).header.settings["seed"] == 1
    assert (first.weights["head"] != load(out).weights["head"]).any()


def test_what_cannot_work_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for arguments, told in (
        (["expertflow", str(tmp_path / "none"), str(out)], "no such trace"),
        (["expertflow", str(tmp_path / "none"), str(out), "--heads", "3"], "multiple of 6"),
        (["lru", str(tmp_path / "none"), str(out)], "No such command"),
    ):
        assert main(["learn", *arguments]) == 2
        assert told in capsys.readouterr().err
    assert not out.exists()


def test_it_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learn", "--help"]) == 0
    assert "expertflow" in capsys.readouterr().out
    assert main(["learn", "expertflow", "--help"]) == 0
    assert "--window" in capsys.readouterr().out
