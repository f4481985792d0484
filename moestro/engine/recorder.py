"""Writing down what passes a forward: tokens, routes, and what later gates say, for simulations and studies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moestro.core.forecast import Forecast, Ints, Peek, Recorded, Wish


class Recorder(Forecast):
    """A forecast that wishes for nothing, or for what another one does, and remembers.

    Args:
        ahead: mixtures behind each whose gates are asked. other: speaks in its place.
    """

    def __init__(self, ahead: int = 1, other: Forecast | None = None) -> None:
        self.name = "recorder" if other is None else other.name
        self.ahead, self.other = ahead, other
        self._rows: list[Any] = []
        self._routes: dict[int, list[Any]] = {}
        self._peeks: dict[tuple[int, int], list[Any]] = {}

    def meet(self, experts: Sequence[int]) -> None:
        """See Forecast."""
        self.experts = tuple(experts)
        self.mixtures = [layer for layer, count in enumerate(experts) if count]
        if self.other is not None:
            self.other.meet(experts)

    def ready(self, experts: Sequence[int], choices: Sequence[int]) -> None:
        """See Forecast."""
        if self.other is not None:
            self.other.ready(experts, choices)

    def begin(self, tokens: Ints, positions: Ints, sequences: Ints) -> list[Wish]:
        """See Forecast."""
        self._rows.append(np.stack([tokens, positions, sequences]))
        return [] if self.other is None else self.other.begin(tokens, positions, sequences)

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        """See Forecast."""
        self._routes.setdefault(layer, []).append(ids.copy())
        at = self.mixtures.index(layer) + 1
        for later in self.mixtures[at : at + self.ahead]:
            self._peeks.setdefault((layer, later), []).append(peek(later).copy())
        return [] if self.other is None else self.other.routed(layer, ids, peek)

    def settled(self, layer: int, ids: Ints) -> list[Wish]:
        """See Forecast."""
        return [] if self.other is None else self.other.settled(layer, ids)

    def forget(self, sequence: int) -> None:
        """See Forecast."""
        if self.other is not None:
            self.other.forget(sequence)

    def recorded(self) -> Recorded:
        """All rows so far, in the order in which they ran."""
        rows = np.concatenate([np.zeros((3, 0), np.int32), *self._rows], axis=1)
        return Recorded(
            tokens=rows[0],
            positions=rows[1],
            sequences=rows[2],
            routes={layer: np.concatenate(parts) for layer, parts in self._routes.items()},
            experts=self.experts,
            peeks={pair: np.concatenate(parts) for pair, parts in self._peeks.items()},
        )

    def save_peeks(self, path: Path) -> None:
        """An ``.npz`` as ``simulate.prefetch`` reads it: ``sequence``, ``position``, ``token`` [T], ``routes.L``
        [T, k], ``peek.L.M`` [T, E].
        """
        told = self.recorded()
        arrays: dict[str, Any] = {"sequence": told.sequences, "position": told.positions, "token": told.tokens}
        arrays |= {f"routes.{layer}": ids for layer, ids in told.routes.items()}
        arrays |= {f"peek.{layer}.{later}": scores for (layer, later), scores in told.peeks.items()}
        with path.open("wb") as file:
            np.savez(file, **arrays)
