"""`moestro papers` and `moestro methods`."""

import json

import pytest

from moestro.cli import main, papers
from moestro.core.registry import cards


def test_fifty_papers_with_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["papers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 50
    for row in rows:
        assert set(row) == {"key", "title", "arxiv", "methods", "study"}
    linked = {method for row in rows for method in row["methods"]}
    assert linked <= set(cards())


def test_a_method_shows_under_its_paper(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from moestro.core import registry
    from moestro.core.card import MethodCard

    card = MethodCard(title="t", year=2024, summary="s", taxonomy="gating/sparse", paper="adamoe")
    monkeypatch.setattr(registry, "cards", lambda: {"train.one": card, "train.two": card})
    rows = {row["key"]: row for row in papers.rows()}
    assert rows["adamoe"]["methods"] == ["train.one", "train.two"]
    assert rows["bam"]["methods"] == []
    assert main(["papers"]) == 0
    told = capsys.readouterr().out
    assert "open" in told
    assert "50 papers, 1 with a method" in told


def test_methods_have_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == list(cards())
    for row in rows:
        assert set(row) == {"id", "stage", "shape", "paper", "summary", "status", "taxonomy"}
        assert row["id"].startswith(f"{row['stage']}.")


def test_under_keeps_a_branch_of_the_map(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json", "--under", "gating/sparse"]) == 0
    kept = {row["id"] for row in json.loads(capsys.readouterr().out)}
    below = {i for i, card in cards().items() if f"{card.taxonomy}/".startswith("gating/sparse/")}
    assert kept == below


@pytest.mark.parametrize(
    ("arguments", "word"), [(["--under", "gating/spars"], "sparse"), (["--stage", "trian"], "train")]
)
def test_an_unknown_branch_or_stage_is_refused(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["methods", *arguments]) == 2
    told = capsys.readouterr().err
    assert word in told
    assert told.count("\n") == 1


def test_the_map_shows_every_place_and_what_is_open(capsys: pytest.CaptureFixture[str]) -> None:
    from moestro.core.papers import load_papers
    from moestro.core.taxonomy import taxonomy_paths

    assert main(["methods", "--map", "--json"]) == 0
    found = {row["path"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(found) == taxonomy_paths()
    assert {method for row in found.values() for method in row["methods"]} == set(cards())
    assert {paper for row in found.values() for paper in row["papers"]} == {paper.key for paper in load_papers()}
    assert found["gating"]["implemented"]
    assert not found["gating/soft/token-merging"]["implemented"]
    assert main(["methods", "--map", "--under", "gating/sparse/non-trainable"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert any("train.hash_router" in line for line in told)
    assert any("domain-mapping" in line and "open" in line for line in told)
    assert told[-1] == "4 places at the ends of the map, 2 with a method"


def test_the_map_has_no_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--map", "--stage", "train"]) == 2
    assert "leave --stage out" in capsys.readouterr().err
