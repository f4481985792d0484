"""What methods of the stage ask of calibration, and how many experts they leave."""

import math
from collections import Counter
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from moestro.core.config import Config
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import LayerShape
from moestro.observe.policy import Policy
from moestro.surgery.choice import Layers


def _count_or_share(keep: int | float) -> int | float:
    if not (keep >= 1 if isinstance(keep, int) else 0 < keep <= 1):
        raise ValueError("must be a whole number of experts (1 or more) or a share (above 0, at most 1.0)")
    return keep


Keep = Annotated[int | float, AfterValidator(_count_or_share)]
"""How many experts a layer has afterwards: a whole number, or a share of those it has."""


class Counted(Config):
    """What calibration counts, for methods that take every mixture.

    Attributes:
        policy, raise_to: whom a calibration token counts for. least: tokens below which an expert is starved.
            allow_starved: go on with half or more of a layer's experts starved.
    """

    policy: Policy = "natural"
    raise_to: int | None = Field(default=None, ge=1)
    least: int = Field(default=1, ge=1)
    allow_starved: bool = False

    @model_validator(mode="after")
    def _policy_fits(self) -> Self:
        if (self.policy == "raised") != (self.raise_to is not None):
            raise ConfigError(f"policy={self.policy} with raise_to={self.raise_to}; raise_to goes with policy=raised")
        return self

    def measured(self, **wishes: Any) -> dict[str, dict[str, Any]]:
        """What ``statistics`` returns: the experts' statistics with these settings and further wishes."""
        shared = {name: getattr(self, name) for name in ("policy", "raise_to", "least", "allow_starved")}
        return {"experts": {**shared, **wishes}}


class Calibrated(Counted):
    """The same for methods that take some mixtures. layers: which."""

    layers: Layers = "all"


def count_of(there: LayerShape, keep: int | float) -> int:
    """Experts of a layer afterwards: at least 1, a share rounded to the nearest whole number, a half to the even one.

    Raises:
        PlanError: more than there are.
    """
    have = there.num_experts or 0
    count = keep if isinstance(keep, int) else max(1, round(keep * have))
    if count > have:
        raise PlanError(f"layer {there.layer}: keep={keep}, but it has {have} experts; give at most {have}, or a share")
    return count


def remap_of(there: LayerShape) -> list[int] | None:
    """For each choice of a layer's router its expert, where merging renamed them; None where each has a row."""
    found: list[int] | None = None if there.module is None else there.module.config.get("remap")
    return found


def refuse_remapped(there: LayerShape, what: str) -> None:
    """Raise PlanError for a layer whose experts were merged under a remapped router: no row is an expert's own.

    Args:
        what: needs a row for each expert, and what to use instead.
    """
    if remap_of(there) is not None:
        raise PlanError(
            f"layer {there.layer} holds merged experts under a remapped router, which has no row for each expert; "
            f"{what}"
        )


def groups_of(there: LayerShape) -> int:
    """Groups of equal size that a layer's router chooses among first; 1 where it has none."""
    found: int = there.gate.get("num_groups", 1)
    return found


def check_choices(there: LayerShape, kept: list[int]) -> None:
    """Raise PlanError unless a remapped router keeps as many choices as a token makes."""
    remap = remap_of(there)
    left = 0 if remap is None else sum(expert in kept for expert in remap)
    if remap is not None and left < (there.top_k or 1):
        raise PlanError(
            f"layer {there.layer}: its remapped router keeps {left} choices with experts {kept}, but each token makes "
            f"{there.top_k}; keep more experts"
        )


def check_groups(there: LayerShape, count: int) -> None:
    """Raise PlanError unless so many experts can be the groups that a layer's router chooses among."""
    groups = groups_of(there)
    if count % groups:
        fit = [near for near in (count - count % groups, count - count % groups + groups) if near]
        raise PlanError(
            f"layer {there.layer}: {count} experts cannot be {groups} groups of equal size; keep "
            f"{' or '.join(map(str, fit))}"
        )


def least_of(there: LayerShape) -> int:
    """Fewest experts that a layer's router can choose among: the groups it keeps must hold as many as it chooses.

    Under a remapped router several of its choices may lead to one expert: the fewest that enough choices lead to.
    """
    remap = remap_of(there)
    if remap is not None:
        sizes = sorted(Counter(remap).values(), reverse=True)
        return next(n for n in range(1, len(sizes) + 1) if sum(sizes[:n]) >= (there.top_k or 1))
    groups, kept = groups_of(there), there.gate.get("groups_kept", 1)
    if groups == 1:
        return there.top_k or 1
    least: int = groups * math.ceil((there.top_k or 1) / kept)
    return least
