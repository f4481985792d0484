"""Run a planner by its id: gather what it asks for, call it, hand back its plan.

Commands, recipes and studies that only know a method's id and settings go through here.

A planner asks by ``statistics(config)``: a tuple of names in ``MEASURES``, or a mapping of such names to the settings
each is measured with. What a statistic rests on (which data, how many tokens each expert saw) is written into the
plan's notes, and with them into the receipt of whatever the plan is applied to.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from moestro.core.config import Config
from moestro.core.errors import PlanError
from moestro.core.inputs import PlanInputs, Subject
from moestro.core.plan import Plan
from moestro.core.registry import Method, method
from moestro.observe.calibrate import Calibration, calibrate
from moestro.observe.neurons import coactivation
from moestro.surgery.opened import OpenModel


Batches = Iterable[Mapping[str, Any] | Tensor]

MEASURES: Final[dict[str, Callable[..., Any]]] = {"coactivation": coactivation, "experts": calibrate}
"""Statistics by the name under which planners ask for them: called with (model, batches, **settings)."""


def make_plan(
    method_id: str | Method,
    model: nn.Module,
    config: Mapping[str, Any] | None = None,
    *,
    donors: Mapping[str, nn.Module] | None = None,
    batches: Batches | None = None,
    statistics: Mapping[str, Any] | None = None,
    trace: Any = None,
    seed: int = 0,
) -> Plan:
    """What a planner decides for an open model.

    Args:
        method_id: of a method with the entry ``plan``, or the method itself. config: its settings.
        donors: further models by name. batches: calibration data. statistics: what was measured already.
        trace: a recorded routing trace. seed: of every random choice.

    Raises:
        RegistryError: no such method, or one that is no planner. ConfigError: its settings.
        PlanError: the settings cannot work on this model, or the planner measures something and got no data.
    """
    used = method_id if isinstance(method_id, Method) else method(method_id)
    used.entry("plan")
    settings = used.configure(dict(config or {}))
    batches = None if batches is None else list(batches)  # looked at more than once
    measured = dict(statistics or {})
    for name, wishes in wanted(used, settings).items():
        if name in measured:
            continue
        if name not in MEASURES:
            raise PlanError(f"{used.id} asks for the statistic {name!r}; measured are {', '.join(sorted(MEASURES))}")
        if batches is None:
            raise PlanError(f"{used.id} measures {name} on data with these settings; give calibration data")
        measured[name] = MEASURES[name](model, batches, **wishes)
    subjects: dict[str, Subject] = {name: OpenModel(donor, name) for name, donor in (donors or {}).items()}
    inputs = PlanInputs(
        subject=OpenModel(model),
        donors=subjects,
        statistics=measured,
        trace=trace,
        batches=batches,  # type: ignore[arg-type]
        model=model,
        seed=seed,
    )
    plan: Plan = used.plan(inputs, settings)
    for found in measured.values():
        if isinstance(found, Calibration):
            plan = plan.model_copy(update={"notes": {**plan.notes, "calibration": found.note()}})
    return plan


def wanted(used: Method, settings: Config) -> dict[str, dict[str, Any]]:
    """The statistics a planner asks for, each with the settings it is measured with."""
    asked = getattr(used.module, "statistics", None)
    found = () if asked is None else asked(settings)
    return {name: dict(found[name]) if isinstance(found, Mapping) else {} for name in found}
