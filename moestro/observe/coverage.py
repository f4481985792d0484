"""Did the calibration data reach every expert? Methods that calibrate ask before they trust their statistics."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.core.errors import PlanError


@dataclass(frozen=True)
class Coverage:
    """Tokens by expert of one layer.

    Attributes:
        layer: site or number. smallest, median, largest: tokens of an expert. starved: experts below ``least``.
    """

    layer: str
    num_experts: int
    smallest: int
    median: float
    largest: int
    least: int
    starved: tuple[int, ...]

    def __str__(self) -> str:
        named = ", ".join(map(str, self.starved[:12])) + (", ..." if len(self.starved) > 12 else "")
        tail = f"; {len(self.starved)} below {self.least}: {named}" if self.starved else ""
        return f"{self.layer}: {self.smallest} to {self.largest} tokens an expert, median {self.median:g}{tail}"

    @property
    def poor(self) -> bool:
        """Whether half of the experts or more are starved: too little to rest a decision on."""
        return bool(self.starved) and 2 * len(self.starved) >= self.num_experts

    def refusal(self, tokens: int, how: str, more: str = "", wider: str = "") -> PlanError:
        """What to raise for a poor layer.

        Args:
            tokens: of the data. how: they were counted. more: on other layers. wider: a way to count more of them.
        """
        return PlanError(
            f"calibration on {tokens} tokens ({how}) gives {len(self.starved)} of {self.num_experts} experts of "
            f"{self.layer} fewer than {self.least} tokens{more}; give more data{wider}, or set allow_starved=true"
        )


def coverage(counts: Mapping[str, Tensor] | Mapping[int, Tensor], least: int = 1) -> list[Coverage]:
    """One row a layer.

    Args:
        counts: layer -> tokens of each expert, int64 [E]: ``trace.loads()``, or ``{site: s.count_E}`` of statistics.
        least: an expert with fewer tokens is starved.
    """
    rows = []
    for layer, count_E in counts.items():
        starved = (count_E < least).nonzero().squeeze(1).tolist()
        rows.append(
            Coverage(
                layer=str(layer),
                num_experts=len(count_E),
                smallest=int(count_E.min()),
                median=float(torch.quantile(count_E.double(), 0.5)),
                largest=int(count_E.max()),
                least=least,
                starved=tuple(starved),
            )
        )
    return rows
