"""`moestro catalog`."""

import json

import pytest
import yaml

from moestro.cli import main
from moestro.models.catalog import load_catalog


def test_the_list_has_every_model_with_its_recomputed_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalog", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [entry.name for entry in load_catalog()]
    switch = rows["switch-base-128"]
    # 128 experts of 2 x 768 x 3072 in 12 layers are 7.25 billion; the rest of the model makes it 7.4.
    assert switch["total"] == pytest.approx(7.4, abs=0.05)
    assert switch["total_printed"] == 7.41
    assert (switch["experts"], switch["top_k"], switch["shared"]) == (128, 1, False)


def test_filters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalog", "list", "--json", "--router", "sigmoid", "--shared"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(row["router"] == "sigmoid" and row["shared"] for row in rows)


def test_one_model_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalog", "show", "gshard-600b"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"] == {"d_model": 1024, "vocab": 64000, "tied": True}
    assert shown["losses"]["f_over"] == "slots"
    assert main(["catalog", "show", "gshard-600b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == shown


def test_the_table_fits_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalog", "list"]) == 0
    told = capsys.readouterr().out
    assert f"{len(load_catalog())} models" in told


def test_an_unknown_model_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalog", "show", "switch-base-127"]) == 2
    told = capsys.readouterr().err
    assert "did you mean switch-base-128" in told
    assert told.count("\n") == 1
