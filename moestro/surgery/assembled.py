"""Sites that are no feed-forward: a module whose tensors are put together from those of several models.

Each tensor of the new module runs over N rows; a row is a copy of one source or a weighted sum of several. Shapes and
names are held against the plan before anything changes, as ``check`` does for feed-forwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.config import Config
from moestro.core.errors import MoestroError, PlanError
from moestro.core.ledger import Ledger
from moestro.core.plan import ExpertPlan, MethodUse, SiteParts, TensorSource
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.surgery.experts import generator
from moestro.surgery.opened import OpenModel, Read


@dataclass(frozen=True)
class Spot:
    """Where a piece of work is done."""

    site: Site


@dataclass(frozen=True)
class Ingredient:
    """A tensor of a model, how to read it, and its factor in a sum."""

    tensor: Tensor
    read: Read
    weight: float


Recipe = dict[str, list[list[Ingredient]]]
"""Name of a tensor -> for each of its rows what is summed."""


@dataclass(frozen=True)
class SiteWork:
    """One site that a plan changes.

    Attributes:
        entry: what the plan says. place: where. use, config: the method that stands there afterwards. seed: of the
            plan. sources: the tensors that go into it. replaced: tensors of the site that are gone afterwards.
    """

    entry: SiteParts
    place: Spot
    use: MethodUse
    config: Config
    seed: int
    sources: Recipe
    replaced: tuple[Tensor, ...] = ()

    def build(self, shared: Shared) -> nn.Module:
        """The new module; what the plan does not name is as a new one's, by the plan's seed."""
        before = torch.get_default_dtype()
        like = next(iter(self.sources.values()))[0][0].tensor
        with torch.random.fork_rng(devices=[]):
            seeded = generator(self.seed, self.entry.layer, self.entry.kind)
            torch.random.default_generator.set_state(seeded.get_state())
            torch.set_default_dtype(like.dtype)
            try:
                built: nn.Module = method(self.use.method).build(self.place.site, self.config, shared)
            finally:
                torch.set_default_dtype(before)
        return built

    def made(self, shared: Shared, ledger: Ledger) -> nn.Module:
        """The new module with all its values, where and as the old one stands."""
        built = self.build(shared)
        like = next(iter(self.sources.values()))[0][0].tensor
        built.to(like.device)
        built.train(self.place.site.module.training)
        for name in self.sources:
            built.get_parameter(name).requires_grad_(like.requires_grad)
        self.expect(ledger)
        self.fill(built, ledger)
        return built

    def empty(self, shared: Shared, ledger: Ledger) -> nn.Module:
        """The new module without storage for what the plan fills."""
        built = self.build(shared)
        for name in self.sources:
            path, _, leaf = name.rpartition(".")
            old = built.get_parameter(name)
            built.get_submodule(path).register_parameter(leaf, nn.Parameter(old.to("meta"), old.requires_grad))
        self.expect(ledger)
        return built.train(False)

    def expect(self, ledger: Ledger) -> None:
        """Enter what filling has to touch."""
        for name, rows in self.sources.items():
            for row in range(len(rows)):
                ledger.expect(self.entry.layer, row, f"{self.entry.kind}.{name}")

    @torch.no_grad()
    def fill(self, built: nn.Module, ledger: Ledger) -> None:
        """Write every row. A single source of weight 1 is copied bit for bit; sums are taken in float32 at least."""
        for name, rows in self.sources.items():
            old = built.get_parameter(name)
            into = torch.empty(old.shape, dtype=old.dtype) if old.is_meta else old
            for row, sources in enumerate(rows):
                into[row].copy_(_total(sources))
                ledger.touch(self.entry.layer, row, f"{self.entry.kind}.{name}")
            if into is not old:
                path, _, leaf = name.rpartition(".")
                built.get_submodule(path).register_parameter(leaf, nn.Parameter(into, old.requires_grad))

    def describe(self) -> dict[str, Any]:
        """For a receipt."""
        donors = {s.donor for rows in self.entry.tensors.values() for sources in rows for s in sources}
        return {
            "layer": self.entry.layer,
            "site": self.place.site.path,
            "kind": self.entry.kind,
            "module": self.use.method,
            "rows": {name: len(rows) for name, rows in self.sources.items()},
            "donors": sorted(donors - {"self"}),
        }


def _total(sources: list[Ingredient]) -> Tensor:
    """A copy of one tensor, or the weighted sum of several."""
    first = sources[0]
    if len(sources) == 1 and first.weight == 1.0:
        return first.read(first.tensor)
    total: Tensor | None = None
    for source in sources:
        value = source.read(source.tensor)
        value = (value if value.dtype == torch.float64 else value.float()) * source.weight
        total = value if total is None else total + value.to(total.device)
    assert total is not None
    return total


def check_sites(plan: ExpertPlan, donors: Mapping[str, OpenModel]) -> list[SiteWork]:
    """The work a plan asks for at sites that are no feed-forward, in the order of layers.

    Raises:
        PlanError: no such site, donor or tensor, or one of another shape; layer, name and shapes are in the message.
    """
    return [_check_site(plan, entry, donors) for entry in sorted(plan.sites, key=lambda entry: entry.layer)]


def _check_site(plan: ExpertPlan, entry: SiteParts, donors: Mapping[str, OpenModel]) -> SiteWork:
    where = f"layer {entry.layer} {entry.kind}"
    site = donors["self"].site(entry.layer, entry.kind)
    if not entry.tensors:
        raise PlanError(f"{where}: the plan puts {entry.module.method} there and fills none of its tensors")
    sources = {
        name: [[_ingredient(where, entry, source, donors) for source in row] for row in rows]
        for name, rows in entry.tensors.items()
    }
    try:
        config = method(entry.module.method).configure(entry.module.config)
        work = SiteWork(entry, Spot(site), entry.module, config, plan.seed, sources)
        built = work.build(Shared())
    except MoestroError as error:
        raise PlanError(f"{where}: {str(error).removeprefix(f'{site.path}: ')}") from None
    parameters = dict(built.named_parameters())
    for name, rows in sources.items():
        if name not in parameters:
            raise PlanError(f"{where}: {entry.module.method} has no tensor {name!r}; it has {', '.join(parameters)}")
        shape = list(parameters[name].shape)
        if len(rows) != shape[0]:
            raise PlanError(f"{where}: the plan lists {len(rows)} rows of {name}, the module has {shape[0]}")
        for sources_of_row, given in zip(rows, entry.tensors[name], strict=True):
            for found, source in zip(sources_of_row, given, strict=True):
                if list(found.tensor.shape) != shape[1:]:
                    raise PlanError(
                        f"{where}: {source.name} of {source.donor!r} has shape {list(found.tensor.shape)}, a row of "
                        f"{name} has {shape[1:]}; all models must have one shape"
                    )
    kept = {id(tensor) for tensor in built.state_dict(keep_vars=True).values()}
    gone = [tensor for tensor in site.module.state_dict(keep_vars=True).values() if id(tensor) not in kept]
    return SiteWork(entry, Spot(site), entry.module, config, plan.seed, sources, tuple(gone))


def _ingredient(where: str, entry: SiteParts, source: TensorSource, donors: Mapping[str, OpenModel]) -> Ingredient:
    """The tensor that a source names."""
    if source.donor not in donors:
        known = ", ".join(donors)
        raise PlanError(f"{where} wants the donor {source.donor!r}; given are {known}: pass donors={{name: model}}")
    donor = donors[source.donor]
    tensors = donor.site(source.layer, entry.kind).module.state_dict(keep_vars=True)
    if source.name not in tensors:
        known = ", ".join(tensors) or "none"
        raise PlanError(f"{where}: {donor.shape.name} layer {source.layer} has no {source.name!r} there, only {known}")
    return Ingredient(tensors[source.name], donor.read, source.weight)
