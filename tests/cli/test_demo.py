"""The demo on a tiny model: every step runs, and what it says of itself is what its files hold."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moestro.cli import main
from moestro.core.layer import mixture_layers
from moestro.data.tokens import byte_tokenizer
from moestro.models.atomic import verify_folder
from moestro.models.load import load


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_whole_job_on_a_tiny_model(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--model", str(tiny), "--out", str(out), "--layers", "last:2", "--steps", "2"]) == 0
    facts = json.loads((out / "demo.json").read_text())
    rows = facts["comparison"]
    assert [row["model"] for row in rows] == ["dense parent", "dense parent, trained", "mixture, trained"]
    assert rows[0]["parameters"] == rows[1]["parameters"] < rows[2]["parameters"]
    assert rows[1]["perplexity"] < rows[0]["perplexity"], "two steps from random weights must help"
    parity = facts["receipt"]["parity_of_exact_copies"]
    assert parity["as_routed"]["max_abs_diff"] <= 1e-5
    assert parity["all_on"]["max_abs_diff"] <= 1e-5
    assert facts["reloaded_logits_difference"] == 0.0
    assert list(mixture_layers(load(out / "model"))) == ["model.layers.1.mlp", "model.layers.2.mlp"]
    verify_folder(out / "model", deep=True)
    page = (out / "report.html").read_text()
    assert all(row["model"] in page for row in rows)
    assert f"{rows[2]['perplexity']}"[:4] in page
    said = capsys.readouterr()
    assert f"{rows[2]['perplexity']:8.3f}" in said.out


def test_an_existing_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_refused_model_leaves_no_folder(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--model", "wheel:no-such-model", "--out", str(out)]) == 2
    assert not out.exists()
    assert main(["demo", "--model", str(tiny), "--layers", "last:77", "--out", str(out)]) == 2
    assert not out.exists()
    assert main(["demo", "--model", str(tiny), "--out", str(tiny / "config.json" / "x")]) == 2
    assert "cannot be made" in capsys.readouterr().err
