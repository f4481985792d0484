"""`moestro eval`: one model as before, several side by side, what they write, files for the report."""

import json
from pathlib import Path

import pytest

from moestro.cli import main
from moestro.data.tokens import byte_tokenizer
from moestro.testing.tiny import tiny_folder


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    for seed, name in enumerate(("first", "second")):
        tiny_folder("llama", tmp_path / name, vocab_size=300, seed=seed)
        byte_tokenizer().save_pretrained(tmp_path / name)
    return [str(tmp_path / "first"), str(tmp_path / "second")]


def test_models_and_texts_side_by_side(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, other, out = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "eval"
    text.write_text("To be, or not to be, that is the question. " * 3)
    other.write_text("Sein oder Nichtsein, das ist hier die Frage. " * 3)
    flags = ["--context", "32", "--data", str(text), "--data", str(other)]
    asked = ["--prompt", "To be", "--prompt", "Sein", "--new-tokens", "3", "--out", str(out)]
    assert main(["eval", *models, *flags, *asked, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["data"]) for row in said["rows"]] == [(m, str(t)) for m in models for t in (text, other)]
    assert [(one["model"], one["prompt"]) for one in said["samples"]] == [
        (m, p) for m in models for p in ("To be", "Sein")
    ]
    for row in said["rows"]:  # what each is alone
        assert main(["eval", row["model"], "--context", "32", "--data", row["data"], "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == row
    table = json.loads((out / "comparisons.json").read_text())
    assert [line["model"] for line in table["rows"]] == models
    assert table["rows"][1][f"perplexity, {other}"] == said["rows"][3]["perplexity"]
    page = tmp_path / "report.html"
    assert main(["report", str(out), "-o", str(page)]) == 0
    assert f"perplexity, {other}" in page.read_text()


def test_texts_are_read_before_a_model_is_opened(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", models[0], "./no/model", "--data", "builtin:german", "--data", "./no/text"]) == 2
    assert "./no/text: no such data file" in capsys.readouterr().err
