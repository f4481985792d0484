"""Recording a trace over texts: what ``moestro trace`` does."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.errors import DataError
from moestro.core.session import session
from moestro.core.trace import RoutingTrace, trace
from moestro.observe.identity import model_hash


@dataclass(frozen=True)
class Piece:
    """A run of at most ``length`` tokens of one document, and the label of its source."""

    label: str
    ids: list[int]


def pieces(tokenizer: Any, sources: Mapping[str, Sequence[str]], *, length: int, limit: int | None) -> list[Piece]:
    """Documents cut into pieces, source by source.

    Args:
        sources: label -> documents. length: tokens of a piece at most. limit: tokens of a source at most.

    Raises:
        DataError: a source without a token.
    """
    found: list[Piece] = []
    for label, documents in sources.items():
        room = limit
        before = len(found)
        for document in documents:
            ids = tokenizer(document, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
            ids = ids if room is None else ids[:room]
            found += [Piece(label, ids[at : at + length]) for at in range(0, len(ids), length)]
            room = None if room is None else room - len(ids)
            if room is not None and room <= 0:
                break
        if len(found) == before:
            raise DataError(f"data {label!r} holds no token")
    return found


def record(
    model: nn.Module,
    tokenizer: Any,
    sources: Mapping[str, Sequence[str]],
    path: str | Path | None,
    /,
    *,
    length: int = 512,
    rows: int = 4,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **header: Any,
) -> RoutingTrace:
    """Run texts through a model and record where each token goes; labels become tags.

    The head is left out where the model has one, since routing does not need it. A model with encoder and decoder reads
    the text on both sides.

    Args:
        sources: label -> documents. path: folder to make, None for memory.
        length: tokens of a sequence at most. rows: sequences of a batch. limit: tokens of a source at most.
        progress: called with (tokens done, tokens in all) after each batch.
        header: model, model_hash, tokenizer, tokenizer_hash, facts for the trace's header.

    Raises:
        DataError: a source without a token. TraceError: no mixture layer, or the target exists.
    """
    config: Any = getattr(model, "config", None)
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    chosen = pieces(tokenizer, sources, length=length, limit=limit)
    total, done = sum(len(piece.ids) for piece in chosen), 0
    stack = getattr(model, "base_model", model)
    facts = {"length": length, "rows": rows, **header.pop("facts", {})}
    named = {"model_hash": model_hash(model), **header, "facts": facts}
    training = model.training
    model.eval()
    try:
        with trace(model, path, **named) as found, torch.no_grad():
            for batch, labels in _batches(chosen, rows, tokenizer, _device(model)):
                if getattr(config, "is_encoder_decoder", False):
                    batch |= {f"decoder_{name}": value for name, value in batch.items()}
                with session(tags={"tag": labels}):
                    stack(**batch)
                done += int(batch["attention_mask"].sum())
                if progress is not None:
                    progress(done, total)
    finally:
        model.train(training)
    return found


def tokenizer_hash(folder: str | Path) -> str | None:
    """SHA-256 over the tokenizer's files in a folder; None when there are none."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")
    digest, any_file = hashlib.sha256(), False
    for name in names:
        file = Path(folder) / name
        if file.is_file():
            any_file = True
            digest.update(name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest() if any_file else None


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _batches(
    chosen: Sequence[Piece], rows: int, tokenizer: Any, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """Batches padded on the right, with the label of each row."""
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    for start in range(0, len(chosen), rows):
        part = chosen[start : start + rows]
        width = max(len(piece.ids) for piece in part)
        ids = torch.full((len(part), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, piece in enumerate(part):
            ids[row, : len(piece.ids)] = torch.tensor(piece.ids)
            mask[row, : len(piece.ids)] = 1
        yield {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, [piece.label for piece in part]
