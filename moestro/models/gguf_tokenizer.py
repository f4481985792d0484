"""Tokenizer files (`tokenizer.json`, `tokenizer_config.json`) from the metadata of a GGUF file.

Two kinds of vocabulary are known: byte-level BPE (`gpt2`), whose way of splitting text the file names under
`tokenizer.ggml.pre`, and SentencePiece's BPE (`llama`). A split that is not in the table is refused: guessing
it would give other tokens than the model was trained on, in silence.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from moestro.core.errors import LoadError
from moestro.models.gguf_header import GGUFHeader
from moestro.models.headers import shown


_CONTROL, _USER_DEFINED = 3, 4
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name of the split -> its regular expression; "" is GPT-2's own, "digits" GPT-2's after cutting digits apart.
# Source: llama_vocab::impl::load and llm_tokenizer_bpe of llama.cpp.
SPLITS: Mapping[str, str] = {
    "gpt-2": "",
    "default": "",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "codeshell": "digits",
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
# Vocabularies in which a word that is a token is never built from merges.
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "tekken")


def write_tokenizer(header: GGUFHeader, folder: Path) -> None:
    """Write the tokenizer of a GGUF file into `folder`; a file without one writes nothing. Raises
    `LoadError`.
    """
    meta = _Vocabulary(header)
    if meta.kind is None:
        return
    if meta.kind == "gpt2":
        tokenizer = _byte_level(meta)
    elif meta.kind == "llama":
        tokenizer = _sentencepiece(meta)
    else:
        meta.fail(f"tokenizer {shown(meta.kind)} is not known (known: gpt2, llama)")
    _add_special(tokenizer, meta)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = _tokenizer_config(meta)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


class _Vocabulary:
    """Typed access to `tokenizer.ggml.*`."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header, self.values = header, header.metadata
        self.kind = self.values.get("tokenizer.ggml.model")
        self.split = self.values.get("tokenizer.ggml.pre", "default")
        self.tokens: list[str] = self.strings("tokens") if self.kind else []
        types = self.values.get("tokenizer.ggml.token_type")
        if types is not None and (not isinstance(types, np.ndarray) or len(types) != len(self.tokens)):
            self.fail(f"token_type must hold {len(self.tokens)} numbers, one for each token")
        self.types: list[int] = [] if types is None else types.tolist()

    def fail(self, message: str) -> NoReturn:
        raise LoadError(f"{self.header.path}: {message}")

    def strings(self, key: str) -> list[str]:
        value = self.values.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list):
            self.fail(f"tokenizer.ggml.{key} must be a list of strings")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.values.get(f"tokenizer.ggml.{key}", default))

    def token(self, key: str) -> str | None:
        """The special token whose id stands under `{key}_token_id`."""
        number = self.values.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            return None
        if type(number) is not int or not 0 <= number < len(self.tokens):
            self.fail(f"tokenizer.ggml.{key}_token_id is {shown(number)}, but there are {len(self.tokens)} tokens")
        return self.tokens[number]

    def of_type(self, kind: int) -> list[str]:
        return [token for token, found in zip(self.tokens, self.types, strict=False) if found == kind]

    def numbered(self) -> dict[str, int]:
        """Token -> id. Two ids of one spelling cannot both be reached, so that is an error."""
        vocab = {token: number for number, token in enumerate(self.tokens)}
        if len(vocab) != len(self.tokens):
            twice = next(token for number, token in enumerate(self.tokens) if vocab[token] != number)
            self.fail(f"token {shown(twice)} stands in the vocabulary twice")
        return vocab


def _byte_level(meta: _Vocabulary) -> Tokenizer:
    if meta.split not in SPLITS:
        meta.fail(f"tokenizer.ggml.pre {shown(meta.split)} is not known (known: {', '.join(SPLITS)})")
    ignore = meta.split in _IGNORE_MERGES
    tokenizer = Tokenizer(models.BPE(vocab=meta.numbered(), merges=_merges(meta), ignore_merges=ignore))
    pattern = SPLITS[str(meta.split)]
    first: list[Any] = []
    if pattern == "digits":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif pattern:
        first = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    own = pattern in ("", "digits")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)]
    )
    if pattern == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(meta: _Vocabulary) -> Tokenizer:
    gemma = str(meta.values.get("general.architecture")).startswith("gemma")
    if gemma:
        # Runs of spaces stand there as spaces, all other tokens with SentencePiece's mark.
        meta.tokens = ["▁" * len(token) if token.strip(" ") == "" else token for token in meta.tokens]
    vocab = meta.numbered()
    if "tokenizer.ggml.merges" in meta.values:
        merges = _merges(meta)
    else:
        # Gemma's merges go in the order of the vocabulary, those of other files by score.
        order = [-float(number) for number in range(len(vocab))] if gemma else _scores(meta)
        merges = implied_merges(vocab, order)
    unknown = meta.token("unknown")
    model = models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=unknown)
    tokenizer = Tokenizer(model)
    decoder: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        prefix = meta.flag("add_space_prefix", True)
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        decoder += [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(decoder)
    return tokenizer


def _scores(meta: _Vocabulary) -> list[float]:
    scores = meta.values.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(meta.tokens):
        meta.fail(f"tokenizer.ggml.scores must hold {len(meta.tokens)} numbers, one for each token")
    return [float(score) for score in scores]


def implied_merges(vocab: Mapping[str, int], order: list[float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece vocabulary implies: every way to build a token from two tokens.

    `order[id]` ranks the built token (higher is merged first); among the ways to build one token the longer
    left part comes first, then the lower ids.
    """
    ranked = []
    for token, number in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-order[number], -cut, cut - len(token), number, left, right))
    ranked.sort(key=lambda merge: merge[:4])
    return [(left, right) for *_, left, right in ranked]


def _merges(meta: _Vocabulary) -> list[tuple[str, str]]:
    """The merges of the file; both parts and the whole of each must be tokens, or the library would panic."""
    vocab = meta.numbered()
    merges = []
    for merge in meta.strings("merges"):
        left, space, right = merge.partition(" ")
        if not space or " " in right:
            meta.fail(f"merge {shown(merge)} is not a pair with one space between")
        for part in (left, right, left + right):
            if part not in vocab:
                meta.fail(f"merge {shown(merge)} needs the token {shown(part)}, which is not there")
        merges.append((left, right))
    return merges


def _add_special(tokenizer: Tokenizer, meta: _Vocabulary) -> None:
    """Control tokens are special, user-defined ones only whole; BOS and EOS are added where the file says
    so.
    """
    named = {meta.token(key) for key in ("bos", "eos", "unknown", "padding")} - {None}
    control = [token for token in meta.tokens if token in named] if not meta.types else meta.of_type(_CONTROL)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    whole = meta.of_type(_USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])
    # llama.cpp adds BOS to SentencePiece vocabularies that say nothing.
    begin = meta.token("bos") if meta.flag("add_bos_token", meta.kind == "llama") else None
    end = meta.token("eos") if meta.flag("add_eos_token", False) else None
    if begin is None and end is None:
        return
    around = [f"{part}" for part in (begin, "$A", end) if part is not None]
    pair = [*around, *(f"{part}:1" for part in (begin, "$B", end) if part is not None)]
    ids = [(token, tokenizer.token_to_id(token)) for token in (begin, end) if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, pair=pair, special_tokens=list(dict.fromkeys(ids))
    )


def _tokenizer_config(meta: _Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config |= {name: token for name, key in names.items() if (token := meta.token(key)) is not None}
    length = meta.values.get(f"{meta.values.get('general.architecture')}.context_length")
    if type(length) is int:
        config["model_max_length"] = length
    template = meta.values.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return config
