"""Write what surgery did into the model's list of swaps, so that a saved folder reopens as the same model."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from moestro.core.config import Config
from moestro.core.plan import MethodUse
from moestro.core.site import Site
from moestro.models.sites import stacks
from moestro.models.swap import Swap, state_of


class Standing(Protocol):
    """Where a piece of work is done."""

    @property
    def site(self) -> Site: ...


class Recorded(Protocol):
    """A piece of work as the list of swaps needs it: where, by which method, with which settings."""

    @property
    def place(self) -> Standing: ...

    @property
    def use(self) -> MethodUse: ...

    @property
    def config(self) -> Config | None: ...


def record(model: nn.Module, works: Sequence[Recorded]) -> None:
    """Append one entry for each method; settings that differ between layers become lists, one value a site."""
    for method in dict.fromkeys(work.use.method for work in works):
        mine = [work for work in works if work.use.method == method]
        state_of(model).swaps.append(entry_of(model, method, mine))


def entry_of(model: nn.Module, method: str, works: Sequence[Recorded]) -> Swap:
    """The swap that builds these layers again."""
    configs = [work.config.model_dump(mode="json") for work in works if work.config is not None]
    settings: dict[str, Any] = {}
    for name in configs[0]:
        values = [config[name] for config in configs]
        settings[name] = values[0] if all(value == values[0] for value in values) else {"per_layer": values}
    return Swap(
        sites=[_written(model, work) for work in works], kind=works[0].place.site.kind, method=method, config=settings
    )


def _written(model: nn.Module, work: Recorded) -> str:
    """A site as the list of swaps writes it: under its stack."""
    path = work.place.site.path
    for stack in stacks(model):
        if stack.path == "" or path.startswith(stack.path + "."):
            return f"{stack.spec.name}:{path.removeprefix(stack.path).removeprefix('.')}"
    raise AssertionError(f"{path} lies in no stack")
