"""Forecasts that need no method: what the simulator holds others against."""

from collections.abc import Sequence

from moestro.core.forecast import Forecast, Ints, Peek, Wish
from moestro.methods.simulate._parts.rows import Rows


class Nothing(Forecast):
    """Wishes for nothing."""

    name = "none"

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        """See Forecast."""
        return []


class Repeat(Forecast):
    """Wishes for what the rows' sequences chose in the next mixture at their previous token."""

    name = "repeat"

    def meet(self, experts: Sequence[int]) -> None:
        """See Forecast."""
        self.mixtures = [layer for layer, count in enumerate(experts) if count]
        self.last: dict[tuple[int, int], list[int]] = {}

    def begin(self, tokens: Ints, positions: Ints, sequences: Ints) -> list[Wish]:
        """See Forecast."""
        self.rows = sequences.tolist()
        return self._wish(self.mixtures[0])

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        """See Forecast."""
        later = next((other for other in self.mixtures if other > layer), None)
        wishes = [] if later is None else self._wish(later)
        for sequence, chosen in zip(self.rows, ids.tolist(), strict=True):
            self.last[sequence, layer] = [expert for expert in chosen if expert >= 0]
        return wishes

    def forget(self, sequence: int) -> None:
        """See Forecast."""
        self.last = {key: experts for key, experts in self.last.items() if key[0] != sequence}

    def _wish(self, layer: int) -> list[Wish]:
        experts = dict.fromkeys(e for sequence in self.rows for e in self.last.get((sequence, layer), ()))
        return [Wish(layer, tuple(experts))] if experts else []


class Perfect(Nothing):
    """Wishes for what the next mixture will need; it has seen the routes."""

    name = "perfect"

    def __init__(self, rows: Rows) -> None:
        self.needs = iter(rows.needs())
        self.first = next(self.needs)
        self.layers = rows.layers

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        """See Forecast."""
        needed = next(self.needs, [])
        if layer == self.layers[-1] or not needed:
            return []
        return [Wish(needed[0][0], tuple(expert for _, expert in needed))]
