"""What says ahead which experts later layers will need, so that they can be read while others compute.

A forecast may be wrong: outputs never depend on it, only waiting does. Light on purpose: a serving process imports it,
and methods that forecast are written against it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Peek = Callable[[int], Floats]
"""later layer -> what that layer's own gate ranks, float32 [R, E], if it were given the present layer's input: logits,
or with a selection bias sigmoid(logits) + bias; minus infinity for what its groups close."""


@dataclass(frozen=True)
class Wish:
    """Experts that a layer may need.

    Attributes:
        experts: each once, the most probable first. priority: at least 1; lower ones are read first.
    """

    layer: int
    experts: tuple[int, ...]
    priority: int = 1


class Forecast(Protocol):
    """Says ahead which experts later layers will need.

    The wishes of one call replace what was wished before for the layers they name. A forecast may inherit from this:
    then it takes no interest in the model, in the beginnings of steps, or in the ends of sequences. Where it is also a
    policy of the cache, that stands in its attribute ``policy``, and whoever opens a model with both under one id
    takes it from there. One that also says which texts are written first has ``order``, a scheduler's, and ``width``,
    how many in a step. One that makes sense only where a router of token ids decides has ``needs_token_router``, true.

    Attributes:
        name: id of the method.
    """

    name: str

    def meet(self, experts: Sequence[int]) -> None:
        """The model that it forecasts for, before anything else: experts of each layer, 0 where there are none."""
        return

    def ready(self, experts: Sequence[int], choices: Sequence[int]) -> None:
        """Whether it could serve a model, as it is now: experts of each layer, and how many of them a token chooses.

        Raises:
            ConfigError: nobody has taught it, or on another model.
        """
        return

    def begin(self, tokens: Ints, positions: Ints, sequences: Ints) -> list[Wish]:
        """A step starts: token id, position and id of the sequence of each row, int32 [R]."""
        return []

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        """The experts int32 [R, k] (-1: none) of a layer are known and about to run. Wishes are for later layers.

        ``ids`` must not be changed. ``peek`` works until this call returns, for any later layer that has experts.
        """

    def settled(self, layer: int, ids: Ints) -> list[Wish]:
        """The experts int32 [R, k] of a later layer are decided already, as pre-gated models do; before ``routed`` of
        the layer whose input decided. They are those that will run, unless a request overrides its routing.
        """
        return []

    def forget(self, sequence: int) -> None:
        """A sequence is over; its id may come again for another."""
        return


@dataclass(frozen=True)
class Recorded:
    """What was routed in the past: tokens one after another, sequence by sequence.

    Attributes:
        tokens, positions, sequences: int32 [T]. routes: layer -> int32 [T, k], -1 where there is no expert.
        experts: of each layer, 0 where there are none.
        peeks: (layer, later layer) -> float32 [T, E], what ``Peek`` would have given; empty where it was not recorded.
    """

    tokens: Ints
    positions: Ints
    sequences: Ints
    routes: Mapping[int, Ints]
    experts: tuple[int, ...]
    peeks: Mapping[tuple[int, int], Floats] = field(default_factory=dict)


@runtime_checkable
class Student(Protocol):
    """A forecast that learns from a recorded past, tokens included."""

    def study(self, past: Recorded) -> None:
        """Learn; after ``meet``, before anything else."""
