"""Dispatchers: how rows travel to the experts that need them, and back."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from moestro.core.routing import Routing


class Dispatcher(nn.Module, ABC):
    """Moves rows to experts. The mathematics of a layer never branches on parallelism; only dispatchers differ."""

    @abstractmethod
    def dispatch(self, x_TI: Tensor, routing: Routing) -> tuple[Tensor, Routing, Any]:
        """Rows this rank must compute, their routing in terms of this rank's experts, and a handle for ``combine``."""

    @abstractmethod
    def combine(self, y_TO: Tensor, handle: Any) -> Tensor:
        """Bring the bank's answers back to the tokens they belong to, [T, O]."""


class LocalDispatcher(Dispatcher):
    """All experts live here: nothing moves."""

    def dispatch(self, x_TI: Tensor, routing: Routing) -> tuple[Tensor, Routing, Any]:
        """Return the arguments."""
        return x_TI, routing, None

    def combine(self, y_TO: Tensor, handle: Any) -> Tensor:
        """Return the argument."""
        return y_TO
