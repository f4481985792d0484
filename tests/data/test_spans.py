"""Questions become windows whose labels are the answer, and answers are scored as SQuAD scores them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moestro.core.errors import ConfigError, DataError
from moestro.data.dataset import DataConfig, build_dataset
from moestro.data.spans import Question, best_span, exact, f1, label, normalise, windows
from moestro.data.tokens import byte_tokenizer


SENTENCE = "who rules the old town ? a wise king lives in it and , queen far away"
SPECIAL = [("[CLS]", 2), ("[SEP]", 3)]


@pytest.fixture
def tokenizer() -> Any:
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *SENTENCE.split()])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=SPECIAL
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


CONTEXT = "a wise king lives in the old town , far away"


def ask(text: str, context: str = CONTEXT) -> Question:
    return Question("who rules ?", context, ((context.index(text), text),))


def test_a_window_is_question_and_context_and_its_label_is_the_answer(tokenizer: Any) -> None:
    (window,), skipped = windows(tokenizer, [ask("wise king")], 20, 2)
    assert skipped == 0
    shown = " ".join(tokenizer.convert_ids_to_tokens(window.input_ids.tolist()))
    assert shown == "[CLS] who rules ? [SEP] a wise king lives in the old town , far away [SEP]"
    assert window.token_type_ids.tolist() == [0] * 5 + [1] * 12
    assert (window.first, window.last, window.start, window.end) == (5, 15, 6, 7)
    assert window.text(CONTEXT, 6, 7) == "wise king"


def test_windows_overlap_by_the_stride_and_those_without_the_whole_answer_say_cls(tokenizer: Any) -> None:
    cut, _ = windows(tokenizer, [ask("lives in")], 10, 2)  # 10 - 6 = 4 tokens of context a window
    texts = [window.text(CONTEXT, window.first, window.last) for window in cut]
    assert texts == ["a wise king lives", "king lives in the", "in the old town", "old town , far", ", far away"]
    assert [(window.start, window.end) for window in cut] == [(0, 0), (6, 7), (0, 0), (0, 0), (0, 0)]


def test_an_answer_longer_than_every_window_and_no_answer_are_cls_everywhere(tokenizer: Any) -> None:
    long, none = ask("wise king lives in the old"), Question("who ?", CONTEXT)
    for cut in (windows(tokenizer, [long], 10, 2)[0], windows(tokenizer, [none], 10, 2)[0]):
        assert len(cut) > 2
        assert {(window.start, window.end) for window in cut} == {(0, 0)}


def test_what_cannot_be_asked_is_skipped_and_counted(tokenizer: Any) -> None:
    wordy = Question(" ".join(["who"] * 16), CONTEXT)
    found, skipped = windows(tokenizer, [Question("who ?", " \n"), wordy, ask("king")], 20, 2)
    assert skipped == 2
    assert {window.question for window in found} == {2}


def test_offsets_are_characters_and_not_bytes(tokenizer: Any) -> None:
    context = "a würdé – wise king"
    (window,), _ = windows(tokenizer, [ask("king", context)], 20, 2)
    assert window.text(context, window.start, window.end) == "king"


def test_a_token_that_holds_more_than_the_answer_is_labelled_and_one_that_misses_some_is_not() -> None:
    offsets = ((0, 4), (4, 8), (9, 12))
    assert label(offsets, (5, "xy")) == (1, 1)
    assert label(offsets, (2, "xxxx")) == (0, 1)
    assert label(offsets, (9, "xxxx")) == (None, None)
    assert label(offsets[1:], (2, "xxxx")) == (None, None)
    assert [label(offsets, (at, "xxxx")) for at in (0, 4)] == [(0, 0), (1, 1)]  # and not their neighbours
    assert label(offsets, (8, " xxx")) == label(offsets, (9, "xxx")) == (2, 2)  # no token holds white space
    assert label(offsets, (4, "xxxx ")) == (1, 1)
    assert label(offsets, (8, " ")) == (None, None)


def test_the_first_of_several_answers_is_learned(tokenizer: Any) -> None:
    both = Question("who ?", CONTEXT, ((2, "wise king"), (0, "a")))
    (window,), _ = windows(tokenizer, [both], 20, 2)
    assert window.text(CONTEXT, window.start, window.end) == "wise king"


def test_a_stride_wider_than_a_window_still_moves_on(tokenizer: Any) -> None:
    cut, _ = windows(tokenizer, [ask("lives in")], 10, 128)
    texts = [window.text(CONTEXT, window.first, window.last) for window in cut]
    assert texts[:2] == ["a wise king lives", "wise king lives in"]
    assert texts[-1] == "town , far away"


def test_the_best_span_lies_in_the_context_and_does_not_end_before_it_starts() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        start_S, end_S = torch.randn(2, 12, generator=generator)
        first, longest = trial % 5 + 1, trial % 4 + 1
        last = min(10, first + trial % 7)
        pairs = [(s, e) for s in range(first, last + 1) for e in range(s, min(last, s + longest - 1) + 1)]
        best = max(pairs, key=lambda pair: float(start_S[pair[0]] + end_S[pair[1]]))
        start, end, score = best_span(start_S, end_S, first, last, longest)
        assert (start, end) == best
        assert score == pytest.approx(float(start_S[start] + end_S[end]))
    crossed = torch.tensor([9.0, 0.0, 0.0, 5.0]), torch.tensor([9.0, 5.0, 0.0, 0.0])  # best end before best start
    assert best_span(*crossed, 1, 3, 3)[:2] == (1, 1)


@pytest.mark.parametrize(
    ("found", "wanted", "em", "overlap"),
    [
        ("The  King!", ("king",), 1.0, 1.0),
        ("a wise king", ("king",), 0.0, 2 / 3),
        ("old town", ("the town hall", "old town walls"), 0.0, 0.8),
        ("king king", ("king",), 0.0, 2 / 3),
        ("queen", ("king",), 0.0, 0.0),
        ("", ("",), 1.0, 1.0),
        ("king", ("",), 0.0, 0.0),
        ("the", ("a",), 1.0, 1.0),
    ],
)
def test_scores_by_hand(found: str, wanted: tuple[str, ...], em: float, overlap: float) -> None:
    assert exact(found, wanted) == em
    assert f1(found, wanted) == pytest.approx(overlap)


def test_normalisation_takes_articles_as_words_only() -> None:
    assert normalise("An  answer, the-other: (A) Theatre") == "answer theother theatre"


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_file_of_questions_becomes_examples(tokenizer: Any, tmp_path: Path) -> None:
    answers = {"text": ["king", "wise king"], "answer_start": [7, 2]}
    source = write(tmp_path / "qa.jsonl", {"question": "who ?", "context": CONTEXT, "answers": answers})
    data = DataConfig.parse({"source": source, "text": "context", "sequence_length": 32, "stride": 4})
    (example,) = build_dataset(data, tokenizer, "spans").sources["data"]
    assert (example["start"], example["end"]) == (6, 6)
    assert example["input_ids"][6] == tokenizer.convert_tokens_to_ids("king")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["king"], "answer_start": [6]}, "record 1: the answer 'king' does not stand at character 6"),
        ({"text": ["king"], "answer_start": []}, "as many numbers as texts"),
        ("king", "answers must be"),
        ({"text": [""], "answer_start": [0]}, "does not stand"),
    ],
)
def test_wrong_answers_are_refused(tokenizer: Any, tmp_path: Path, answers: Any, message: str) -> None:
    source = write(tmp_path / "qa.jsonl", {"question": "who ?", "text": CONTEXT, "answers": answers})
    with pytest.raises(DataError, match=message):
        build_dataset(DataConfig.parse({"source": source}), tokenizer, "spans")


def test_a_tokenizer_without_cls_and_a_length_without_room_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a \[CLS\] token"):
        windows(byte_tokenizer(), [ask("king")], 32, 4)
    with pytest.raises(ConfigError, match="stride=-1: windows share at least 0"):
        windows(tokenizer, [ask("king")], 32, -1)
    answers = {"text": [], "answer_start": []}
    source = write(tmp_path / "qa.jsonl", {"question": "who rules ?", "text": CONTEXT, "answers": answers})
    with pytest.raises(DataError, match="none of 1 questions fits sequence_length=7"):
        build_dataset(DataConfig.parse({"source": source, "sequence_length": 7}), tokenizer, "spans")


def test_a_tokenizer_that_ends_with_cls_is_refused(tokenizer: Any) -> None:
    last = processors.TemplateProcessing(single="$A [CLS]", pair="$A [SEP] $B:1 [CLS]:1", special_tokens=SPECIAL)
    tokenizer.backend_tokenizer.post_processor = last
    with pytest.raises(ConfigError, match=r"puts \[CLS\] first"):
        windows(tokenizer, [ask("king")], 32, 4)
