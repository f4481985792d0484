"""The objective of extractive questions, and the evaluation of answers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moestro.data.spans import Question, Window
from moestro.studies._cloze import word_tokenizer
from moestro.testing.tiny import tiny_folder, tiny_model
from moestro.training.build import open_model
from moestro.training.objectives import Span, make_objective, span_logits
from moestro.training.recipe import ObjectiveConfig
from moestro.training.spans import predict, scores, span_qa


class Tokens:
    """What the objective asks of a tokenizer."""

    pad_token_id = 0


def examples() -> list[dict[str, Any]]:
    rows = [([1, 5, 2, 7, 8, 9], 3, 4), ([1, 5, 2, 6], 0, 0)]
    return [
        {"input_ids": np.array(ids), "token_type_ids": np.array([0, 0, 0, *[1] * (len(ids) - 3)]), "start": s, "end": e}
        for ids, s, e in rows
    ]


class Pair(nn.Module):
    """Start and end logits from the token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 2, generator=torch.Generator().manual_seed(3)))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]


def test_a_row_costs_half_of_start_and_end_over_its_real_tokens() -> None:
    objective, model = Span(Tokens()), Pair()  # type: ignore[arg-type]
    batch = objective.collate(examples(), [])
    assert batch["input_ids"].tolist() == [[1, 5, 2, 7, 8, 9], [1, 5, 2, 6, 0, 0]]
    wanted = 0.0
    for one in examples():
        start, end = model.table.detach()[one["input_ids"]].log_softmax(0).unbind(-1)
        wanted -= float(start[one["start"]] + end[one["end"]]) / 2
    term = objective(model, batch, {})["span"]
    assert (term.unit, objective.targets(batch), objective.tokens(batch, decoder=False)) == ("token", 2, 10)
    assert float(term.total.detach()) == pytest.approx(wanted, rel=1e-6)
    term.total.backward()
    assert model.table.grad is not None
    assert bool(model.table.grad.isfinite().all())
    assert bool((model.table.grad[0] == 0).all())  # padding


def test_a_transformers_model_learns_what_its_own_loss_says(tmp_path: Any) -> None:
    tiny_folder("bert", tmp_path / "masked")
    model = open_model(tmp_path / "masked", "span").eval()  # a new head on the encoder of another
    assert type(model).__name__ == "BertForQuestionAnswering"
    objective = make_objective(ObjectiveConfig(method="span"), Tokens())  # type: ignore[arg-type]
    batch = objective.collate([examples()[0]] * 2, [])
    loss = objective(model, batch, {})["span"].total / 2
    torch.testing.assert_close(loss, model(**batch).loss)
    start, _ = span_logits(model, objective.collate(examples(), []))
    assert torch.isneginf(start[1, 4:]).all()


def window(question: int, first: int, last: int) -> Window:
    offsets = tuple((2 * i, 2 * i + 1) for i in range(last - first + 1))
    return Window(question, np.arange(1, last + 3), np.zeros(last + 2), first, last, 0, 0, offsets)


def test_answers_are_the_best_over_windows_and_nothing_where_cls_wins_all() -> None:
    questions = [Question("?", "a b c", ((0, "a"),)), Question("?", "x y z"), Question("?", "")]
    cut = [window(0, 2, 4), window(0, 2, 4), window(1, 2, 4)]
    start_BS = torch.tensor([[0.0, 9, 1, 0, 0, 9], [0, 9, 0, 0, 3, 9], [4, 9, 1, 0, 0, 9]])
    end_BS = torch.tensor([[0.0, 9, 0, 2, 0, 9], [8, 9, 0, 0, 3, 9], [4, 9, 0, 2, 0, 9]])

    class Fixed(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.stack((start_BS, end_BS), -1)

    batch = {"input_ids": torch.zeros(3, 6, dtype=torch.long), "attention_mask": torch.ones(3, 6)}
    assert predict(Fixed(), [(cut, batch)], questions) == ["c", "x y", ""]
    assert predict(Fixed(), [(cut, batch)], questions, may_be_none=True) == ["c", "", ""]
    assert predict(Fixed(), [(cut, batch)], questions, longest=1)[1] == "y"
    assert scores(["a", "y", ""], questions) == pytest.approx({"f1": 2 / 3, "em": 2 / 3})


def test_evaluation_is_the_same_twice_and_leaves_the_mode() -> None:
    model = tiny_model("bert", cls="BertForQuestionAnswering", hidden_dropout_prob=0.5).train()
    objective = Span(Tokens())  # type: ignore[arg-type]
    batch = objective.collate(examples(), [])
    cut = [window(0, 3, 4), window(1, 3, 3)]
    questions = [Question("?", "a b"), Question("?", "c")]
    assert predict(model, [(cut, batch)], questions) == predict(model, [(cut, batch)], questions)
    assert model.training


def test_every_domain_has_its_scores_and_counts_what_could_not_be_asked() -> None:
    context = "a wise king lives in the old town far away"
    tokenizer = word_tokenizer([context])
    model = tiny_model("bert", cls="BertForQuestionAnswering")
    asked = Question("king ?", context)
    at, size = span_of(model, tokenizer, asked)
    right = Question("king ?", context, ((at, context[at : at + size]),))
    data = {"right": [right, Question("king ?", " ")], "wrong": [Question("king ?", context, ((0, "a"),))]}
    found = {rows: span_qa(model, tokenizer, data, length=12, stride=3, rows=rows) for rows in (1, 16)}
    assert found[1] == found[16]
    assert found[1]["right"] == {"f1": 1.0, "em": 1.0, "skipped": 1.0}  # nothing is right where there is no answer
    assert found[1]["wrong"]["em"] == 0.0


def span_of(model: Any, tokenizer: Any, one: Question) -> tuple[int, int]:
    """(first character, length) of the best answer, by looking at every pair in every window."""
    cut = tokenizer(
        one.question, one.context, truncation="only_second", max_length=12, stride=3, return_overflowing_tokens=True,
        return_offsets_mapping=True, return_token_type_ids=True,
    )  # fmt: skip
    best = (float("-inf"), 0, 0)
    for row in range(len(cut["input_ids"])):
        inputs = {key: torch.tensor([cut[key][row]]) for key in ("input_ids", "token_type_ids")}
        with torch.no_grad():
            logits = model(**inputs)
        inside = [i for i, part in enumerate(cut.sequence_ids(row)) if part == 1]
        for start in inside:
            for end in (i for i in inside if i >= start):
                a, b = cut["offset_mapping"][row][start][0], cut["offset_mapping"][row][end][1]
                best = max(best, (float(logits.start_logits[0, start] + logits.end_logits[0, end]), a, b - a))
    return best[1], best[2]
