"""Augmentation of questions: words or sentences of the context are exchanged, answers stay and keep their places.

``eda``, operations on a context of n words, outside all right answers (EDA, 1901.11196, section 2):

    replace   max(1, floor(sr n)) words by a synonym each        insert   as many synonyms of words, after any word
    swap      max(1, floor(rs n)) times two words                delete   every word with probability rd

A share of 0 turns its operation off. A copy is made by one operation, the copies take turns. Case, punctuation and
spaces stay as they are, so that new text looks like old text, and the places of answers are carried along, not searched
for. Where synonyms come from is the caller's choice: any function from a word to words.

``back_translate`` sends the sentences of a context that touch no answer to another language and back, in chunks; the
translator is any function from a text to a text.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from moestro.core.errors import ConfigError
from moestro.data.spans import Question


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Synonyms = Callable[[str], Sequence[str]]
_FUNCTION = """
the and but nor for not you your they them their she her his him its our was were are been being have has had does did
will would can could may might must shall should this that these those which who whom whose what when where why how than
then there here with without from into onto over under between during after before because unless until while about
against through all any both each few more most other some such only own same too very just one two
"""
FUNCTION_WORDS = frozenset(_FUNCTION.split())
WORD = re.compile(r"\b[^\W\d_]+(?:['’][^\W\d_]+)?\b")  # not the letters of int32 or of a name_with_parts
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Eda:
    """Settings.

    Attributes:
        sr, ri, rs, rd: shares of words that are replaced, inserted, swapped and deleted. copies: of each example.

    Raises:
        ConfigError: a share outside [0, 1], no copy, or every share 0, which would only repeat the examples.
    """

    sr: float = 0.3
    ri: float = 0.0
    rs: float = 0.0
    rd: float = 0.0
    copies: int = 4

    def __post_init__(self) -> None:
        for name in ("sr", "ri", "rs", "rd"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: a share of the words lies between 0 and 1")
        if self.sr == self.ri == self.rs == self.rd == 0:
            raise ConfigError(
                "sr, ri, rs and rd are all 0: nothing would change; give one of them a share of the words"
            )
        if self.copies < 1:
            raise ConfigError(f"copies={self.copies}; at least 1")


@dataclass
class Augmented:
    """What came of it.

    Attributes:
        questions: the new ones, without those they are made from. sources: the place of the original of each.
        lost: examples left out because an answer of theirs does not stand where it says. unchanged: copies left out
            because nothing in their context could be changed.
    """

    questions: list[Question] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    lost: int = 0
    unchanged: int = 0


@dataclass
class Piece:
    """A stretch of a context. ``free`` ones, words or sentences, may change; answers and what is in between may not."""

    text: str
    free: bool = False


def pieces_of(one: Question) -> tuple[list[Piece], list[int]]:
    """A context as pieces, and for every answer the piece that it begins with. Answers may overlap: their union is cut
    at each answer's beginning, and no word that touches it may change.
    """
    spans = [(at, at + len(text)) for at, text in one.answers]
    cuts = {0, len(one.context), *(edge for span in spans for edge in span)}
    words = [
        match.span()
        for match in WORD.finditer(one.context)
        if not any(match.start() < stop and match.end() > start for start, stop in spans)
    ]
    edges = sorted(cuts | {edge for span in words for edge in span})
    free = set(words)
    pieces = [Piece(one.context[a:b], (a, b) in free) for a, b in pairwise(edges)]
    place = {edge: index for index, edge in enumerate(edges)}
    return pieces, [place[start] for start, _ in spans]


def joined(one: Question, pieces: Sequence[Piece], begins: Sequence[int]) -> Question:
    """The question about the pieces put together again."""
    at = np.cumsum([0, *(len(piece.text) for piece in pieces)])
    answers = tuple((int(at[begin]), text) for begin, (_, text) in zip(begins, one.answers, strict=True))
    return Question(one.question, "".join(piece.text for piece in pieces), answers)


def eda(questions: Sequence[Question], settings: Eda, synonyms: Synonyms, rng: np.random.Generator) -> Augmented:
    """``settings.copies`` changed copies of every question."""
    ways = [name for name in ("sr", "ri", "rs", "rd") if getattr(settings, name) > 0]
    found = Augmented()
    for place, one in enumerate(questions):
        if one.misplaced():
            found.lost += 1
            continue
        for copy in range(settings.copies):
            way = ways[copy % len(ways)]
            pieces, begins = pieces_of(one)
            _WAYS[way](pieces, getattr(settings, way), synonyms, rng)
            new = joined(one, pieces, begins)
            if new.context == one.context:
                found.unchanged += 1
            else:
                found.questions.append(new)
                found.sources.append(place)
    return found


def back_translate(questions: Sequence[Question], translate: Callable[[str], str], *, chunk: int = 100) -> Augmented:
    """One copy of every question with the sentences of its context that touch no answer translated there and back.

    Args:
        translate: text to text, there and back; called with chunks without white space around them. chunk: bytes of a
            chunk in UTF-8 at most; a longer sentence is cut between words, a longer word not at all.

    Raises:
        ConfigError: a chunk below 1 byte.
    """
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} bytes; at least 1")
    found = Augmented()
    for place, one in enumerate(questions):
        if one.misplaced():
            found.lost += 1
            continue
        pieces, begins = sentences_of(one)
        for piece in pieces:
            if piece.free:
                piece.text = _translated(piece.text, translate, chunk)
        new = joined(one, pieces, begins)
        if new.context == one.context:
            found.unchanged += 1
        else:
            found.questions.append(new)
            found.sources.append(place)
    return found


def sentences_of(one: Question) -> tuple[list[Piece], list[int]]:
    """As ``pieces_of``, with stretches of sentences that touch no answer in the place of words."""
    spans = [(at, at + len(text)) for at, text in one.answers]
    ends = [0, *(match.end() for match in SENTENCE_END.finditer(one.context)), len(one.context)]
    touched = [(a, b) for a, b in pairwise(ends) if any(a < stop and b > start for start, stop in spans)]
    edges = sorted({0, len(one.context), *(edge for part in (*touched, *spans) for edge in part)})
    pieces = [
        Piece(one.context[a:b], not any(start <= a and b <= stop for start, stop in touched))
        for a, b in pairwise(edges)
    ]
    place = {edge: index for index, edge in enumerate(edges)}
    return pieces, [place[start] for start, _ in spans]


def _translated(text: str, translate: Callable[[str], str], chunk: int) -> str:
    """A stretch of sentences through ``translate`` in chunks, white space at its ends as it was."""
    middle = text.strip()
    if not middle:
        return text
    parts: list[str] = []
    for sentence in SENTENCE_END.split(middle):
        for part in [sentence] if len(sentence.encode()) <= chunk else sentence.split():
            if parts and len(f"{parts[-1]} {part}".encode()) <= chunk:
                parts[-1] += f" {part}"
            else:
                parts.append(part)
    start = text.index(middle)
    return text[:start] + " ".join(map(translate, parts)) + text[start + len(middle) :]


def _count(pieces: Sequence[Piece], share: float) -> int:
    return max(1, int(Fraction(str(share)) * sum(piece.free for piece in pieces)))


def _words(pieces: Sequence[Piece], rng: np.random.Generator) -> list[Piece]:
    """The words in random order."""
    words = [piece for piece in pieces if piece.free]
    return [words[int(index)] for index in rng.permutation(len(words))]


def _replace(pieces: list[Piece], share: float, synonyms: Synonyms, rng: np.random.Generator) -> None:
    left = _count(pieces, share)
    for piece in _words(pieces, rng):
        others = list(synonyms(piece.text.lower()))
        if others:
            piece.text = cased(str(rng.choice(others)), piece.text)
            left -= 1
        if not left:
            return


def _insert(pieces: list[Piece], share: float, synonyms: Synonyms, rng: np.random.Generator) -> None:
    words = _words(pieces, rng)
    new = [str(rng.choice(list(others))) for piece in words if (others := synonyms(piece.text.lower()))]
    for text in new[: _count(pieces, share)]:
        words[int(rng.integers(len(words)))].text += f" {text}"


def _swap(pieces: list[Piece], share: float, synonyms: Synonyms, rng: np.random.Generator) -> None:
    words = [piece for piece in pieces if piece.free]
    for _ in range(_count(pieces, share) if len(words) > 1 else 0):
        one, two = (words[int(index)] for index in rng.choice(len(words), size=2, replace=False))
        one.text, two.text = two.text, one.text


def _delete(pieces: list[Piece], share: float, synonyms: Synonyms, rng: np.random.Generator) -> None:
    for piece in pieces:
        if piece.free and rng.random() < share:
            piece.text = ""


_WAYS: dict[str, Callable[[list[Piece], float, Synonyms, np.random.Generator], None]] = {
    "sr": _replace,
    "ri": _insert,
    "rs": _swap,
    "rd": _delete,
}


def cased(word: str, like: str) -> str:
    """``word`` in the case of ``like``: all capitals, a first capital, or as it is."""
    if len(like) > 1 and like.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word


class Neighbours:
    """Synonyms from a model's own table of word embeddings: the words whose vectors are nearest by cosine.

    Only whole words of the vocabulary, of letters, answer and are answers. Nearest vectors are related words more often
    than true synonyms; the threshold keeps the far ones out. Function words have none, as in a thesaurus.

    Args:
        table: embeddings [V, D]. words: neighbours of a word at most. threshold: least cosine.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", table: Tensor, *, words: int = 5, threshold: float = 0.5
    ) -> None:
        vocabulary: dict[str, Any] = tokenizer.get_vocab()
        whole = (word for word in vocabulary if len(word) > 2 and word.isalpha() and word.islower())
        kept = sorted(set(whole) - FUNCTION_WORDS)
        self.names = kept
        self.places = {word: place for place, word in enumerate(kept)}
        vectors_VD = table.detach().float()[[vocabulary[word] for word in kept]]
        self.vectors_VD = vectors_VD / vectors_VD.norm(dim=1, keepdim=True).clamp(min=1e-12)
        self.words, self.threshold = words, threshold
        self.known: dict[str, tuple[str, ...]] = {}

    def __call__(self, word: str) -> tuple[str, ...]:
        """Neighbours of a word in lower case, nearest first."""
        if word not in self.places:
            return ()
        if word not in self.known:
            cosine_V = self.vectors_VD @ self.vectors_VD[self.places[word]]
            cosine_V[self.places[word]] = float("-inf")
            best = cosine_V.topk(min(self.words, len(cosine_V)))
            near = [int(i) for value, i in zip(*best, strict=True) if value >= self.threshold]
            self.known[word] = tuple(self.names[place] for place in near)
        return self.known[word]
