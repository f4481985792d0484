"""Run a planner by its id: gather what it asks for, call it, hand back its plan.

Commands, recipes and studies that only know a method's id and settings go through here.

A planner asks by ``statistics(config)``: a tuple of names in ``MEASURES``, or a mapping of such names to the settings
each is measured with. What a statistic rests on (which data, how many tokens each expert saw) is written into the
plan's notes, and with them into the receipt of whatever the plan is applied to. Before anything is measured the
planner's ``check(inputs, config)``, where it has one, may refuse what needs no measurement to be refused.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from moestro.core.config import Config
from moestro.core.errors import PlanError
from moestro.core.inputs import PlanInputs, Subject
from moestro.core.plan import Plan
from moestro.core.registry import Method, method
from moestro.observe.calibrate import Calibration, calibrate
from moestro.observe.neurons import coactivation, domain_activity
from moestro.surgery.opened import OpenModel


Batches = Iterable[Mapping[str, Any] | Tensor]

MEASURES: Final[dict[str, Callable[..., Any]]] = {
    "coactivation": coactivation,
    "domain_activity": domain_activity,
    "experts": calibrate,
}
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
        PlanError: the settings cannot work on this model, its weights are not finite, or the planner measures something
            and got no data.
    """
    used = method_id if isinstance(method_id, Method) else method(method_id)
    used.entry("plan")
    settings = used.configure(dict(config or {}))
    batches = None if batches is None else list(batches)  # looked at more than once
    subjects: dict[str, Subject] = {name: OpenModel(donor, name) for name, donor in (donors or {}).items()}
    inputs = PlanInputs(
        subject=OpenModel(model),
        donors=subjects,
        trace=trace,
        batches=batches,  # type: ignore[arg-type]
        model=model,
        seed=seed,
    )
    for open_model in (model, *(donors or {}).values()):
        refuse_broken(open_model)
    early = getattr(used.module, "check", None)
    if early is not None:
        early(inputs, settings)
    measured = dict(statistics or {})
    for name, wishes in wanted(used, settings).items():
        if name in measured:
            continue
        if name not in MEASURES:
            raise PlanError(f"{used.id} asks for the statistic {name!r}; measured are {', '.join(sorted(MEASURES))}")
        if batches is None:
            raise PlanError(f"{used.id} measures {name} on data with these settings; give calibration data")
        measured[name] = MEASURES[name](model, batches, **wishes)
    plan: Plan = used.plan(dataclasses.replace(inputs, statistics=measured), settings)
    for found in measured.values():
        if isinstance(found, Calibration):
            plan = plan.model_copy(update={"notes": {**plan.notes, "calibration": found.note()}})
    return plan


def refuse_broken(model: nn.Module) -> None:
    """Raise PlanError for a parameter that holds a NaN or an infinity: measured, it spoils the others."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point() or parameter.element_size() < 2:
            continue
        broken = int((~parameter.detach().isfinite()).sum())
        if broken:
            raise PlanError(
                f"{name}: {broken} of {parameter.numel()} weights are NaN or infinite; repair the checkpoint first"
            )


def wanted(used: Method, settings: Config) -> dict[str, dict[str, Any]]:
    """The statistics a planner asks for, each with the settings it is measured with."""
    asked = getattr(used.module, "statistics", None)
    found = () if asked is None else asked(settings)
    return {name: dict(found[name]) if isinstance(found, Mapping) else {} for name in found}
