"""Tokenizers built from GGUF metadata: hand-made vocabularies with outcomes worked out by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from moestro.core.errors import LoadError
from moestro.models.gguf_header import GGUFHeader
from moestro.models.gguf_tokenizer import SPLITS, implied_merges, write_tokenizer


BYTES = ["Ġ", "a", "b", "c", "1", "2", "é"[0]]


def header(values: dict[str, Any], arch: str = "llama") -> GGUFHeader:
    metadata = {f"tokenizer.{key}": value for key, value in values.items()}
    return GGUFHeader(
        Path("x.gguf"), 3, {"general.architecture": arch, f"{arch}.context_length": 77, **metadata}, {}, 0
    )


def byte_level(**changes: Any) -> GGUFHeader:
    tokens = ["<s>", "<|end|>", "<think>", *BYTES, "ab", "Ġab", "abc", "12"]
    values = {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": np.array([3, 3, 4] + [1] * (len(tokens) - 3)),
        "ggml.merges": ["a b", "Ġ ab", "ab c", "1 2"],
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return header({key: value for key, value in values.items() if value is not None})


def built(source: GGUFHeader, folder: Path) -> Tokenizer:
    write_tokenizer(source, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_byte_level_merges_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = built(byte_level(), tmp_path)
    assert tokenizer.encode("abc ab<|end|>a<think>b").tokens == ["abc", "Ġab", "<|end|>", "a", "<think>", "b"]
    ids = tokenizer.encode("abc ab<|end|>a<think>b").ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "abc ab<|end|>a<think>b"
    # Control tokens are special, user-defined ones are text.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abc aba<think>b"


def test_the_named_split_decides_how_digits_are_cut(tmp_path: Path) -> None:
    outcomes = {}
    for split in ("gpt-2", "smollm", "qwen2", "llama-bpe"):
        outcomes[split] = built(byte_level(ggml__pre=split), tmp_path).encode("12 12").tokens
    assert outcomes["gpt-2"] == ["12", "Ġ", "12"]  # " 12" is one word; there is no token for it
    assert outcomes["llama-bpe"] == ["12", "Ġ", "12"]
    assert outcomes["smollm"] == ["1", "2", "Ġ", "1", "2"]
    assert outcomes["qwen2"] == ["1", "2", "Ġ", "1", "2"]


def test_llama3_takes_whole_words_before_merges(tmp_path: Path) -> None:
    # Without the merge "ab c" the token "abc" can only be reached as a whole word.
    merges = ["a b", "Ġ ab", "1 2"]
    assert built(byte_level(ggml__merges=merges), tmp_path).encode("abc").tokens == ["ab", "c"]
    taken = built(byte_level(ggml__merges=merges, ggml__pre="llama-bpe"), tmp_path)
    assert taken.encode("abc").tokens == ["abc"]


def test_every_split_of_the_table_builds(tmp_path: Path) -> None:
    for split in SPLITS:
        tokenizer = built(byte_level(ggml__pre=split), tmp_path)
        assert tokenizer.decode(tokenizer.encode("abc 12 ab").ids) == "abc 12 ab"


def test_begin_and_end_are_added_where_the_file_says_so(tmp_path: Path) -> None:
    both = built(byte_level(ggml__add_bos_token=True, ggml__add_eos_token=True), tmp_path)
    assert both.encode("a").tokens == ["<s>", "a", "<|end|>"]
    assert both.encode("a", "b").tokens == ["<s>", "a", "<|end|>", "<s>", "b", "<|end|>"]
    assert both.encode("a", add_special_tokens=False).tokens == ["a"]
    assert built(byte_level(), tmp_path).encode("a").tokens == ["a"]


def sentencepiece(arch: str = "llama", **changes: Any) -> GGUFHeader:
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>", "▁", "a", "b", "▁a", "ab", "▁ab", "ba"]
    scores = [0.0, 0, 0, 0, 0, 0, -9, -9, -9, -3, -2, -1, -0.5]
    types = [2, 3, 3, 6, 6, 6] + [1] * (len(tokens) - 6)
    values = {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": np.array(scores, np.float32),
        "ggml.token_type": np.array(types),
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return header({key: value for key, value in values.items() if value is not None}, arch)


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    tokenizer = built(sentencepiece(), tmp_path)
    # "ba" scores higher than "▁ab" and "ab", so it is merged first.
    assert tokenizer.encode("ab").tokens == ["<s>", "▁ab"]
    assert tokenizer.encode("aba").tokens == ["<s>", "▁a", "ba"]
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    for words in ("ab a\nb", "é ab"):
        assert tokenizer.decode(tokenizer.encode(words).ids) == words


def test_sentencepiece_without_a_leading_space(tmp_path: Path) -> None:
    tokenizer = built(sentencepiece(ggml__add_space_prefix=False, ggml__add_bos_token=False), tmp_path)
    assert tokenizer.encode("ab ab").tokens == ["ab", "▁ab"]


def test_gemma_merges_in_the_order_of_the_vocabulary_and_reads_runs_of_spaces(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "ba", "  "]
    source = sentencepiece(
        "gemma3",
        ggml__tokens=tokens,
        ggml__scores=np.zeros(len(tokens), np.float32),
        ggml__token_type=np.array([2, 3, 3, 1, 1, 1, 1, 1, 4]),
    )
    tokenizer = built(source, tmp_path)
    # "ab" comes before "ba" in the vocabulary.
    assert tokenizer.encode("aba").tokens == ["<s>", "ab", "a"]
    assert tokenizer.encode("a  a").tokens == ["<s>", "a", "▁▁", "a"]
    assert tokenizer.decode(tokenizer.encode("a  a").ids) == "a  a"


def test_implied_merges_are_ordered_by_rank_then_longest_left() -> None:
    vocab = {token: number for number, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    assert implied_merges(vocab, [0, 0, 0, 1, 2, 3]) == [("ab", "c"), ("a", "bc"), ("b", "c"), ("a", "b")]


def test_transformers_opens_the_folder(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    write_tokenizer(byte_level(ggml__padding_token_id=1, ggml__add_bos_token=True, chat_template=template), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "<|end|>", "<|end|>")
    assert tokenizer("abc")["input_ids"] == [0, 12]
    assert tokenizer.model_max_length == 77
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_file_without_a_tokenizer_writes_nothing(tmp_path: Path) -> None:
    write_tokenizer(header({}), tmp_path)
    assert list(tmp_path.iterdir()) == []


BAD = [
    ({"ggml__model": "rwkv"}, "tokenizer 'rwkv' is not known"),
    ({"ggml__pre": "someone's own"}, "tokenizer.ggml.pre .* is not known"),
    ({"ggml__tokens": None}, r"tokenizer\.ggml\.tokens must be a list"),
    ({"ggml__tokens": 3}, r"tokenizer\.ggml\.tokens must be a list"),
    ({"ggml__token_type": np.array([1, 2])}, "token_type must hold 14 numbers"),
    ({"ggml__merges": None}, r"tokenizer\.ggml\.merges must be a list"),
    ({"ggml__merges": ["a b c"]}, "is not a pair"),
    ({"ggml__merges": ["ab"]}, "is not a pair"),
    ({"ggml__merges": ["a z"]}, "needs the token 'z'"),
    ({"ggml__merges": ["a c"]}, "needs the token 'ac'"),
    ({"ggml__bos_token_id": 99}, "bos_token_id is 99, but there are 14 tokens"),
    ({"ggml__eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ({"ggml__tokens": ["a"] * 14}, "token 'a' stands in the vocabulary twice"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_vocabulary_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        write_tokenizer(byte_level(**changes), tmp_path)


def test_scores_must_fit_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="scores must hold 13 numbers"):
        write_tokenizer(sentencepiece(ggml__scores=np.zeros(3)), tmp_path)
