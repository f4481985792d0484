"""Which tokens run together in the next step, out of those that wait.

Light on purpose: a serving process imports it, and methods that batch are written against it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Pending:
    """Tokens of one sequence that have not run, in order; a step takes the first few of them, or none.

    Attributes:
        count: their number, at least 1. writing: it is the next token of a text; else they are of a prompt.
        waited: seconds since some of the sequence ran, or since it came. experts: of the tokens, int32 [n] with n up to
            ``count``; None where the model does not tell before it runs.
    """

    count: int
    writing: bool
    waited: float = 0.0
    experts: Ints | None = None


class Batcher(Protocol):
    """Chooses what runs.

    Attributes:
        name: id of the method. needs_experts: ``take`` wants to know the experts.
    """

    name: str
    needs_experts: bool

    def take(self, pending: Sequence[Pending], rows: int) -> list[int]:
        """How many tokens of each sequence run, ``rows`` together at most, at least one where there is any."""


def in_order(pending: Sequence[Pending], rows: int, *, writing_first: bool = True) -> list[int]:
    """Next tokens first, then prompts as they came."""
    order = sorted(range(len(pending)), key=lambda i: writing_first and not pending[i].writing)
    taken = [0] * len(pending)
    for index in order:
        taken[index] = min(pending[index].count, rows)
        rows -= taken[index]
    return taken
