"""Tokenizers that need no download: bytes, and a small BPE learned from the training text.

Both are ordinary Transformers tokenizers (``PreTrainedTokenizerFast``), so they are saved beside a model, and
``generate``, evaluation and every other verb use them like a downloaded one.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moestro.core.errors import ConfigError, DataError, LoadError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOS = "<|end|>"
PAD = "<|pad|>"
MASK = "<|mask|>"
SPECIALS = (EOS, PAD, MASK)

_cache: dict[str, str] = {}  # key of a training run -> the tokenizer as JSON


def byte_tokenizer() -> "PreTrainedTokenizerBase":
    """One token a byte: 256 byte tokens (in the order of the byte-level alphabet) and three specials, 259 in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate((*SPECIALS, *alphabet))}
    return _wrap(_byte_level(Tokenizer(models.BPE(vocab=vocabulary, merges=[]))))


def train_bpe(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerBase":
    """Learn a byte-level BPE from ``texts``; the same texts and size give the same tokenizer, and are learned once.

    Args:
        texts: the training documents.
        vocab_size: tokens in all, at least 259 (256 bytes and three specials). Short texts may give fewer.

    Raises:
        ConfigError: ``vocab_size`` is under 259.
        DataError: no text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    smallest = 256 + len(SPECIALS)
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size={vocab_size} is under {smallest}, the 256 bytes and {len(SPECIALS)} specials")
    documents = list(texts)
    if not any(documents):
        raise DataError("no text to learn a tokenizer from")
    digest = hashlib.sha256(str(vocab_size).encode())
    for document in documents:
        digest.update(hashlib.sha256(document.encode("utf-8")).digest())
    key = digest.hexdigest()
    if key not in _cache:
        tokenizer = _byte_level(Tokenizer(models.BPE()))
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        _cache[key] = tokenizer.to_str()
    return _wrap(Tokenizer.from_str(_cache[key]))


def open_tokenizer(where: str | Path, **options: Any) -> "PreTrainedTokenizerBase":
    """The tokenizer that Transformers finds in a folder or under a hub id.

    Args:
        options: of ``from_pretrained``.

    Raises:
        LoadError: there is none, or its files are damaged.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    except Exception as error:
        # Tokenizer files fail in as many ways as there are kinds of them; all mean that this one cannot be used.
        reason = " ".join(str(error).split())[:200]
        raise LoadError(f"{where}: its tokenizer cannot be opened ({type(error).__name__}: {reason})") from None
    return tokenizer


def encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [list(row) for row in ids]


def separator_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that ends a document: end of sequence, else SEP (encoders), else start of sequence.

    Raises:
        DataError: the tokenizer has none of them.
    """
    for name in ("eos_token_id", "sep_token_id", "bos_token_id"):
        value = getattr(tokenizer, name)
        if value is not None:
            return int(value)
    raise DataError("the tokenizer has no end, separator or start token; documents cannot be told apart")


def _byte_level(tokenizer: Any) -> Any:
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Any) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )
