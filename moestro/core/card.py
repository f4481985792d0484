"""A method's card: where the idea comes from, what the method needs, where it departs from the paper.

Tables, pages, listings and model cards are generated from cards. A card is written with literals only, so that it can
be read without importing the method (and with it PyTorch).
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from moestro.core.errors import ConfigError


Stage = Literal["train", "convert", "adapt", "compress", "place", "serve", "compose", "inspect", "simulate"]
STAGES: Final[tuple[str, ...]] = get_args(Stage)

Need = Literal["model", "models", "adapters", "trace", "data", "quality", "shape", "none"]
NEEDS: Final[tuple[str, ...]] = get_args(Need)

# Entry function -> the shape of the method.
ENTRIES: Final[dict[str, str]] = {
    "build": "module",
    "plan": "planner",
    "policy": "policy",
    "forecast": "forecast",
    "measure": "meter",
    "objective": "objective",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far a method may be from its exact reference, and why it is not zero."""

    atol: float
    rtol: float = 0.0
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodCard:
    """Facts about a method.

    Attributes:
        title, year, arxiv: the source; arxiv is an id such as ``2401.06066`` or None.
        paper: key in the list of papers, or None when the source is not one of them.
        summary: one line for listings.
        taxonomy: path in the survey's words, for example ``gating/sparse/token-choice``.
        needs: what the command line asks for before OUT, in order.
        deviations: where the method departs from the paper, one sentence each.
        tolerance: of the stage's contract tests; None means exact to 1e-5 in float32.
        status: ``stable`` or ``experimental``.
        causal: False when the method lets later tokens change earlier outputs.
        stochastic: True when it draws random numbers in evaluation too.
    """

    title: str
    year: int
    summary: str
    taxonomy: str
    arxiv: str | None = None
    paper: str | None = None
    needs: tuple[Need, ...] = ("none",)
    deviations: tuple[str, ...] = ()
    tolerance: Tolerance | None = None
    status: Literal["stable", "experimental"] = "stable"
    causal: bool = True
    stochastic: bool = False

    def __post_init__(self) -> None:
        unknown = [need for need in self.needs if need not in NEEDS]
        if unknown:
            raise ConfigError(f"card {self.title!r} needs {unknown[0]!r}; known: {', '.join(NEEDS)}")
        if self.status not in ("stable", "experimental"):
            raise ConfigError(f"card {self.title!r} has status {self.status!r}; stable or experimental")
