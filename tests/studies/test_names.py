"""The names bench: a split that holds, masks that hide what they say, and chrF by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

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


def test_a_tag_names_the_language_of_the_target() -> None:
    data = names(0, 200)
    place = data.names["en"].index("Germany")
    assert data.pair("de", place, to_english=False) == ("de", "Germany", "Deutschland")
    assert data.pair("de", place, to_english=True) == ("en", "Deutschland", "Germany")
    characters = Characters(data)
    example = characters.example(("de", "Germany", "Deutschland"))
    assert characters.text(example["target_ids"]) == "Deutschland"
    assert example["input_ids"][0] == characters.tags["de"]
    assert len(example["input_ids"]) == len("Germany") + 2


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
    # ab against abcd: precision 1, recall 1/2 and 1/3; F2 = 5 p r / (4 p + r).
    assert chrf(["ab"], ["abcd"]) == pytest.approx(100 * (2.5 / 4.5 + (5 / 3) / (4 + 1 / 3)) / 2)


def test_the_files_hold_what_recipes_read(tmp_path: Path) -> None:
    files = {path.stem: path for path in write(tmp_path, times=1)}
    assert set(files) == {f"mt-{one}" for one in LANGUAGES} | {f"dae-{one}" for one in ("en", *LANGUAGES)} | {"heldout"}
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}
    assert all(set(row) == {"text", "target"} and row["target"].endswith("<|end|>") for row in rows["mt-ro"])
    assert len(rows["mt-de"]) > 9 * len(rows["mt-ro"])
    assert all("<|mask|>" in row["text"] and row["text"].startswith("ro: ") for row in rows["dae-ro"])
