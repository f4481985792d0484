"""Hold a plan about bits against a model before anything changes, and pack one layer after the other.

A plan names every matrix of every expert: an expert that it forgets would stay wide in silence, so it is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moestro.core.config import Config
from moestro.core.errors import ConfigError, PlanError
from moestro.core.layer import MoELayer
from moestro.core.ledger import Ledger
from moestro.core.packed import PackedFFN
from moestro.core.plan import BitPlan, MethodUse
from moestro.core.registry import method
from moestro.core.site import Shared
from moestro.models.sites import sites_by_layer
from moestro.ops.formats import Packing, Parts, check_packing, format_named, packed_nbytes, packing
from moestro.surgery.check import check_hash
from moestro.surgery.opened import OpenModel, Place
from moestro.surgery.rounding import Rounding, Seen


PACKED = "compress.packed_experts"
CHUNK = 1 << 23
"""Weights that are float32 at a time while a layer is packed."""
BLOCK, COARSE = 32, 16
"""Weights with so few different values in a block have been packed before."""


@dataclass
class BitWork:
    """One layer that is packed.

    Attributes:
        layer: index of the block. place: where. planned: projection -> packing of each expert.
        config: of the packed layer, once it is there. starved: experts that calibration did not reach. coarse:
            projections whose weights lie on a grid of few values already.
    """

    layer: int
    place: Place
    planned: dict[str, list[Packing]]
    config: Config | None = None
    starved: list[int] = field(default_factory=list)
    coarse: list[str] = field(default_factory=list)

    @property
    def use(self) -> MethodUse:
        """What stands there afterwards."""
        return MethodUse(method=PACKED, config={} if self.config is None else self.config.model_dump(mode="json"))

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a projection."""
        return self.place.shape.matrix(name)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices, at most."""
        return sum(packed_nbytes(self.shape(name), one) for name, used in self.planned.items() for one in used)


def check_bits(plan: BitPlan, opened: OpenModel) -> list[BitWork]:
    """The work a plan asks for, in the order of layers.

    Raises:
        PlanError: another model; experts that are packed already, missing in the plan, or not there; a packing that
            does not fit. Layer, expert, projection and numbers are in the message.
    """
    check_hash(plan, opened)
    modules = {layer: site.module for layer, site in sites_by_layer(opened.model, "mlp").items()}
    mixtures = [layer for layer, there in modules.items() if isinstance(there, MoELayer)]
    for layer in mixtures:
        there = modules[layer]
        assert isinstance(there, MoELayer)
        if isinstance(there.bank, PackedFFN):
            used = sorted({one.format for each in there.bank.packings.values() for one in each})
            raise PlanError(
                f"{opened.shape.name} layer {layer}: its experts are packed already ({', '.join(used)}); "
                "quantise the float checkpoint they come from"
            )
    for layer in sorted({*(int(key.split("/")[0]) for key in plan.bits), *plan.wide}):
        if opened.place(layer).shape.num_experts is None:
            raise PlanError(f"{opened.shape.name} layer {layer} is dense; plans about bits are for experts")
    for layer in opened.foreign:
        if layer not in plan.wide:
            opened.place(layer)  # says what stands there
    works = [_check_layer(plan, layer, opened) for layer in mixtures if layer not in plan.wide]
    if not works:
        raise PlanError(
            f"the plan packs nothing: {opened.shape.name} has {len(mixtures)} mixtures, all of them in `wide`"
        )
    planned = sum(len(used) for work in works for used in work.planned.values())
    if planned != len(plan.bits):
        raise _extra(plan, works)
    return works


def _check_layer(plan: BitPlan, layer: int, opened: OpenModel) -> BitWork:
    place = opened.place(layer)
    work = BitWork(layer, place, {})
    for name in place.shape.projections:
        used = []
        for expert in range(place.shape.num_experts or 0):
            spelled = plan.packing(layer, expert, name)
            if spelled is None:
                raise PlanError(
                    f"layer {layer} expert {expert} projection {name} is not in the plan and would stay wide unasked; "
                    "give it bits, the format wide, or list the layer in `wide`"
                )
            try:
                found = check_packing(packing(spelled), work.shape(name)[1])
            except ConfigError as error:
                raise PlanError(f"layer {layer} expert {expert} projection {name}: {error}") from None
            bits = plan.bits[f"{layer}/{expert}/{name}"]
            if format_named(found.format).bits != bits and found.format != "wide":
                raise PlanError(f"layer {layer} expert {expert} projection {name} has {bits:g} bits, but {spelled}")
            used.append(found)
        work.planned[name] = used
    return work


def _extra(plan: BitPlan, works: list[BitWork]) -> PlanError:
    known = {
        f"{work.layer}/{expert}/{name}" for work in works for name, used in work.planned.items()
        for expert in range(len(used))
    }  # fmt: skip
    first = next(key for key in plan.bits if key not in known)
    return PlanError(
        f"the plan has bits for {first}, which the model does not have ({len(plan.bits)} keys, {len(known)} matrices)"
    )


@torch.no_grad()
def check_finite(work: BitWork, opened: OpenModel) -> None:
    """Raise PlanError for a weight that is a NaN or an infinity; it would spoil the scale of its whole group.

    Fills in ``work.coarse``, from the first expert.
    """
    for name in work.planned:
        parameter, first = work.place.slot(0, name)
        whole = opened.read(parameter)
        if is_coarse(whole[first]):
            work.coarse.append(name)
        for expert in range(len(whole)):
            index = work.place.slot(expert, name)[1]
            if not bool(whole[index].isfinite().all()):
                count = int((~whole[index].isfinite()).sum())
                raise PlanError(
                    f"layer {work.layer} expert {expert} projection {name}: {count} of {whole[index].numel()} weights "
                    "are NaN or infinite; repair the checkpoint first"
                )


def is_coarse(weight_OI: Tensor) -> bool:
    """Whether weights have at most 16 different values in 99 % of the blocks of 32 in some rows: they have been in 4
    bits before. Blocks of floats nearly always hold more, in 16 bits too.
    """
    rows, width = min(64, weight_OI.shape[0]), weight_OI.shape[1] // BLOCK * BLOCK
    if not width:
        return False
    block_NB = weight_OI[:rows, :width].float().reshape(-1, BLOCK).sort(-1).values
    different_N = 1 + (block_NB.diff(dim=-1) != 0).sum(-1)
    return float((different_N <= COARSE).double().mean()) >= 0.99


@torch.no_grad()
def pack_layer(work: BitWork, opened: OpenModel, rounding: Rounding, seen: Seen | None, shared: Shared) -> MoELayer:
    """The layer that stands there afterwards, its experts packed; the old one stays as it is.

    Fills in ``work.config`` and ``work.starved``.
    """
    packed: dict[tuple[str, int], tuple[Parts, Packing]] = {}
    for name, used in work.planned.items():
        for one in dict.fromkeys(used):
            experts = [expert for expert, other in enumerate(used) if other == one]
            step = max(1, CHUNK // (work.shape(name)[0] * work.shape(name)[1]))
            for start in range(0, len(experts), step):
                some = experts[start : start + step]
                packed |= {(name, expert): found for expert, found in zip(
                    some, _pack(work, opened, rounding, seen, name, one, some), strict=True
                )}  # fmt: skip
    if seen is not None:
        work.starved = (seen.count_E == 0).nonzero().flatten().tolist()
    formats = {name: _short([str(packed[name, e][1]) for e in range(len(used))]) for name, used in work.planned.items()}
    made_by = method(PACKED)
    work.config = made_by.configure({"formats": formats})
    layer = made_by.build(work.place.site, work.config, shared)
    assert isinstance(layer, MoELayer)
    assert isinstance(layer.bank, PackedFFN)
    for (name, expert), (parts, _) in packed.items():
        layer.bank.put(expert, name, parts)
    return layer


def _short(spelled: list[str]) -> str | list[str]:
    return spelled[0] if len(set(spelled)) == 1 else spelled


def _pack(
    work: BitWork,
    opened: OpenModel,
    rounding: Rounding,
    seen: Seen | None,
    name: str,
    used: Packing,
    experts: list[int],
) -> list[tuple[Parts, Packing]]:
    """Stored tensors of one projection of experts with the same packing, one expert after the other."""
    parameter, _ = work.place.slot(0, name)
    whole = opened.read(parameter)
    weight_EOI = torch.stack([whole[work.place.slot(expert, name)[1]].float() for expert in experts])
    gram_EII: Tensor | None = None
    if seen is not None:
        gram_EII = torch.stack([seen.gram(expert, name) for expert in experts])
    form = format_named(used.format)
    try:
        codes, params = rounding(weight_EOI, used, gram_EII)
        step = 1 if form.ragged else len(experts)
        found = []
        for at in range(0, len(experts), step):
            some = {key: value[at : at + step] for key, value in params.items()}
            parts, final = form.pack(codes[at : at + step], some, used)
            found += [({key: part[place] for key, part in parts.items()}, final) for place in range(step)]
        return found
    except ConfigError as error:
        raise PlanError(f"layer {work.layer} projection {name}: {error}") from None


def expect(ledger: Ledger, work: BitWork) -> None:
    """Enter what packing a layer has to touch."""
    for name, used in work.planned.items():
        for expert in range(len(used)):
            ledger.expect(work.layer, expert, name)


def touch(ledger: Ledger, work: BitWork, layer: MoELayer) -> None:
    """Enter what is packed in a layer, as the layer itself says."""
    assert isinstance(layer.bank, PackedFFN)
    for name, used in layer.bank.packings.items():
        for expert, one in enumerate(used):
            planned = work.planned[name][expert]
            if (one.format, one.group, one.scale) == (planned.format, planned.group, planned.scale):
                ledger.touch(work.layer, expert, name)


def sites_of(works: list[BitWork]) -> Mapping[int, str]:
    """Layer -> site of what is packed."""
    return {work.layer: work.place.shape.site for work in works}
