"""Which sequence each token of a forward belongs to, numbered over the life of a recording.

A trace and its replay number sequences by the same rule, so the n-th sequence met while recording is the n-th sequence
met while replaying, whatever the batch size:

* a batch row that holds tokens is a new sequence, rows in order;
* a row whose forward runs on a cache seen before (the same Transformers cache object, as many rows) goes on with its
  sequence, positions continuing. Beam search reorders rows inside the cache, so a beam's sequence is what ran in that
  row, step by step;
* inside a row, positions that do not grow start another sequence (packed documents). Packed rows inside ``ctx.subset``
  are told apart by the tokens the subset kept.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from moestro.core.context import RoutingContext
from moestro.core.errors import TraceError
from moestro.core.tokens import Tokens


PADDING = -1

Ints = NDArray[np.int64]


@dataclass(slots=True)
class _Forward:
    """What is known of one context: ids by (row, segment in the row), and how often each site ran."""

    number: int
    decode: bool
    ids: dict[tuple[int, int], int]
    tokens: Tokens | None = None
    sequence_T: Ints | None = None
    num_valid: int = 0
    calls: dict[str, int] = field(default_factory=dict)


class SequenceBook:
    """Numbers sequences and forwards. One book a recording or a replay."""

    def __init__(self) -> None:
        self.num_sequences = 0
        self.num_forwards = 0
        self.num_tokens = 0
        self._forwards: WeakKeyDictionary[RoutingContext, _Forward] = WeakKeyDictionary()
        self._caches: WeakKeyDictionary[Any, dict[str, tuple[int, dict[int, int]]]] = WeakKeyDictionary()

    def sequences(self, ctx: RoutingContext) -> Ints:
        """The sequence of each token of ``ctx``, int64 [T]; ``PADDING`` (-1) for tokens that are not valid."""
        tokens = ctx.tokens
        if tokens is None:
            raise TraceError(f"stack {ctx.stack!r} has no tokens yet; record after its first layer saw its input")
        forward = self.forward(ctx)
        if forward.tokens is not tokens or forward.sequence_T is None:
            forward.tokens, forward.sequence_T = tokens, self._assign(forward, tokens)
            num_valid = int((forward.sequence_T != PADDING).sum())
            self.num_tokens += max(0, num_valid - forward.num_valid)
            forward.num_valid = max(num_valid, forward.num_valid)
            self._remember(ctx, forward, tokens)
        return forward.sequence_T

    def forward(self, ctx: RoutingContext) -> _Forward:
        """The book's page for this forward; opened on first sight."""
        forward = self._forwards.get(ctx)
        if forward is None:
            known = self._cached(ctx)
            forward = _Forward(self.num_forwards, bool(known), {(row, 0): seq for row, seq in known.items()})
            self.num_forwards += 1
            self._forwards[ctx] = forward
        return forward

    def call(self, ctx: RoutingContext, site: str) -> int:
        """Which run of ``site`` in this forward this is, from 0 (a looped layer runs several times)."""
        calls = self.forward(ctx).calls
        number = calls.get(site, 0)
        calls[site] = number + 1
        return number

    def _assign(self, forward: _Forward, tokens: Tokens) -> Ints:
        valid_T = tokens.valid_T.cpu().numpy()
        row_V: Ints = tokens.row_T.cpu().numpy()[valid_T]
        position_V: Ints = tokens.position_T.cpu().numpy()[valid_T]
        sequence_T = np.full(valid_T.shape, PADDING, dtype=np.int64)
        if row_V.size == 0:
            return sequence_T
        new_row_V = np.diff(row_V, prepend=row_V[0] - 1) != 0
        starts_V = new_row_V | (np.diff(position_V, prepend=position_V[0]) <= 0)
        segment_V = np.cumsum(starts_V) - 1
        row_S = row_V[starts_V]
        first_S = np.flatnonzero(new_row_V[starts_V])  # the first segment of each row
        place_S = np.arange(row_S.size) - np.repeat(first_S, np.diff(first_S, append=row_S.size))
        ids_S = [self._id(forward, int(row), int(place)) for row, place in zip(row_S, place_S, strict=True)]
        sequence_T[valid_T] = np.asarray(ids_S, dtype=np.int64)[segment_V]
        return sequence_T

    def _id(self, forward: _Forward, row: int, place: int) -> int:
        key = (row, place)
        if key not in forward.ids:
            forward.ids[key] = self.num_sequences
            self.num_sequences += 1
        return forward.ids[key]

    def _cached(self, ctx: RoutingContext) -> dict[int, int]:
        """Row -> sequence of the forward that filled this cache last; empty for a cache that is new or outgrown."""
        if ctx.cache is None or ctx.tokens is None or not _remembers(ctx.cache):
            return {}
        num_rows, rows = self._caches.get(ctx.cache, {}).get(ctx.stack, (0, {}))
        return dict(rows) if num_rows == ctx.tokens.num_rows else {}

    def _remember(self, ctx: RoutingContext, forward: _Forward, tokens: Tokens) -> None:
        if ctx.cache is None or not _remembers(ctx.cache):
            return
        last = {row: forward.ids[(row, place)] for row, place in sorted(forward.ids)}
        self._caches.setdefault(ctx.cache, {})[ctx.stack] = (tokens.num_rows, last)


def _remembers(cache: Any) -> bool:
    """Whether a cache object can be recognised again: legacy tuples cannot."""
    return hasattr(cache, "get_seq_length") and hasattr(cache, "__weakref__")
