"""What a compression is, and what every one of them keeps true.

A planner decides from calibration statistics: an ExpertPlan where there will be fewer experts, a BitPlan where they
will be coarser. It changes nothing; ``surgery.apply`` does. A method with the entry `build` puts a cheaper module in a
mixture's place.

`KEEPS` names the invariants by entry; `moestro.testing.contracts` checks each of them on every method of the stage the
moment its file exists.
"""

from collections.abc import Mapping
from typing import Any, Final, Protocol

from torch import nn

from moestro.core.inputs import PlanInputs
from moestro.core.plan import BitPlan, ExpertPlan
from moestro.core.site import Shared, Site


class Planner(Protocol):
    """`plan(inputs, config)`: which experts stay or are merged, or how many bits each gets.

    In the plan's notes `keeps` says whether the compressed model answers as its parent did: `as_routed` or `nothing`.
    `saves` says what gets less where it is not the bytes of the experts: `operations`.

    Raises:
        PlanError: settings that cannot work on this model (fewer experts than a token chooses, a budget below the
            least), or statistics that too few tokens stand behind; with numbers.
    """

    def __call__(self, inputs: PlanInputs, config: Any) -> ExpertPlan | BitPlan: ...


class Statistics(Protocol):
    """`statistics(config)`: what `inputs.statistics` must hold, by name in `methods.planning.MEASURES`, each with the
    settings it is measured with: `{"experts": {"policy": "natural", "outputs": True}}`.
    """

    def __call__(self, config: Any) -> Mapping[str, Mapping[str, Any]]: ...


class Check(Protocol):
    """`check(inputs, config)`: refuse, before anything is measured, what the shapes alone rule out.

    Raises:
        PlanError: as `plan` would raise after the measurements.
    """

    def __call__(self, inputs: PlanInputs, config: Any) -> None: ...


class Build(Protocol):
    """`build(site, config, shared)`: what stands at the site of a mixture afterwards, made of what stands there."""

    def __call__(self, site: Site, config: Any, shared: Shared) -> nn.Module: ...


KEEPS: Final[dict[str, dict[str, str]]] = {
    "plan": {
        "settings_round_trip": "settings survive JSON, and an unknown key is refused by name",
        "plan_round_trips": "a plan survives JSON",
        "plan_is_repeatable": "the same inputs, settings and seed give the same plan, whatever the global seed is",
        "model_is_only_read": "planning changes no tensor and no module of the model",
        "every_row_is_filled": "applied, the plan touches every row of every expert it is about once",
        "parent_is_kept": "the compressed model answers as its parent wherever the plan's notes say so",
        "others_keep_their_bits": "tensors outside the chosen layers keep their bits",
        "saves_and_reopens": "the compressed model saves and reopens with the same tensors and logits",
        "calibration_is_noted": "what was measured on data stands in the plan's notes and in the receipt",
        "experts_shrink": "the experts take fewer bytes than before, or fewer operations a token where the plan's "
        "notes say that it saves those; shared branches take as many bytes",
        "choices_exist": "every token runs real experts that are there, none twice, and every answer is finite",
    },
    "build": {
        "settings_round_trip": "settings survive JSON, and an unknown key is refused by name",
    },
}
