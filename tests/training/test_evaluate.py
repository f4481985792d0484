"""Perplexity and bits per byte against a direct computation: every token once, every byte once."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moestro.core.errors import ConfigError, DataError
from moestro.data.tokens import byte_tokenizer, train_bpe
from moestro.training.evaluate import check_windows, document_ids, score_texts, windows


TEXTS = ["Größe ist relativ.", "a", "", "Das Wetter von morgen ist wie das von heute, nur später."]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def direct(model: nn.Module, ids: list[int], context: int, stride: int) -> tuple[float, int]:
    """-ln p of every token but the first, one token at a time, from the definition of the sliding window."""
    total = 0.0
    for place in range(1, len(ids)):
        if place <= context:
            begin = 0
        else:
            block = (place - context - 1) // stride
            end = min(len(ids), context + 1 + (block + 1) * stride)
            begin = max(0, end - context - 1)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[begin:place]]), use_cache=False).logits[0, -1]
        total -= float(logits.log_softmax(-1)[ids[place]])
    return total, max(0, len(ids) - 1)


@pytest.mark.parametrize(("context", "stride"), [(64, 64), (16, 8), (16, 16), (7, 3), (5, 1), (1, 1)])
def test_equals_the_direct_computation(model: Any, context: int, stride: int) -> None:
    tokenizer = byte_tokenizer()
    wanted, tokens = 0.0, 0
    for text in TEXTS:
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        nats, count = direct(model, ids, context, stride)
        wanted, tokens = wanted + nats, tokens + count
    found = score_texts(model, tokenizer, TEXTS, context=context, stride=stride, batch_size=3)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert found.tokens == tokens == num_bytes  # a byte a token, each scored once
    assert found.bytes == num_bytes
    assert found.documents == 3
    assert found.nats == pytest.approx(wanted, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(wanted / tokens), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(wanted / math.log(2) / num_bytes, rel=1e-5)


def test_a_uniform_model_needs_log2_of_the_vocabulary() -> None:
    class Uniform(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.zeros(*input_ids.shape, 256)

    found = score_texts(Uniform(), byte_tokenizer(), ["abcdefgh" * 9], context=10)
    assert found.perplexity == pytest.approx(256.0)
    assert found.bits_per_byte == pytest.approx(8.0)


def test_bits_per_byte_count_bytes_not_tokens(model: Any) -> None:
    tokenizer = train_bpe(TEXTS, 300)
    found = score_texts(model, tokenizer, TEXTS, context=32)
    assert found.tokens < found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.bytes)


def test_without_a_start_token_the_first_token_and_its_bytes_are_left_out(model: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    text = "äbc"
    ids = tokenizer(text)["input_ids"]
    found = score_texts(model, tokenizer, [text], context=32)
    nats, tokens = direct(model, ids, 32, 16)
    assert found.tokens == tokens == 3
    assert found.bytes == 3  # the second byte of the first character, and two letters
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 3)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    with pytest.raises(DataError, match="nothing to score"):
        score_texts(model, tokenizer, ["a", ""], context=32)


def test_first_tokens_of_other_kinds_of_tokenizers() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0, "größer": 1, "als": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert document_ids(PreTrainedTokenizerFast(tokenizer_object=words), "größer als", None) == ([1, 2], 4)
    assert document_ids(PreTrainedTokenizerFast(tokenizer_object=words), "größer als", 0) == ([0, 1, 2], 12)
    vocabulary = {"?": 0, "<0xC3>": 1, "<0xA4>": 2, "b": 3, "é": 4}
    fallback = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?", byte_fallback=True))
    fallback.decoder = decoders.ByteFallback()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fallback)
    assert document_ids(tokenizer, "äb", None) == ([1, 2, 3], 2)
    assert document_ids(tokenizer, "éb", None) == ([4, 3], 1)


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_windows_score_each_token_once(length: int, context: int, data: Any) -> None:
    stride = data.draw(st.integers(1, context))
    rows = list(windows(list(range(length)), context, stride))
    scored = [token for row in rows for token in row.ids[len(row.ids) - row.scored :]]
    assert scored == list(range(1, length))
    for row in rows:
        assert len(row.ids) - 1 <= context
        assert row.ids == tuple(range(row.ids[0], row.ids[-1] + 1))
        before = len(row.ids) - row.scored
        assert before > context - stride or row.ids[0] == 0


def test_padding_and_batching_change_nothing(model: Any) -> None:
    one = score_texts(model, byte_tokenizer(), TEXTS, context=12, batch_size=1)
    many = score_texts(model, byte_tokenizer(), TEXTS, context=12, batch_size=64)
    assert one.nats == pytest.approx(many.nats, rel=1e-6)


def test_windows_that_cannot_be(model: Any) -> None:
    with pytest.raises(ConfigError, match="above the 64 positions"):
        check_windows(model, 65, None)
    with pytest.raises(ConfigError, match="between 1 and context=8"):
        check_windows(model, 8, 9)
    with pytest.raises(ConfigError, match="at least 1 token"):
        check_windows(model, 0, None)


# -- the adapter for lm-evaluation-harness, with the harness itself ---------------------------------------------


@pytest.fixture(scope="module")
def adapter(model: Any) -> Any:
    from moestro.training.harness import MoestroLM

    return MoestroLM(model, byte_tokenizer(), context=24, batch_size=4)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=number)  # type: ignore[arg-type]
        for number, args in enumerate(arguments)
    ]


def test_loglikelihood_is_the_continuations(model: Any, adapter: Any) -> None:
    pairs = [("Das Wetter ", "ist"), ("", "gut"), ("x" * 40, "yz"), ("ab", "c" * 40)]
    found = adapter.loglikelihood(requests("loglikelihood", *pairs))
    tokenizer = byte_tokenizer()
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        ids = tokenizer(context + continuation)["input_ids"] if context else [0, *tokenizer(continuation)["input_ids"]]
        after = len(tokenizer(continuation)["input_ids"]) + (len(context) - len(context.rstrip()))
        ids = ids[-25:]
        after = min(after, len(ids) - 1)
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)[-after:]
        assert total == pytest.approx(float(logprobs.gather(1, torch.tensor(ids[-after:])[:, None]).sum()), rel=1e-4)
        assert greedy == bool((logprobs.argmax(-1) == torch.tensor(ids[-after:])).all())


def test_rolling_equals_the_harness_own_windows(model: Any, adapter: Any) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer = byte_tokenizer()
    texts = ["kurz", "ein Text, der länger ist als ein Fenster von vierundzwanzig Tokens"]
    found = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    for text, total in zip(texts, found, strict=True):
        wanted = 0.0
        ids = tokenizer(text)["input_ids"]
        for pair in get_rolling_token_windows(ids, prefix_token=0, max_seq_len=24, context_len=1):
            before, after = make_disjoint_window(pair)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*before, *after][:-1]])).logits[0].log_softmax(-1)
            wanted += float(logits[-len(after) :].gather(1, torch.tensor(after)[:, None]).sum())
        assert total == pytest.approx(wanted, rel=1e-4)


def test_generate_until_stops(adapter: Any) -> None:
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    (free,) = adapter.generate_until(requests("generate_until", ("abc", settings)))
    assert free
    stop = free[2:4]
    (cut,) = adapter.generate_until(requests("generate_until", ("abc", {**settings, "until": [stop]})))
    assert cut == free[: free.find(stop)]
    assert (cut,) == tuple(adapter.generate_until(requests("generate_until", ("abc", {**settings, "until": [stop]}))))


TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return


@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_the_harness_runs_its_tasks_on_it(adapter: Any, model: Any, tmp_path: Path, offline: None) -> None:
    import json

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [
        {"question": "Ein Haus ist", "choices": [" alt", " neu"], "answer": 0},
        {"question": "Ein Berg ist", "choices": [" hoch", " tief", " nass"], "answer": 2},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, body in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(body.replace("DATA", str(data)))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    result = simple_evaluate(model=adapter, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    assert result is not None
    right = 0
    for row in rows:
        pairs = [(row["question"], choice) for choice in row["choices"]]
        totals = [total for total, _ in adapter.loglikelihood(requests("loglikelihood", *pairs))]
        right += totals.index(max(totals)) == row["answer"]
    assert result["results"]["choice"]["acc,none"] == right / 2
    score = score_texts(model, byte_tokenizer(), [row["question"] for row in rows], context=24, stride=24)
    assert result["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(score.bits_per_byte, rel=1e-6)
