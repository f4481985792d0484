"""Fill a new layer: experts, shared branch and router rows from their sources; weights or an optimiser's moments."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from moestro.core.bank import StackedFFN
from moestro.core.inputs import LayerShape
from moestro.core.layer import MoELayer
from moestro.core.ledger import Ledger
from moestro.core.plan import ExpertSource
from moestro.core.remap import RemapRouter
from moestro.core.router import Router
from moestro.surgery.check import Work, choices_left, renaming, router_rows, shared_bank
from moestro.surgery.experts import make_tensor
from moestro.surgery.opened import OpenModel, Place, Read, bank_slot


SHARED_EXPERT = -1
"""The place of the shared branch in a ledger."""

Into = Callable[[Tensor], Tensor]
"""The tensor to write for a parameter of the new layer: its values, or the optimiser's state of it."""


def expect(ledger: Ledger, work: Work, layer: MoELayer) -> None:
    """Enter what filling a layer has to touch."""
    for name in work.place.shape.names:
        for expert in range(len(work.entry.experts)):
            ledger.expect(work.entry.layer, expert, name)
        if work.entry.shared is not None:
            ledger.expect(work.entry.layer, SHARED_EXPERT, name)
    if work.entry.router in ("rows", "mean"):
        for name in router_rows(layer):
            for expert in range(len(work.entry.experts)):
                ledger.expect(work.entry.layer, expert, f"router.{name}")


@torch.no_grad()
def fill(
    layer: MoELayer,
    work: Work,
    donors: Mapping[str, OpenModel],
    *,
    into: Into,
    ledger: Ledger,
    reads: Mapping[str, Read] | None = None,
) -> None:
    """Write all tensors of a new layer that come from elsewhere.

    Args:
        layer: as ``work.build`` made it. donors: by name, ``self`` among them.
        into: where to write. ledger: every row written is touched.
        reads: instead of the donors' weights, for an optimiser's state: by name of the donor.
    """
    entry, shape = work.entry, work.place.shape
    moments = reads is not None
    readers = {name: donor.read for name, donor in donors.items()} if reads is None else reads

    def read(source: ExpertSource, name: str) -> Tensor:
        parameter, index = donors[source.donor].place(source.layer).slot(source.expert, name)
        return readers[source.donor](parameter)[index]

    def write(bank: StackedFFN, expert: int, sources: Sequence[ExpertSource], place: int) -> None:
        for name in shape.names:
            parameter, index = bank_slot(bank, expert, name)
            value = make_tensor(sources, name, read, work.seed, (entry.layer, expert), moments=moments)
            into(parameter)[index].copy_(value)
            ledger.touch(entry.layer, place, name)

    assert isinstance(layer.bank, StackedFFN)
    for expert, sources in enumerate(entry.experts):
        write(layer.bank, expert, sources, expert)
    if entry.shared is not None:
        bank = shared_bank(layer)
        assert bank is not None
        write(bank, 0, entry.shared, SHARED_EXPERT)
    _fill_router(layer, work, donors, readers, into, ledger)


def _fill_router(
    layer: MoELayer,
    work: Work,
    donors: Mapping[str, OpenModel],
    readers: Mapping[str, Read],
    into: Into,
    ledger: Ledger,
) -> None:
    """Router rows by the plan's rule; what belongs to no choice comes from the router that stood there."""
    rule, router = work.entry.router, layer.router
    if rule == "zero":
        for tensor in router_rows(layer).values():
            into(tensor).zero_()
    if rule in ("new", "zero"):
        return
    if rule == "remap":
        assert isinstance(router, RemapRouter)
        _copy_router(router.inner, work.place, readers["self"], into)
        return
    if isinstance(router, RemapRouter):
        _fill_remapped(router, layer, work, readers["self"], into, ledger)
        return
    for name, tensor in router_rows(layer).items():
        for expert, sources in enumerate(work.entry.experts):
            row = _row(sources if rule == "mean" else sources[:1], name, donors, readers)
            if row is not None:
                into(tensor)[expert].copy_(row)
            ledger.touch(work.entry.layer, expert, f"router.{name}")
    if work.place.shape.num_experts is not None:
        _copy_nulls(layer, work.place, readers["self"], into)
        _copy_router(router, work.place, readers["self"], into, skip=(*router.choice_rows, *router.choice_ids))
        if work.entry.router_scale is not None and readers["self"] is donors["self"].read:  # moments stay as they are
            _scale_columns(router, work.entry.router_scale, into)
        _rename_ids(layer, work, into)


def _fill_remapped(router: RemapRouter, layer: MoELayer, work: Work, read: Read, into: Into, ledger: Ledger) -> None:
    """The rows of the choices that lead to experts that stay."""
    old = work.place.mixture.router
    assert isinstance(old, RemapRouter)
    left = choices_left(work)
    for name, tensor in router_rows(layer).items():
        before = old.inner.tensor(name)
        assert before is not None
        into(tensor).copy_(read(before)[left])
        for expert in range(len(work.entry.experts)):
            ledger.touch(work.entry.layer, expert, f"router.{name}")
    _copy_router(router.inner, work.place, read, into, skip=router.inner.choice_rows)


def _row(
    sources: Sequence[ExpertSource], name: str, donors: Mapping[str, OpenModel], readers: Mapping[str, Read]
) -> Tensor | None:
    """The router row of a new expert; None where a source's router has no such tensor, so that a new row stays."""
    total: Tensor | None = None
    weights = sum(source.weight for source in sources)
    for source in sources:
        place = donors[source.donor].place(source.layer)
        assert source.expert is not None
        if place.mixture.router.tensor(name) is None:
            return None
        parameter, index = place.router_slot(source.expert, name)
        row = readers[source.donor](parameter)[index]
        if len(sources) == 1:
            return row
        row = row.float() * (source.weight / weights)
        total = row if total is None else total + row
    return total


def _copy_nulls(layer: MoELayer, place: Place, read: Read, into: Into) -> None:
    """Rows of null experts stay what they were, where there are as many."""
    old, new = place.mixture.router, layer.router
    if not new.num_null or old.num_null != new.num_null:
        return
    for name, tensor in router_rows(layer).items():
        before = old.tensor(name)
        if before is not None:
            into(tensor)[new.num_experts :].copy_(read(before)[old.num_experts :])


def _scale_columns(router: Router, factors: Sequence[float], into: Into) -> None:
    """Multiply what each input counts for in the logits."""
    weight = router.tensor("weight")
    assert weight is not None
    rows = into(weight)
    rows.copy_(rows.double() * torch.tensor(factors, dtype=torch.float64, device=rows.device))


def _copy_router(new: Router, place: Place, read: Read, into: Into, skip: tuple[str, ...] = ()) -> None:
    """Tensors of a router as they were, where the new one has them with the same shape; but for those in ``skip``."""
    old = place.mixture.router
    if isinstance(old, RemapRouter):
        old = old.inner
    before = _tensors(old)
    filled = [new.tensor(name) for name in skip]
    for name, tensor in _tensors(new).items():
        known = name in before and before[name].shape == tensor.shape
        if known and not any(tensor is other for other in filled):
            into(tensor).copy_(read(before[name]))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name."""
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}


def _rename_ids(layer: MoELayer, work: Work, into: Into) -> None:
    """Give the stored choice ids of a router their new names."""
    new, old = layer.router, work.place.mixture.router
    for name in new.choice_ids:
        before = getattr(old, name, None)
        if not isinstance(before, Tensor):
            continue
        nulls = range(new.num_experts, new.num_choices)
        table = torch.tensor([*renaming(work), *nulls], device=before.device)
        into(getattr(new, name)).copy_(table[before])


def unused(work: Work) -> list[int]:
    """Old experts of a layer that no new expert of the layer is made of."""
    shape: LayerShape = work.place.shape
    groups = [*work.entry.experts, work.entry.shared or []]
    used = {s.expert for sources in groups for s in sources if s.donor == "self" and s.layer == work.entry.layer}
    return [expert for expert in range(shape.num_experts or 0) if expert not in used]
