"""What a decoder asks of an engine: passes of the model over the same text, each with a routing, joined to one row.

Light on purpose: a serving process imports it, and methods that decode are written against it.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError


Kind = Literal["rank", "topk", "random", "threshold", "ratio"]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Route:
    """Another routing than the model's own, in all layers or in some.

    Attributes:
        kind: ``rank``: only the expert that comes k-th (1-based) in what the router ranks; ``topk``: the k best;
            ``random``: one expert, drawn by a hash of the row's own scores; ``threshold``: best first until their
            probabilities sum to ``threshold``; ``ratio``: the model's own choice without those that weigh less than
            ``threshold`` times the first.
        k: of rank and topk. threshold: in (0, 1], of ``ratio`` 0 or more.
        weight: ``model``: the chosen weigh what the model's own rule makes of them (renormalised where it does);
            ``one``: they sum to 1.
        layers: indices of layers; None: all with experts.
        ratios: of ``ratio``, by layer: thresholds of its ranks from the second on, the last one for all ranks behind;
            layers that are not named have ``threshold``. first: so many positions of a text keep all their experts.
    """

    kind: Kind
    k: int = 1
    threshold: float = 1.0
    weight: Literal["model", "one"] = "model"
    layers: tuple[int, ...] | None = None
    ratios: tuple[tuple[int, tuple[float, ...]], ...] = ()
    first: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"a route of kind {self.kind!r}; known are {', '.join(get_args(Kind))}")
        if self.k < 1:
            raise ConfigError(f"k={self.k} of a route; ranks count from 1")
        if self.kind == "ratio":
            odd = [mu for mu in (self.threshold, *(mu for _, row in self.ratios for mu in row)) if not mu >= 0]
            if odd or self.first < 0 or not all(row for _, row in self.ratios):
                raise ConfigError(f"a route by ratios with thresholds {odd or self.ratios}, first={self.first}")
        elif not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold} of a route; it must be in (0, 1]")

    @classmethod
    def parse(cls, text: str, weight: Literal["model", "one"] = "model") -> "Route":
        """``rank:2``, ``topk:3``, ``threshold:0.6``, ``ratio:0.4`` or ``random``.

        Raises:
            ConfigError: none of them.
        """
        kind, _, value = text.partition(":")
        try:
            if kind in ("rank", "topk"):
                return cls(kind="rank" if kind == "rank" else "topk", k=int(value), weight=weight)
            if kind in ("threshold", "ratio"):
                return cls(kind="ratio" if kind == "ratio" else "threshold", threshold=float(value), weight=weight)
            if text == "random":
                return cls(kind="random", weight=weight)
        except ValueError:
            pass
        raise ConfigError(f"route {text!r}; write rank:2, topk:3, threshold:0.6, ratio:0.4 or random")

    def __str__(self) -> str:
        value = {"rank": f":{self.k}", "topk": f":{self.k}", "threshold": f":{self.threshold}",
                 "ratio": f":{self.threshold}"}.get(self.kind, "")  # fmt: skip
        return f"{self.kind}{value}"

    def ratios_of(self, layer: int, ranks: int) -> Floats:
        """Thresholds float32 [ranks] of a layer; the first rank has 0 and always stays."""
        row = dict(self.ratios).get(layer, (self.threshold,))
        found = np.zeros(ranks, dtype=np.float32)
        found[1:] = (*row[: ranks - 1], *(row[-1:] * (ranks - 1 - len(row))))
        return found

    def fits(self, experts: tuple[int, ...]) -> None:
        """Check against the experts of each layer, 0 where there are none.

        Raises:
            ConfigError: no layer has experts, or too few of them.
        """
        chosen = [count for layer, count in enumerate(experts) if self.layers is None or layer in self.layers]
        some = [count for count in chosen if count]
        if not some:
            raise ConfigError(f"route {self} needs a layer with experts; this model has none there")
        if self.kind in ("rank", "topk") and self.k > min(some):
            raise ConfigError(f"route {self} asks for expert number {self.k}; a layer has only {min(some)}")


class Decoder(Protocol):
    """How the logits of one or more passes become the row that a token is chosen from.

    Attributes:
        name: of the method, shown in answers. exact: False when outputs differ from the model's own.
        routes: one pass each over the same tokens, with keys and values of its own; None: the model's routing.
    """

    name: str
    exact: bool
    routes: tuple[Route | None, ...]

    def combine(self, logits: Any) -> Floats:
        """Logits float32 [passes, V] of one position -> [V]; minus infinity closes a token."""


class Plain:
    """The model as it is."""

    name = "plain"
    exact = True
    routes: tuple[Route | None, ...] = (None,)

    def combine(self, logits: Floats) -> Floats:
        """The only row."""
        only: Floats = logits[0]
        return only


PLAIN: Decoder = Plain()
