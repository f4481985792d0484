"""The names bench: a split that holds, masks that hide what they say, and chrF by hand."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from moestro.cli import main
from moestro.studies._files import command
from moestro.studies._names import (
    LANGUAGES,
    LONGEST,
    MASKED,
    MASKED_SHARE,
    POOR,
    Characters,
    chances,
    chrf,
    corruptions,
    mask_spans,
    names,
    translations,
    write,
)


def test_held_out_concepts_are_shown_in_no_task() -> None:
    data = names(0, 200)
    assert (len(data.known), len(data.heldout)) == (170, 30)
    assert not set(data.known) & set(data.heldout)
    assert {language: len(data.shown[language]) for language in LANGUAGES} == {
        language: 17 if language in POOR else 170 for language in LANGUAGES
    }
    known = {(language, data.names[language][c]) for language in data.names for c in data.known}
    rng = np.random.default_rng(0)
    for _, source, target in translations(data, 500, rng):
        assert {source, target} <= {name for _, name in known}
    assert all((tag, target) in known for tag, _, target in corruptions(data, 500, rng))


def test_no_held_out_name_is_another_concepts_name_too() -> None:
    """Many a language shares its name with its script: the one must not tell the other."""
    data = names(0)
    assert len(data.known) + len(data.heldout) == len(data.names["en"])
    for language, texts in data.names.items():
        shown = {texts[c].casefold() for c in data.known}
        assert [texts[c] for c in data.heldout if texts[c].casefold() in shown] == [], language


def test_without_babel_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "babel", None)
    names.cache_clear()
    line = "error: names in many languages come from the package babel; pip install 'moestro[studies]'"
    assert main(["study", "zcode_m3_training", "--micro", "--work", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [line]
    with pytest.raises(SystemExit, match="^" + re.escape(line) + "$"):
        command("_names", write, [str(tmp_path / "names")])
    with pytest.raises(SystemExit, match=r"^usage: "):
        command("_names", write, [])


def test_a_tag_names_the_language_of_the_target() -> None:
    data = names(0, 200)
    place = data.names["en"].index("Belgium")
    assert data.pair("de", place, to_english=False) == ("de", "Belgium", "Belgien")
    assert data.pair("de", place, to_english=True) == ("en", "Belgien", "Belgium")
    characters = Characters(data)
    example = characters.example(("de", "Belgium", "Belgien"))
    assert characters.text(example["target_ids"]) == "Belgien"
    assert example["input_ids"][0] == characters.tags["de"]
    assert len(example["input_ids"]) == len("Belgium") + 2


def test_masks_hide_their_share_in_short_spans() -> None:
    rng = np.random.default_rng(0)
    hidden = []
    for _ in range(300):
        text = "abcdefghijklmnopqrst"[:LONGEST]
        seen = mask_spans(text, rng, MASKED)
        left = seen.replace(MASKED, "")
        assert "".join(letter for letter in text if letter in left) == left, "what is left stands in order"
        assert MASKED * 2 not in seen, "one mask a span"
        hidden.append(len(text) - len(left))
    assert min(hidden) >= MASKED_SHARE * 20
    assert max(hidden) <= MASKED_SHARE * 20 + 2


def test_the_temperature_lifts_the_poor() -> None:
    np.testing.assert_allclose(chances([32, 1]), [2 / 3, 1 / 3])


def test_chrf_by_hand() -> None:
    """abd against abc: 2 of 3 letters, 1 of 2 pairs, no triple; longer n-grams do not exist."""
    assert chrf(["abd"], ["abc"]) == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert chrf(["a b c"], ["abc"]) == 100.0
    assert chrf([""], ["abc"]) == 0.0
    # ab against abcd: precision 1, recall 1/2 and 1/3, so 5/12 on average; F2 = 5 p r / (4 p + r).
    assert chrf(["ab"], ["abcd"]) == pytest.approx(100 * 5 * (5 / 12) / (4 + 5 / 12))
    # The value of sacreBLEU 2.6 (CHRF with its defaults): means of precision and recall first, then F.
    found, wanted = ["ab", "Deutschlnd", "xx"], ["abcd", "Deutschland", "Frankreich"]
    assert chrf(found, wanted) == pytest.approx(39.05563249188956)


def test_the_files_hold_what_recipes_read(tmp_path: Path) -> None:
    files = {path.stem: path for path in write(tmp_path, times=1)}
    kinds = ("mt", "heldout", "dae")
    assert set(files) == {f"{kind}-{one}" for kind in kinds for one in LANGUAGES} | {"dae-en"}
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}
    assert all(set(row) == {"text", "target"} and row["target"].endswith("<|end|>") for row in rows["mt-ro"])
    assert len(rows["mt-de"]) > 9 * len(rows["mt-ro"])
    assert {row["text"].split(":")[0] for row in rows["heldout-ro"]} == {"ro"}
    english = {row["text"].removeprefix("ro: ") for row in rows["heldout-ro"]}
    assert len(english) == len(rows["heldout-ro"]) > 100
    assert not english & {row["text"].split(": ")[1] for row in rows["mt-de"] if row["text"].startswith("de: ")}
    assert all("<|mask|>" in row["text"] and row["text"].startswith("ro: ") for row in rows["dae-ro"])
