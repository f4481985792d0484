"""Extractive questions: text in, windows of tokens out, and the answers of a model scored as text.

A question is put before its context, [CLS] question [SEP] context [SEP]; only the context is cut, into windows that
overlap. A window that does not hold the answer whole is labelled with its [CLS], place 0. Places in text are counted
in characters. What cannot be asked (an empty context, a question that leaves a window no room) is skipped and counted.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from moestro.core.errors import ConfigError, DataError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOM = 2  # tokens of context that a window must have place for at least


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        question, context: texts. answers: (first character in the context, text) of every right answer; the first one
            is what a model learns. None means that the context does not answer.
    """

    question: str
    context: str
    answers: tuple[tuple[int, str], ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Right answers as text; the empty text where there is none."""
        return tuple(text for _, text in self.answers) or ("",)

    def misplaced(self) -> tuple[int, str] | None:
        """The first answer that does not stand where it says, or None."""
        return next(
            (
                (at, text)
                for at, text in self.answers
                if not text or self.context[at : at + len(text)] != text or at < 0
            ),
            None,
        )


@dataclass(frozen=True)
class Window:
    """One window of one question.

    Attributes:
        question: its place in the list that was cut. input_ids, token_type_ids: int32 [S].
        first, last: places of the first and the last token of context. start, end: of the answer, 0 and 0 for [CLS].
        offsets: characters of the context that each token of it covers, from ``first`` on.
    """

    question: int
    input_ids: np.ndarray
    token_type_ids: np.ndarray
    first: int
    last: int
    start: int
    end: int
    offsets: tuple[tuple[int, int], ...]

    def text(self, context: str, start: int, end: int) -> str:
        """The words of ``context`` between two tokens of this window."""
        return context[self.offsets[start - self.first][0] : self.offsets[end - self.first][1]]


def read_question(record: Mapping[str, Any], where: str) -> Question:
    """A question from ``{question, text, answers}``; ``answers`` as SQuAD has them, {text: [...], answer_start: [...]}.

    Raises:
        DataError: a field of another kind, or an answer that does not stand where it says.
    """
    asked, context, given = record["question"], record["text"], record["answers"]
    if not isinstance(asked, str) or not isinstance(context, str):
        raise DataError(f"{where}: question and context must be texts")
    shaped = isinstance(given, Mapping) and {"text", "answer_start"} <= given.keys()
    texts, starts = (given["text"], given["answer_start"]) if shaped else (None, None)
    fit = isinstance(texts, Sequence) and isinstance(starts, Sequence) and len(texts) == len(starts)
    if not fit or not all(isinstance(t, str) and isinstance(s, int) for t, s in zip(texts, starts, strict=True)):
        raise DataError(f"{where}: answers must be {{text: [...], answer_start: [...]}} with as many numbers as texts")
    found = Question(asked, context, tuple(zip(starts, texts, strict=True)))
    if wrong := found.misplaced():
        raise DataError(f"{where}: the answer {wrong[1][:40]!r} does not stand at character {wrong[0]} of the context")
    return found


def windows(
    tokenizer: "PreTrainedTokenizerBase", questions: Sequence[Question], length: int, stride: int
) -> tuple[list[Window], int]:
    """Every window of every question, and how many questions were skipped.

    Args:
        length: tokens of a window at most. stride: tokens of context that neighbours share.

    Raises:
        ConfigError: the tokenizer has no [CLS], puts it elsewhere than first or tells no offsets, or a negative stride.
    """
    if tokenizer.cls_token_id is None or not tokenizer.is_fast:
        raise ConfigError("questions need a tokenizer with a [CLS] token that tells offsets, such as BERT's")
    if tokenizer("a", verbose=False)["input_ids"][:1] != [tokenizer.cls_token_id]:
        raise ConfigError("questions need a tokenizer that puts [CLS] first: place 0 stands for no answer")
    if stride < 0:
        raise ConfigError(f"stride={stride}: windows share at least 0 tokens")
    found: list[Window] = []
    skipped = 0
    extra = tokenizer.num_special_tokens_to_add(pair=True)
    for place, one in enumerate(questions):
        room = length - extra - len(tokenizer(one.question, add_special_tokens=False, verbose=False)["input_ids"])
        if not one.context.strip() or room < ROOM:
            skipped += 1
            continue
        cut = tokenizer(
            one.question,
            one.context,
            truncation="only_second",
            max_length=length,
            stride=min(stride, room - 1),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            verbose=False,
        )
        pieces = [_window(cut, row, place, one) for row in range(len(cut["input_ids"]))]
        found += [piece for piece in pieces if piece is not None]
        skipped += all(piece is None for piece in pieces)
    return found, skipped


def _window(cut: Any, row: int, place: int, one: Question) -> Window | None:
    """Window ``row`` of a tokenised question; None for a context without tokens."""
    inside = [index for index, part in enumerate(cut.sequence_ids(row)) if part == 1]
    if not inside:
        return None
    first, last = inside[0], inside[-1]
    offsets = tuple((int(a), int(b)) for a, b in cut["offset_mapping"][row][first : last + 1])
    start, end = label(offsets, one.answers[0]) if one.answers else (None, None)
    return Window(
        question=place,
        input_ids=np.asarray(cut["input_ids"][row], dtype=np.int32),
        token_type_ids=np.asarray(cut["token_type_ids"][row], dtype=np.int32),
        first=first,
        last=last,
        start=0 if start is None or end is None else first + start,
        end=0 if start is None or end is None else first + end,
        offsets=offsets,
    )


def label(offsets: Sequence[tuple[int, int]], answer: tuple[int, str]) -> tuple[int | None, int | None]:
    """First and last token that an answer touches; (None, None) unless these tokens hold all of it. White space at its
    ends, which no token covers, does not count.
    """
    at, text = answer
    begin, stop = at + len(text) - len(text.lstrip()), at + len(text.rstrip())
    touched = [index for index, (a, b) in enumerate(offsets) if a < stop and b > begin]
    if not touched or offsets[touched[0]][0] > begin or offsets[touched[-1]][1] < stop:
        return None, None
    return touched[0], touched[-1]


def best_span(start_S: Tensor, end_S: Tensor, first: int, last: int, longest: int) -> tuple[int, int, float]:
    """The likeliest answer: the pair start <= end within [first, last], at most ``longest`` tokens, with the highest
    sum of logits, and that sum. Ties go to the earlier start, then to the earlier end.
    """
    inside = slice(first, last + 1)
    total_SS = start_S[inside, None].float() + end_S[None, inside].float()
    open_SS = total_SS.new_ones(total_SS.shape).triu().tril(longest - 1).bool()
    total_SS = total_SS.masked_fill(~open_SS, float("-inf"))
    start, end = divmod(int(total_SS.argmax()), total_SS.shape[1])
    return first + start, first + end, float(total_SS[start, end])


# -- scores of text ----------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: how SQuAD compares answers (1606.05250, section 6)."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact(found: str, wanted: Sequence[str]) -> float:
    """1 if the answer equals one of the right ones, else 0."""
    return float(any(normalise(found) == normalise(text) for text in wanted))


def f1(found: str, wanted: Sequence[str]) -> float:
    """Overlap of words as the harmonic mean of precision and recall, the best over the right answers.

    Where one side is empty, so that there are no words to share, it is 1 if both are and else 0.
    """
    return max(_f1(normalise(found).split(), normalise(text).split()) for text in wanted)


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))
