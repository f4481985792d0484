"""What a conversion is, and what every one of them keeps true.

A conversion is a planner: it looks at a model's shape, and where it needs to at its weights or at statistics, and says
what each chosen layer is made of. It changes nothing; ``surgery.apply`` does.

`KEEPS` names the invariants by entry; `moestro.testing.contracts` checks each of them on every method of the stage the
moment its file exists.
"""

from typing import Any, Final, Protocol

from moestro.core.inputs import PlanInputs
from moestro.core.plan import ExpertPlan


class Planner(Protocol):
    """`plan(inputs, config)`: what each chosen layer is made of.

    In the plan's notes `keeps` says when the converted model answers as its parent did: `as_routed`, or `all_on` with
    every expert at `all_on_weight`, or `nothing`.

    Raises:
        PlanError: settings that cannot work on this model, with numbers.
    """

    def __call__(self, inputs: PlanInputs, config: Any) -> ExpertPlan: ...


class Statistics(Protocol):
    """`statistics(config)`, for planners whose choice rests on measurements: the names that `inputs.statistics` must
    hold. Whoever calls the planner measures them on calibration data.
    """

    def __call__(self, config: Any) -> tuple[str, ...]: ...


KEEPS: Final[dict[str, dict[str, str]]] = {
    "plan": {
        "settings_round_trip": "settings survive JSON, and an unknown key is refused by name",
        "plan_round_trips": "a plan survives JSON",
        "plan_is_repeatable": "the same inputs, settings and seed give the same plan, whatever the global seed is",
        "model_is_only_read": "planning changes no tensor and no module of the model",
        "every_row_is_filled": "applied, the plan fills every row of every new expert once",
        "parent_is_kept": "the converted model answers as its parent wherever the plan's notes say so",
        "others_keep_their_bits": "tensors outside the chosen layers keep their bits, unless `rest` means them",
        "saves_and_reopens": "the converted model saves and reopens with the same tensors and logits",
    },
}
