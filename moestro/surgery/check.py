"""Hold a whole plan against its models before anything changes, and turn it into work.

Everything that could go wrong while tensors move is asked here: layers, experts and rows exist, shapes agree, the
module can be built with these settings, every router row has a source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.core.bank import StackedFFN, unfilled_banks
from moestro.core.config import Config
from moestro.core.errors import MoestroError, PlanError
from moestro.core.inputs import LayerShape
from moestro.core.layer import MoELayer
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, MethodUse, Plan
from moestro.core.registry import method
from moestro.core.remap import RemapRouter
from moestro.core.site import Shared
from moestro.surgery.experts import generator
from moestro.surgery.opened import OpenModel, Place, check_expert


@dataclass(frozen=True)
class Work:
    """One layer that a plan changes.

    Attributes:
        entry: what the plan says. place: where. use, config: the method that stands there afterwards. inner: I of the
            new experts. seed: of the plan. dtype: of the new experts.
    """

    entry: LayerExperts
    place: Place
    use: MethodUse
    config: Config
    inner: int
    seed: int
    dtype: torch.dtype

    def build(self, shared: Shared) -> MoELayer:
        """The new layer. Its experts hold no values yet; its router is as a new one would be, by the plan's seed."""
        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), unfilled_banks():
            torch.random.default_generator.set_state(generator(self.seed, self.entry.layer, "router").get_state())
            torch.set_default_dtype(self.dtype)
            try:
                layer = method(self.use.method).build(self.place.site, self.config, shared)
            finally:
                torch.set_default_dtype(before)
        if not isinstance(layer, MoELayer) or not isinstance(layer.bank, StackedFFN):
            raise PlanError(f"layer {self.entry.layer}: {self.use.method} builds no mixture of equal experts")
        return layer


def check(plan: ExpertPlan, donors: Mapping[str, OpenModel]) -> list[Work]:
    """The work a plan asks for, in the order of layers.

    Args:
        plan: to be applied to ``donors["self"]``.
        donors: every model the plan takes experts from, by name.

    Raises:
        PlanError: the plan does not fit; layer, expert and numbers are in the message.
    """
    check_hash(plan, donors["self"])
    return [_check_layer(plan, entry, donors) for entry in sorted(plan.layers, key=lambda entry: entry.layer)]


def check_hash(plan: Plan, target: OpenModel) -> None:
    """Raise PlanError if the plan was made for another model."""
    if plan.model_hash is not None and plan.model_hash != target.fingerprint():
        raise PlanError(
            f"the plan was made by {plan.method} for a model of hash {plan.model_hash[:12]}, {target.shape.name} has "
            f"{target.fingerprint()[:12]}; make a new plan for it"
        )


def _check_layer(plan: ExpertPlan, entry: LayerExperts, donors: Mapping[str, OpenModel]) -> Work:
    target = donors["self"]
    place = target.place(entry.layer)
    wheres = [f"layer {entry.layer} expert {index}" for index in range(len(entry.experts))]
    inners = [_inner(sources, where, place, donors) for sources, where in zip(entry.experts, wheres, strict=True)]
    for where, inner in zip(wheres, inners, strict=True):
        if inner != inners[0]:
            raise PlanError(f"{where} has {inner} inner units, expert 0 has {inners[0]}; experts of a layer are equal")
    source = entry.experts[0][0]
    parameter, _ = donors[source.donor].place(source.layer).slot(source.expert, "up")
    use = _use(entry, place, inners[0])
    try:
        config = method(use.method).configure(use.config)
        work = Work(entry, place, use, config, inners[0], plan.seed, parameter.dtype)
        layer = work.build(Shared())
    except MoestroError as error:
        raise PlanError(f"layer {entry.layer}: {str(error).removeprefix(f'layer {entry.layer}: ')}") from None
    _check_built(work, layer, donors)
    return work


def _inner(sources: Sequence[ExpertSource], where: str, place: Place, donors: Mapping[str, OpenModel]) -> int:
    """Inner units of an expert, after a look at each of its sources."""
    found: list[int] = []
    for source in sources:
        if source.donor not in donors:
            known = ", ".join(donors)
            raise PlanError(f"{where} wants the donor {source.donor!r}; given are {known}: pass donors={{name: model}}")
        donor = donors[source.donor]
        shape = donor.place(source.layer).shape
        check_expert(donor.shape.name, shape, source.expert)
        _check_forms(where, place.shape, shape)
        found.append(_units(source, where, shape.inner))
    if len(set(found)) > 1:
        raise PlanError(f"{where} sums sources of {' and '.join(map(str, found))} inner units; they must be equal")
    return found[0]


def _check_forms(where: str, target: LayerShape, source: LayerShape) -> None:
    """Raise PlanError unless experts of ``source`` can stand where ``target`` is."""
    for name in ("dim", "out", "gated", "bias", "activation"):
        have, want = getattr(source, name), getattr(target, name)
        if have != want:
            raise PlanError(f"{where} takes from layer {source.layer}, whose {name} is {have}; here it is {want}")


def _units(source: ExpertSource, where: str, inner: int) -> int:
    """How many inner units a source gives."""
    count = inner
    if source.rows is not None:
        wrong = [row for row in source.rows if not 0 <= row < inner]
        if wrong:
            raise PlanError(f"{where} takes inner unit {wrong[0]} of an expert that has {inner} (0 to {inner - 1})")
        if not source.rows:
            raise PlanError(f"{where} takes no inner unit of layer {source.layer}; an expert needs at least 1")
        count = len(source.rows)
    if source.permutation is not None and sorted(source.permutation) != list(range(count)):
        raise PlanError(f"{where}: its permutation has {len(source.permutation)} places and is none of {count} units")
    return count


def _use(entry: LayerExperts, place: Place, inner: int) -> MethodUse:
    """The method that stands at the site afterwards, with the plan's numbers filled in."""
    if entry.module is not None:
        if entry.router == "remap":
            raise PlanError(f"layer {entry.layer}: remap keeps the router that is there; leave `module` out")
        return entry.module
    there = place.shape.module
    if place.shape.num_experts is None:
        raise PlanError(f"layer {entry.layer} is dense; the plan must name the `module` that stands there afterwards")
    if there is None:
        bank = place.mixture.bank
        if type(bank) is not StackedFFN:
            raise PlanError(
                f"layer {entry.layer}: its {type(bank).__name__} holds more than its experts, which would be lost; "
                "take that away first, or name the `module` in the plan"
            )
        raise PlanError(f"layer {entry.layer}: nothing says how its router was made; name the `module` in the plan")
    config = {**there.config, "num_experts": len(entry.experts), "expert_size": inner}
    if entry.router == "remap":
        config["remap"] = _remapping(entry, place.shape.num_experts, there.config.get("remap"))
    elif there.config.get("remap") is not None:
        config["remap"] = None if entry.router in ("new", "zero") else _left(entry, there.config["remap"])
    return MethodUse(method=there.method, config=config)


def _remapping(entry: LayerExperts, num_experts: int, before: list[int] | None) -> list[int]:
    """For each choice of the router the new expert."""
    leads: dict[int, int] = {}
    for index, sources in enumerate(entry.experts):
        for source in sources:
            old = source.expert
            if source.donor != "self" or source.layer != entry.layer or old is None:
                continue
            if leads.setdefault(old, index) != index:
                raise PlanError(
                    f"layer {entry.layer}: remap cannot lead expert {old} to both {leads[old]} and {index}; "
                    "each old expert may be a source of one new expert"
                )
    missing = sorted(set(range(num_experts)) - set(leads))
    if missing:
        raise PlanError(
            f"layer {entry.layer}: remap needs a new expert for each old one, but expert {missing[0]} is a source of "
            f"none ({len(missing)} of {num_experts} are missing); use router=rows to drop experts"
        )
    return [leads[old] for old in (range(num_experts) if before is None else before)]


def _left(entry: LayerExperts, before: Sequence[int]) -> list[int]:
    """For each choice that a remapped router keeps the new expert: the choices of an expert that stays stay with it."""
    if entry.router != "rows":
        raise PlanError(
            f"layer {entry.layer} has a remapped router, where {len(before)} rows lead to {max(before) + 1} experts, "
            f"and router={entry.router} has no meaning; use router=rows or router=remap"
        )
    leads: dict[int | None, int] = {}
    for index, sources in enumerate(entry.experts):
        source = sources[0]
        if source.donor != "self" or source.layer != entry.layer or leads.setdefault(source.expert, index) != index:
            raise PlanError(
                f"layer {entry.layer} expert {index}: under a remapped router each expert takes the choices of one old "
                "expert of this layer, which no other takes; use router=new"
            )
    return [leads[old] for old in before if old in leads]


def choices_left(work: Work) -> list[int]:
    """The choices of a remapped router that stay under ``rows``, nulls included, by their old ids."""
    old = work.place.mixture.router
    assert isinstance(old, RemapRouter)
    stay = {sources[0].expert for sources in work.entry.experts}
    return [*(i for i, g in enumerate(old.mapping) if g in stay), *range(len(old.mapping), old.inner.num_choices)]


def _check_built(work: Work, layer: MoELayer, donors: Mapping[str, OpenModel]) -> None:
    """Raise PlanError unless the layer that was built can hold what the plan puts there."""
    entry, bank, shape = work.entry, layer.bank, work.place.shape
    assert isinstance(bank, StackedFFN)
    if bank.num_experts != len(entry.experts):
        raise PlanError(
            f"layer {entry.layer}: the plan lists {len(entry.experts)} experts, its module {work.use.method} is set "
            f"to {bank.num_experts}"
        )
    have = (bank.dim, bank.out, bank.inner, bank.gated, bank.up_bias is not None)
    want = (shape.dim, shape.out, work.inner, shape.gated, shape.bias)
    for name, built, planned in zip(("dim", "out", "expert_size", "gated", "bias"), have, want, strict=True):
        if built != planned:
            raise PlanError(
                f"layer {entry.layer}: the plan's experts have {name}={planned}, its module {work.use.method} is set "
                f"to {built}"
            )
    _check_shared(work, layer, donors)
    if entry.router in ("rows", "mean"):
        check_rows(work, layer, donors)
    if entry.router_scale is not None:
        weight = None if isinstance(layer.router, RemapRouter) else layer.router.tensor("weight")
        inputs = 0 if weight is None or weight.ndim != 2 else weight.shape[1]
        if len(entry.router_scale) != inputs or work.place.shape.num_experts is None:
            raise PlanError(
                f"layer {entry.layer}: router_scale has {len(entry.router_scale)} factors for a {inputs} inputs wide "
                f"weight of a {type(layer.router).__name__}"
            )


def shared_bank(layer: MoELayer) -> StackedFFN | None:
    """The bank of one expert that makes up a layer's shared branch, None where the branch is something else."""
    found = [] if layer.shared is None else [m for m in layer.shared.modules() if isinstance(m, StackedFFN)]
    return found[0] if len(found) == 1 and found[0].num_experts == 1 else None


def _check_shared(work: Work, layer: MoELayer, donors: Mapping[str, OpenModel]) -> None:
    entry = work.entry
    bank = shared_bank(layer)
    mixture = work.place.site.module
    kept = isinstance(mixture, MoELayer) and layer.shared is mixture.shared
    if entry.shared is None:
        if layer.shared is not None and not kept:
            raise PlanError(f"layer {entry.layer}: {work.use.method} has a shared expert; the plan gives it no sources")
        return
    if bank is None or kept:
        raise PlanError(f"layer {entry.layer}: the plan fills a shared expert, {work.use.method} makes none")
    inner = _inner(entry.shared, f"layer {entry.layer} shared expert", work.place, donors)
    if inner != bank.inner:
        raise PlanError(
            f"layer {entry.layer}: the plan's shared expert has {inner} inner units, its module {work.use.method} is "
            f"set to {bank.inner}"
        )


def router_rows(layer: MoELayer) -> dict[str, Tensor]:
    """The tensors of a layer's router that have a row for each choice, by name; of a remapped one, its old choices."""
    router = layer.router.inner if isinstance(layer.router, RemapRouter) else layer.router
    found = {name: router.tensor(name) for name in router.choice_rows}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def check_rows(work: Work, layer: MoELayer, donors: Mapping[str, OpenModel]) -> None:
    """Raise PlanError unless each new expert's sources have router rows that fit."""
    entry, router = work.entry, layer.router
    way_out = "use router=new"
    if isinstance(router, RemapRouter):
        if router.inner.choice_ids and len(choices_left(work)) < router.inner.num_choices:
            raise PlanError(f"layer {entry.layer}: its router stores the ids of its choices; {way_out}")
        return
    for index, sources in enumerate(entry.experts):
        for source in sources if entry.router == "mean" else sources[:1]:
            where = f"layer {entry.layer} expert {index}: router={entry.router}"
            shape = donors[source.donor].place(source.layer).shape
            if shape.num_experts is None:
                raise PlanError(f"{where}, but layer {source.layer} of {source.donor!r} is dense; {way_out}")
            giver = donors[source.donor].place(source.layer).mixture.router
            for name, mine in router_rows(layer).items():
                row = giver.tensor(name)
                if name == "weight" and row is None:
                    raise PlanError(f"{where}, but the router of layer {source.layer} has no {name}; {way_out}")
                if row is not None and row.shape[1:] != mine.shape[1:]:
                    raise PlanError(
                        f"{where}: a row of {name} has shape {list(row.shape[1:])} in layer {source.layer}, "
                        f"{list(mine.shape[1:])} here; {way_out}"
                    )
        if entry.router == "mean" and sum(source.weight for source in sources) == 0:
            raise PlanError(f"layer {entry.layer} expert {index}: its weights sum to 0, so its router row has no mean")
    if router.choice_ids:
        renaming(work)


def renaming(work: Work) -> list[int]:
    """For each old expert the new id, for routers that store ids.

    Raises:
        PlanError: an old expert is not the first source of exactly one new expert.
    """
    entry, count = work.entry, work.place.shape.num_experts or 0
    leads: dict[int, list[int]] = {old: [] for old in range(count)}
    for index, sources in enumerate(entry.experts):
        source = sources[0]
        if source.donor == "self" and source.layer == entry.layer and source.expert is not None:
            leads[source.expert].append(index)
    for old, new in leads.items():
        if len(new) != 1:
            raise PlanError(
                f"layer {entry.layer}: its router stores expert ids and expert {old} becomes {len(new)} experts; "
                "such a router can only be reordered, use router=new"
            )
    return [new[0] for new in leads.values()]
