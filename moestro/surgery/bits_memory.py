"""Pack the experts of an open model by a plan about bits: check all of it, then layer by layer."""

import copy
from typing import Any

from torch import nn

from moestro.core.errors import PlanError
from moestro.core.layer import MoELayer
from moestro.core.ledger import Ledger
from moestro.core.plan import BitPlan
from moestro.models.swap import stand, state_of
from moestro.surgery.bits import BitWork, check_bits, check_finite, expect, pack_layer, sites_of, touch
from moestro.surgery.bits_receipt import add_parity, bytes_by_class, compared, receipt_of
from moestro.surgery.opened import OpenModel
from moestro.surgery.parity import Choices, answers, call_of
from moestro.surgery.receipt import Calib, count_parameters
from moestro.surgery.record import record
from moestro.surgery.rounding import rounding_of


def apply_bits_open(model: nn.Module, plan: BitPlan, *, calib: Calib | None = None) -> dict[str, Any]:
    """Pack an open model's experts in place; what stood there is freed layer by layer.

    Args:
        calib: batches for a rounding that calibrates, and for parity figures.

    Returns:
        The receipt: ledger, packings, bytes and bits a weight, share of changed choices, parity.

    Raises:
        PlanError: the plan does not fit or the weights are not finite; nothing was changed. LedgerError: a matrix was
            left wide (a fault of ours).
    """
    opened = OpenModel(model)
    works = check_bits(plan, opened)
    rounding = rounding_of(plan)
    if rounding.calibrates and not calib:
        raise PlanError(
            f"the rounding of {plan.method} looks at data; give calib=<batches>, or --data on the command line"
        )
    for work in works:
        check_finite(work, opened)
    seen_before = Choices()
    before = None if calib is None else answers(model, compared(calib), seen_before)
    sizes, count = bytes_by_class(model), count_parameters(model)
    ledger = Ledger(f"{plan.method}: surgery.apply")
    for work in works:
        expect(ledger, work)
    if rounding.calibrates:
        device = next(model.parameters()).device
        by_layer = {work.layer: work for work in works}
        batches = [call_of(batch, device) for batch in calib or ()]
        for layer, seen in rounding.walk(model, batches, sites_of(works), None, None):
            install(model, by_layer[layer], opened, ledger, pack_layer(
                by_layer[layer], opened, rounding, seen, state_of(model).shared
            ))  # fmt: skip
    else:
        for work in works:
            install(model, work, opened, ledger, pack_layer(work, opened, rounding, None, state_of(model).shared))
    record(model, works)
    receipt = receipt_of(model, plan, works, ledger, sizes, count)
    if calib is not None and before is not None:
        seen_after = Choices()
        add_parity(receipt, (before, seen_before), (answers(model, compared(calib), seen_after), seen_after))
    state_of(model).facts.setdefault("surgery", []).append(copy.deepcopy(receipt))
    return receipt


def install(model: nn.Module, work: BitWork, opened: OpenModel, ledger: Ledger, layer: MoELayer) -> None:
    """Stand a packed layer in the place of the old one."""
    there = work.place.mixture
    parameter, _ = work.place.slot(0, "up")
    layer.bank.to(parameter.device)
    layer.train(there.training)
    touch(ledger, work, layer)
    stand(model, work.place.site, layer)
    del opened.places[work.layer]
