"""How well a model answers: its best span of every question as text, held against the right answers, by domain."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from moestro.core.session import session
from moestro.data.dataset import span_example
from moestro.data.spans import Question, Window, best_span, exact, f1, windows
from moestro.training.objectives import Batch, Span, span_logits


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def predict(
    model: nn.Module,
    batches: Sequence[tuple[Sequence[Window], Batch]],
    questions: Sequence[Question],
    *,
    longest: int = 30,
    may_be_none: bool = False,
) -> list[str]:
    """The answer to every question, the best over its windows; the empty text for a question without a window.

    Args:
        batches: windows with their tensors, as ``Span.collate`` makes them. longest: tokens of an answer at most.
        may_be_none: answer with nothing where [CLS] scores above the best span in every window of the question.
    """
    spans: list[tuple[float, str]] = [(float("-inf"), "")] * len(questions)
    nothing = [float("inf")] * len(questions)
    training = model.training
    model.eval()
    try:
        for group, batch in batches:
            with torch.no_grad(), session(collect=False):
                start_BS, end_BS = span_logits(model, batch)
            for window, start_S, end_S in zip(group, start_BS, end_BS, strict=True):
                start, end, score = best_span(start_S, end_S, window.first, window.last, longest)
                place = window.question
                if score > spans[place][0]:
                    spans[place] = (score, window.text(questions[place].context, start, end))
                nothing[place] = min(nothing[place], float(start_S[0] + end_S[0]))
    finally:
        model.train(training)
    none = [may_be_none and null > score for (score, _), null in zip(spans, nothing, strict=True)]
    return ["" if empty else text for empty, (_, text) in zip(none, spans, strict=True)]


def span_qa(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    data: Mapping[str, Sequence[Question]],
    *,
    length: int = 384,
    stride: int = 128,
    rows: int = 16,
    longest: int = 30,
    may_be_none: bool = False,
) -> dict[str, dict[str, float]]:
    """Domain -> {f1, em, skipped}: means over its questions in [0, 1], and how many of them could not be asked. Those
    count as answered with nothing.

    Args:
        length, stride: of windows. rows: windows of one forward. longest, may_be_none: see ``predict``.
    """
    objective = Span(tokenizer)
    found = {}
    for domain, questions in data.items():
        cut, skipped = windows(tokenizer, questions, length, stride)
        groups = [cut[at : at + rows] for at in range(0, len(cut), rows)]
        batches = [(group, objective.collate([span_example(w) for w in group], [])) for group in groups]
        answers = predict(model, batches, questions, longest=longest, may_be_none=may_be_none)
        found[domain] = {**scores(answers, questions), "skipped": float(skipped)}
    return found


def scores(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """{f1, em} of answers, means over questions in [0, 1]."""
    pairs = list(zip(answers, (question.texts for question in questions), strict=True))
    return {
        "f1": float(np.mean([f1(*pair) for pair in pairs])),
        "em": float(np.mean([exact(*pair) for pair in pairs])),
    }
