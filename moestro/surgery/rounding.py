"""How surgery comes to codes: round to the nearest, or as a method says that a plan names.

A method whose plans want more than the nearest code has ``rounding(config)``, which gives a ``Rounding``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from moestro.core.plan import BitPlan
from moestro.core.registry import method
from moestro.ops.formats import Packing, Params, nearest


Batches = Sequence[Mapping[str, Any]]
Visit = Callable[[int, nn.Module], None]


@dataclass(frozen=True)
class Seen:
    """What calibration showed of one layer.

    Attributes:
        count_E: tokens of each expert. gram: (expert, projection) -> X^T X [in, in] of what enters the matrix.
    """

    count_E: Tensor
    gram: Callable[[int, str], Tensor]


class Rounding(Protocol):
    """Chooses codes; ``calibrates`` says whether it looks at data first."""

    calibrates: bool

    def walk(
        self, model: nn.Module, batches: Batches, layers: Mapping[int, str], enter: Visit | None, leave: Visit | None
    ) -> Iterator[tuple[int, Seen]]:
        """Show every layer of ``layers`` (index -> site) once, in order. When it is asked for the next one the layer
        has been packed, so that later layers see what packed ones return.

        Args:
            enter, leave: called with the number and the module of a block before and after its turn, to bring and drop
                its weights.
        """

    def __call__(self, weight_EOI: Tensor, used: Packing, gram_EII: Tensor | None) -> tuple[Tensor, Params]:
        """Codes uint8 [E, O, I] and params [E, O, groups] of float32 weights of some experts.

        Args:
            gram_EII: X^T X of the inputs of each matrix, zeros where no token came by; None without calibration.
        """


class Nearest:
    """Round to the nearest code of the registered format."""

    calibrates = False

    def walk(
        self, model: nn.Module, batches: Batches, layers: Mapping[int, str], enter: Visit | None, leave: Visit | None
    ) -> Iterator[tuple[int, Seen]]:
        """See Rounding. Nothing is looked at."""
        return iter(())

    def __call__(self, weight_EOI: Tensor, used: Packing, gram_EII: Tensor | None) -> tuple[Tensor, Params]:
        """See Rounding."""
        return nearest(weight_EOI, used)


def rounding_of(plan: BitPlan) -> Rounding:
    """The rounding a plan names.

    Raises:
        RegistryError: a method without one. ConfigError: its settings.
    """
    if plan.rounding is None:
        return Nearest()
    used = method(plan.rounding.method)
    found: Rounding = used.entry("rounding")(used.configure(plan.rounding.config))
    return found
