"""Phases: stretches of a run with values, frozen parts and a sampler of their own.

Everything a phase sets is a function of the step, so a resumed run needs to know only which phase has begun (its plan
is applied once, never again on resume).
"""

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moestro.core.errors import ConfigError
from moestro.core.layer import mixture_layers
from moestro.training.recipe import PhaseConfig, Recipe
from moestro.training.schedule import value_at


@dataclass(frozen=True)
class Moment:
    """What holds at one step.

    Attributes:
        phase: name, None for a recipe without phases. done: share of the phase that lies behind, 0 to 1 (1 at its last
            step). weights: of the losses. values: for ``ctx.value``. lr: factor on the learning rate.
    """

    phase: str | None
    done: float
    weights: dict[str, float]
    values: dict[str, float]
    lr: float


def phase_at(recipe: Recipe, step: int) -> tuple[PhaseConfig | None, float]:
    """The phase that step ``step`` (from 0) belongs to, and the share of it that lies behind."""
    first = 0
    for phase in recipe.phases:
        length = phase.steps if phase.steps is not None else recipe.total_steps - first
        if step < first + length:
            return phase, (step - first) / max(1, length - 1)
        first += length
    return None, 0.0


def moment_at(recipe: Recipe, step: int) -> Moment:
    """Loss weights, values and learning-rate factor at a step."""
    phase, done = phase_at(recipe, step)
    if phase is None:
        return Moment(None, 0.0, dict(recipe.losses), {}, 1.0)
    weights = {**recipe.losses, **{name: value_at(value, done) for name, value in phase.losses.items()}}
    values = {name: value_at(value, done) for name, value in phase.values.items()}
    return Moment(phase.name, done, weights, values, value_at(phase.lr, done))


def freeze(model: nn.Module, phase: PhaseConfig | None) -> frozenset[str]:
    """Set ``requires_grad`` of every parameter as the phase says.

    Returns:
        Sites of mixture layers whose routers stand still entirely, so that they get no bias updates either: those whose
        every router parameter and buffer is frozen.

    Raises:
        ConfigError: a pattern that matches no parameter or buffer, or nothing is left to train.
    """
    named = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    frozen = frozen_names(sorted(named), phase)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
        if name in frozen:
            parameter.grad = None
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"phase {phase.name if phase else '-'!r} freezes every parameter; nothing is left to train")
    paths = {id(module): path for path, module in model.named_modules()}
    still = set()
    for site, layer in mixture_layers(model).items():
        prefix = paths[id(layer.router)] + "."
        inside = [name for name in named if name.startswith(prefix)]
        if inside and all(name in frozen for name in inside):
            still.add(site)
    return frozenset(still)


def ever_trained(names: Sequence[str], recipe: Recipe) -> set[str]:
    """Names that some phase trains; all of them without phases, or once a plan may change the names."""
    if not recipe.phases or any(phase.on_enter is not None for phase in recipe.phases):
        return set(names)
    return {name for phase in recipe.phases for name in set(names) - frozen_names(names, phase)}


def frozen_names(names: Sequence[str], phase: PhaseConfig | None) -> set[str]:
    """Names that stand still: those that ``freeze`` matches, and, where ``train`` is given, those it does not match."""
    if phase is None:
        return set()
    for pattern in (*phase.freeze, *phase.train):
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            hint = f"; the nearest is called {near[0]}" if near else ""
            raise ConfigError(f"phase {phase.name!r}: pattern {pattern!r} matches no parameter{hint}")
    return {
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in phase.freeze)
        or (phase.train and not any(fnmatch.fnmatchcase(name, pattern) for pattern in phase.train))
    }
