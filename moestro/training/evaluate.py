"""Perplexity and bits per byte with a sliding window, every token accounted for exactly once.

A document, with a start token before it where the tokenizer has one, is run through the model in windows of
``context`` tokens that move on by ``stride``; of each window only the predictions that no earlier window made count, so
that each token is predicted from more than ``context - stride`` tokens before it (fewer only where a document begins).

    perplexity    exp(sum of -ln p / tokens scored)
    bits per byte sum of -log2 p / UTF-8 bytes of the text scored

Without a start token a document's first token has nothing before it: it is not scored, and the bytes it stands for are
not counted either. Bits per byte do not depend on the tokenizer; perplexities of two tokenizers cannot be compared.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.core.errors import ConfigError, DataError
from moestro.core.forward import logits_of
from moestro.core.session import session
from moestro.data.packing import IGNORE, pad
from moestro.training.objectives import pad_id


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CONTEXT = 512
BYTE_FALLBACK = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Window:
    """One forward's row: all but the last of ``ids`` are run, the last ``scored`` are predictions that count.

    ``document`` is the number of the text they belong to.
    """

    ids: tuple[int, ...]
    scored: int
    document: int


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts text.

    Attributes:
        documents, tokens, bytes: what was scored. nats: sum of -ln p. perplexity, bits_per_byte: see the module.
        context, stride: of the windows.
    """

    documents: int
    tokens: int
    bytes: int
    nats: float
    perplexity: float
    bits_per_byte: float
    context: int
    stride: int

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def score_texts(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    *,
    context: int = DEFAULT_CONTEXT,
    stride: int | None = None,
    batch_size: int = 8,
) -> TextScore:
    """Perplexity and bits per byte of ``texts``, document by document.

    Args:
        model: a causal language model. context: tokens of a window, at most what the model was made for.
        stride: tokens by which windows move on; default ``context // 2``; ``context``: they do not overlap.

    Raises:
        ConfigError: a window or stride that cannot be. DataError: nothing to score.
    """
    stride = check_windows(model, context, stride)
    start = start_token(tokenizer)
    rows: list[Window] = []
    num_bytes = 0
    for number, text in enumerate(texts):
        ids, counted = document_ids(tokenizer, text, start)
        num_bytes += counted
        rows += windows(ids, context, stride, number)
    tokens = sum(row.scored for row in rows)
    if not tokens or not num_bytes:
        raise DataError(f"nothing to score: {len(texts)} documents hold no token that has another before it")
    nats = sum(-float(part.sum(dtype=torch.float64)) for part, _ in window_logprobs(model, tokenizer, rows, batch_size))
    return TextScore(
        documents=len({row.document for row in rows}),
        tokens=tokens,
        bytes=num_bytes,
        nats=nats,
        perplexity=math.exp(min(nats / tokens, 700.0)),
        bits_per_byte=nats / math.log(2) / num_bytes,
        context=context,
        stride=stride,
    )


def check_windows(model: nn.Module, context: int, stride: int | None) -> int:
    """The stride in force. Raises ConfigError for windows that cannot be, or a model that predicts no next token."""
    if hasattr(model, "can_generate") and (not model.can_generate() or model.config.is_encoder_decoder):
        raise ConfigError(
            f"{type(model).__name__} does not predict the next token of a text; give a causal language model"
        )
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if context < 1:
        raise ConfigError(f"context={context}: a window needs at least 1 token")
    if isinstance(limit, int) and context > limit:
        raise ConfigError(f"context={context} is above the {limit} positions of this model; use {limit} or less")
    found = max(1, context // 2) if stride is None else stride
    if not 1 <= found <= context:
        raise ConfigError(f"stride={found} must lie between 1 and context={context}")
    return found


def start_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """What stands before a document: its start token, else the end token that closed the one before it; or nothing."""
    for value in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return None


def document_ids(tokenizer: "PreTrainedTokenizerBase", text: str, start: int | None) -> tuple[list[int], int]:
    """Token ids of a document, start token included, and how many bytes of the text its scored tokens stand for."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    total = len(text.encode("utf-8"))
    if start is not None:
        return [start, *ids], total if ids else 0
    if len(ids) < 2:
        return ids, 0
    return ids, total - _first_bytes(tokenizer, text, ids)


def _first_bytes(tokenizer: "PreTrainedTokenizerBase", text: str, ids: Sequence[int]) -> int:
    """UTF-8 bytes that the first of at least two tokens stands for; a character may span several tokens.

    Byte-level tokenizers write one symbol a byte, and byte fallback writes <0xNN>: offsets, which count characters,
    cannot tell the tokens of one character apart there.
    """
    total = len(text.encode("utf-8"))
    symbols = [str(symbol) for symbol in tokenizer.convert_ids_to_tokens(list(ids))]
    if not tokenizer.is_fast:
        return min(total, len(tokenizer.decode(ids[:1]).encode("utf-8")))
    if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) and sum(map(len, symbols)) == total:
        return len(symbols[0])
    if BYTE_FALLBACK.fullmatch(symbols[0]):
        return 1
    offsets = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    return len(text[: min(offsets[0][1], max(offsets[1][0], offsets[0][0]))].encode("utf-8"))


def windows(ids: Sequence[int], context: int, stride: int, document: int = 0) -> Iterator[Window]:
    """Cut one document; each token but the first is scored in exactly one window.

    The first window scores all it can; every later one scores ``stride`` more tokens (the last may score fewer).
    """
    done = 1  # tokens scored or standing first
    while done < len(ids):
        end = min(len(ids), context + 1 if done == 1 else done + stride)
        begin = max(0, end - context - 1)
        yield Window(tuple(ids[begin:end]), end - done, document)
        done = end


def window_logprobs(
    model: nn.Module, tokenizer: "PreTrainedTokenizerBase | None", rows: Sequence[Window], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each window in order: log probabilities of its scored tokens, and whether each was the likeliest.

    Windows of similar length run together, padded on the right and masked. The model runs in evaluation mode, without
    gradient, unseen by collectors of losses.
    """
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].ids))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    filler = 0 if tokenizer is None else pad_id(tokenizer)
    training = model.training
    model.eval()
    try:
        for at in range(0, len(order), batch_size):
            places = order[at : at + batch_size]
            ids_BS, mask_BS = pad([rows[place].ids[:-1] for place in places], filler)
            batch = {"input_ids": ids_BS}
            if not bool(mask_BS.all()):
                batch["attention_mask"] = mask_BS
            with torch.no_grad(), session(collect=False):
                logits_BSV = logits_of(model, batch)
            for line, place in enumerate(places):
                found[place] = _scored(logits_BSV[line], rows[place])
    finally:
        model.train(training)
    yield from (found[place] for place in range(len(rows)))


def _scored(logits_SV: Tensor, row: Window) -> tuple[Tensor, Tensor]:
    end = len(row.ids)
    first = end - row.scored
    picked = logits_SV[first - 1 : end - 1].float()
    targets = torch.tensor(row.ids[first:])
    logprobs = -F.cross_entropy(picked, targets, ignore_index=IGNORE, reduction="none")
    return logprobs, picked.argmax(-1) == targets
