"""Tokens coloured by the expert that took them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from moestro.core.trace import RoutingTrace
from moestro.core.trace_view import SequenceBatch
from moestro.report.plots import pack


MAX_SEQUENCES: Final = 6
MAX_TOKENS: Final = 400  # of one sequence
BUDGET: Final = 150_000  # assignments on the page
COLOURS: Final = 8
_WINDOW: Final = 6


@dataclass
class Passage:
    """One sequence: its number, label, and the text of its tokens with each one's place in the page's data."""

    sequence: int
    tag: str
    tokens: list[str]
    cut: int


@dataclass
class TokenView:
    """Passages with the experts of every layer.

    Attributes:
        colours: class of each token of each passage in the layer shown first. legend: its (expert, tokens, colour).
        data: for the script, layer by layer. decoded: whether the text came from a tokenizer.
    """

    passages: list[Passage]
    colours: list[list[str]]
    legend: list[tuple[int, int, int]]
    layers: list[int]
    first: int
    data: dict[str, Any]
    decoded: bool


def token_view(trace: RoutingTrace, tokenizer: Any) -> TokenView | None:
    """Some sequences of every label; None for a trace without tokens."""
    slots = sum(info.top_k or info.num_experts for info in trace.header.layers)
    chosen = _sequences(trace)
    if not chosen or not slots:
        return None
    length = min(MAX_TOKENS, max(16, BUDGET // (slots * len(chosen))))
    passages, kept = [], []
    for number in chosen:
        view = trace.tokens(number)
        ids = view.token_BS[0].tolist()
        texts = pieces(tokenizer, ids[:length]) if tokenizer is not None else [_bare(item) for item in ids[:length]]
        passages.append(Passage(number, _tag(view), texts, max(0, len(ids) - length)))
        kept.append(view)
    data = {str(layer): _layer(kept, layer, length, trace.layer(layer).num_experts) for layer in trace.layers}
    first = trace.layers[len(trace.layers) // 2]
    colours, legend = _colours(kept, first, length, trace.layer(first).num_experts)
    return TokenView(passages, colours, legend, trace.layers, first, data, tokenizer is not None)


def _bare(token: int) -> str:
    return f"{token} " if token >= 0 else "· "


def _tag(view: SequenceBatch) -> str:
    return next((tag for tag in view.tags[0] if tag), "")


def _sequences(trace: RoutingTrace) -> list[int]:
    """The first sequences of each label, labels in turn, with at least a few tokens each where there are any."""
    found: dict[int, list[int]] = {}
    seen: set[int] = set()
    for block in trace.scan(("sequence", "tag")):
        sequence, first = np.unique(block["sequence"], return_index=True)
        for number, tag in sorted(zip(sequence.tolist(), block["tag"][first].tolist(), strict=True)):
            mine = found.setdefault(tag, [])
            if number not in seen and len(mine) < MAX_SEQUENCES:
                mine.append(number)
            seen.add(number)
        if len(found) >= len(trace.tags) and all(len(mine) >= MAX_SEQUENCES for mine in found.values()):
            break
    order = [numbers[turn] for turn in range(MAX_SEQUENCES) for numbers in found.values() if turn < len(numbers)]
    return order[:MAX_SEQUENCES]


def _real(view: SequenceBatch, layer: int, length: int, experts: int) -> torch.Tensor:
    """Expert ids [S, K] of real experts, -1 elsewhere."""
    expert_SK = view.expert[layer][0, :length]
    return torch.where(expert_SK < experts, expert_SK, -1)


def _layer(views: Sequence[SequenceBatch], layer: int, length: int, experts: int) -> dict[str, Any]:
    """A layer's experts and weights of all passages, one after another: ids plus 1, weights in parts of the largest."""
    wide = max(view.expert[layer].shape[2] for view in views)
    ids, weights = [], []
    for view in views:
        expert_SK, weight_SK = view.expert[layer][0, :length], view.weight[layer][0, :length]
        pad = (0, wide - expert_SK.shape[1])
        ids.append(torch.nn.functional.pad(expert_SK, pad, value=-1).numpy())
        weights.append(torch.nn.functional.pad(weight_SK, pad).numpy())
    weight = np.abs(np.concatenate(weights).astype(np.float64))
    top = float(weight.max()) or 1.0
    return {
        "k": wide,
        "experts": experts,
        "ids": pack(np.concatenate(ids) + 1),
        "top": top,
        "weights": pack(np.round(weight / top * 65535).astype(np.int64)),
    }


def _colours(
    views: Sequence[SequenceBatch], layer: int, length: int, experts: int
) -> tuple[list[list[str]], list[tuple[int, int, int]]]:
    """Classes of tokens by their first expert: a colour for each of the busiest, one grey for the rest."""
    first = [_real(view, layer, length, experts)[:, 0] for view in views]
    flat = torch.cat(first)
    count_E = torch.bincount(flat[flat >= 0], minlength=experts)
    busy = torch.sort(count_E, descending=True, stable=True).indices[:COLOURS].tolist()
    place = {expert: colour for colour, expert in enumerate(busy) if count_E[expert]}
    legend = [(expert, int(count_E[expert]), colour) for expert, colour in place.items()]
    classes = [[f"t{place[e]}" if e in place else ("tn" if e < 0 else "tr") for e in row.tolist()] for row in first]
    return classes, legend


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token so that all together give the decoded text.

    A token's piece is what decoding gains by it; bytes of a character that is not complete yet give "", and the token
    that completes it gets the whole character.
    """
    return list(_gain(tokenizer, ids))


def _gain(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    start = read = 0
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[start:read])
        after = _decode(tokenizer, ids[start:end])
        if after.endswith("\ufffd") and end < len(ids) and end - read < _WINDOW:
            yield ""
            continue
        yield after[len(before) :] if after.startswith(before) else after
        start, read = read, end


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    if not ids:
        return ""
    known = [token for token in ids if token >= 0]
    return str(tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False))
