"""Names in many languages: the bench of studies that translate.

The Unicode locale data, which the package babel carries, name languages, territories, scripts and currencies in many
languages. A name is translated to or from English, character by character, or restored where spans of it are masked.
Three languages are poor: a tenth of their pairs is shown. Names of held-out concepts are shown in no task, nor does
another concept bear one of them.

    python -m moestro.studies._names FOLDER      writes the text as pairs, for recipes such as zcode-m3.yaml
"""

import functools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moestro.core.errors import ConfigError
from moestro.data.tokens import EOS, MASK
from moestro.studies._files import command, write_lines


LANGUAGES = ("cs", "de", "es", "fi", "fr", "it", "nl", "pl", "pt", "ro", "sv", "tr")
POOR = ("fi", "ro", "sv")
POOR_SHARE, HELDOUT_SHARE, MASKED_SHARE = 0.1, 0.15, 0.35
TEMPERATURE = 5.0
LONGEST = 20
MASKED = "\0"  # stands for a masked span where text is characters


@dataclass(frozen=True)
class Names:
    """The parallel text.

    Attributes:
        names: language, ``en`` included, -> the name of each concept. shown: language -> concepts whose pair with
            English may be learned. known: concepts that are not held out. heldout: the others.
    """

    names: Mapping[str, Sequence[str]]
    shown: Mapping[str, np.ndarray]
    known: np.ndarray
    heldout: np.ndarray

    def pair(self, language: str, concept: int, *, to_english: bool) -> tuple[str, str, str]:
        """(tag, source, target) of a translation; the tag names the target's language."""
        there, english = self.names[language][concept], self.names["en"][concept]
        return ("en", there, english) if to_english else (language, english, there)


@functools.cache
def names(seed: int, limit: int | None = None) -> Names:
    """The text with its split, the split drawn from the seed.

    Of concepts that share a name in any of the languages, such as a language and its script, the first stays.

    Args:
        limit: at most this many concepts, for short budgets.

    Raises:
        ConfigError: babel is not installed.
    """
    try:
        from babel import Locale
    except ModuleNotFoundError:
        raise ConfigError(
            "names in many languages come from the package babel; pip install 'moestro[studies]'"
        ) from None
    locales = {language: Locale(language) for language in ("en", *LANGUAGES)}
    found: dict[str, list[str]] = {language: [] for language in locales}
    taken: set[tuple[str, str]] = set()
    for kind in ("languages", "territories", "scripts", "currencies"):
        tables = {language: getattr(locale, kind) for language, locale in locales.items()}
        for key in sorted(tables["en"]):
            entry = {language: table.get(key, "") for language, table in tables.items()}
            own = {(language, name.casefold()) for language, name in entry.items()}
            if all(0 < len(name) <= LONGEST for name in entry.values()) and not own & taken:
                taken |= own
                for language, name in entry.items():
                    found[language].append(name)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(found["en"]))[:limit]
    held = round(HELDOUT_SHARE * len(order))
    heldout, known = order[:held], order[held:]
    poor = {language: rng.permutation(known)[: round(POOR_SHARE * len(known))] for language in POOR}
    return Names(found, {language: poor.get(language, known) for language in LANGUAGES}, known, heldout)


def chances(sizes: Sequence[int]) -> np.ndarray:
    """Sampling of languages: n^(1 / T) over its sum."""
    weights = np.asarray(sizes, dtype=float) ** (1.0 / TEMPERATURE)
    return weights / weights.sum()


def mask_spans(text: str, rng: np.random.Generator, mask: str) -> str:
    """``text`` with spans of 1 to 3 characters, a ``MASKED_SHARE`` of it in all, each replaced by one ``mask``."""
    gone = np.zeros(len(text), dtype=bool)
    while gone.sum() < MASKED_SHARE * len(text):
        start = int(rng.integers(len(text)))
        gone[start : start + int(rng.integers(1, 4))] = True
    return "".join(
        mask if gone[i] and (i == 0 or not gone[i - 1]) else "" if gone[i] else character
        for i, character in enumerate(text)
    )


def translations(data: Names, count: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """``count`` pairs to learn from, either direction with the same chance."""
    picked = rng.choice(len(LANGUAGES), size=count, p=chances([len(data.shown[name]) for name in LANGUAGES]))
    return [
        data.pair(LANGUAGES[i], int(rng.choice(data.shown[LANGUAGES[i]])), to_english=bool(rng.integers(2)))
        for i in picked
    ]


def corruptions(data: Names, count: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """``count`` names with spans masked out, in any language, of any concept that is not held out."""
    languages = sorted(data.names)
    picked = rng.choice(len(languages), size=count, p=chances([len(data.known)] * len(languages)))
    texts = [(languages[i], data.names[languages[i]][int(rng.choice(data.known))]) for i in picked]
    return [(language, mask_spans(text, rng, MASKED), text) for language, text in texts]


class Characters:
    """Ids of characters and tags. 0 pads and starts the decoder, 1 ends."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, data: Names) -> None:
        letters = sorted({letter for texts in data.names.values() for text in texts for letter in text})
        self.letters = [MASKED, *letters]
        self.ids = {letter: 2 + place for place, letter in enumerate(self.letters)}
        self.tags = {language: 2 + len(self.letters) + place for place, language in enumerate(sorted(data.names))}
        self.size = 2 + len(self.letters) + len(self.tags)

    def example(self, row: tuple[str, str, str]) -> dict[str, list[int]]:
        """{input_ids, target_ids} of (tag, source, target)."""
        tag, source, target = row
        return {
            "input_ids": [self.tags[tag], *(self.ids[letter] for letter in source), self.eos_token_id],
            "target_ids": [*(self.ids[letter] for letter in target), self.eos_token_id],
        }

    def text(self, ids: Sequence[int]) -> str:
        """Characters up to the end; anything else is left out."""
        ids = list(ids)
        ids = ids[: ids.index(self.eos_token_id)] if self.eos_token_id in ids else ids
        return "".join(self.letters[i - 2] for i in ids if 2 <= i < 2 + len(self.letters))


def chrf(found: Sequence[str], wanted: Sequence[str], *, longest: int = 6, beta: float = 2.0) -> float:
    """chrF of a corpus, 0 to 100: F-beta of the precision and recall of character n-grams, spaces apart, both averaged
    over n = 1 .. 6 (Popovic 2015). An n for which either side has no n-gram is left out.
    """
    shares = []
    for n in range(1, longest + 1):
        matched = ours = theirs = 0
        for one, two in zip(found, wanted, strict=True):
            grams, reference = _grams(one, n), _grams(two, n)
            matched += (grams & reference).total()
            ours, theirs = ours + grams.total(), theirs + reference.total()
        if ours and theirs:
            shares.append((matched / ours, matched / theirs))
    precision, recall = np.mean(shares, axis=0) if shares else (0.0, 0.0)
    below = beta**2 * precision + recall
    return float(100.0 * (1 + beta**2) * precision * recall / below) if below else 0.0


def _grams(text: str, n: int) -> Counter[str]:
    text = "".join(text.split())
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def write(folder: Path, seed: int = 0, times: int = 4) -> list[Path]:
    """The text as pairs, one JSON object a line with ``text`` and ``target``: ``mt-LANGUAGE.jsonl`` in both directions,
    ``dae-LANGUAGE.jsonl`` with every name masked ``times`` times, and ``heldout-LANGUAGE.jsonl`` from English. Returns
    the files.
    """
    data, rng = names(seed), np.random.default_rng(seed)
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for language in LANGUAGES:
        rows[f"mt-{language}"] = [
            data.pair(language, int(c), to_english=way) for c in data.shown[language] for way in (False, True)
        ]
    for language, texts in data.names.items():
        known = [texts[int(c)] for c in data.known for _ in range(times)]
        rows[f"dae-{language}"] = [(language, mask_spans(text, rng, MASK), text) for text in known]
    for language in LANGUAGES:
        rows[f"heldout-{language}"] = [data.pair(language, int(c), to_english=False) for c in data.heldout]
    files = {
        name: [{"text": f"{tag}: {source}", "target": f"{target}{EOS}"} for tag, source, target in pairs]
        for name, pairs in rows.items()
    }
    return write_lines(folder, files)


if __name__ == "__main__":
    command("_names", write, sys.argv[1:])
