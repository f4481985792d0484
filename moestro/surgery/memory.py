"""Apply a plan to an open model: check all of it, then change layer by layer, and account for every row."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from moestro.core.errors import PlanError
from moestro.core.layer import MoELayer
from moestro.core.ledger import Ledger
from moestro.core.plan import ExpertPlan
from moestro.models.load import adopt
from moestro.models.swap import SHARED, stand, state_of
from moestro.surgery.assembled import SiteWork, check_sites
from moestro.surgery.check import Work, check
from moestro.surgery.fill import expect, fill
from moestro.surgery.opened import OpenModel
from moestro.surgery.optimizer import forget, move_moments
from moestro.surgery.parity import answers
from moestro.surgery.receipt import Calib, count_parameters, describe, parity
from moestro.surgery.record import record
from moestro.surgery.rest import Rest


def apply_open(
    model: nn.Module,
    plan: ExpertPlan,
    *,
    donors: Mapping[str, nn.Module] | None = None,
    optimizer: Optimizer | None = None,
    calib: Calib | None = None,
) -> dict[str, Any]:
    """Change an open model in place.

    Args:
        model: a Transformers model of a known family. plan: what to do.
        donors: the other models the plan takes experts from, by name; they stay as they are.
        optimizer: its groups and state move along with the parameters.
        calib: batches for parity figures: arguments of the model's forward, or token ids [B, S].

    Returns:
        The receipt: the ledger's account, what became of each layer, parity figures.

    Raises:
        PlanError: the plan does not fit; nothing was changed. LedgerError: a row was not written (a fault of ours).
    """
    opened = opened_all(model, donors or {})
    works = check(plan, opened)
    parts = _sites(plan, opened, optimizer)
    rest = Rest(plan, opened, [*works, *parts])
    before = None if calib is None else answers(model, calib)
    count = count_parameters(model)
    ledger = Ledger(f"{plan.method}: surgery.apply")
    account = [describe(work) for work in works]
    if not getattr(model, "is_moestro", False):
        adopt(model)
    rest.write()
    record(model, [*works, *parts])
    needed = last_reads(works)
    for number in range(len(works)):
        _change(model, works.pop(0), opened, ledger, optimizer)
        for layer in [layer for layer, last in needed.items() if last == number]:
            del opened["self"].places[layer]  # what stood there is freed now
    for part in parts:
        stand(model, part.place.site, part.made(state_of(model).shared, ledger))
    if optimizer is not None:
        forget(optimizer, model)
    receipt: dict[str, Any] = {
        "method": plan.method,
        "config": plan.config,
        "seed": plan.seed,
        "notes": plan.notes,
        "rest": plan.rest,
        "ledger": ledger.close(),
        "layers": account,
        "sites": [part.describe() for part in parts],
        "parameters": {"before": count, "after": count_parameters(model)},
        "parity": None,
    }
    if calib is not None and before is not None:
        receipt["parity"] = parity(model, plan, [entry["site"] for entry in account], calib, before)
    state_of(model).facts.setdefault("surgery", []).append(copy.deepcopy(receipt))
    return receipt


def _sites(plan: ExpertPlan, opened: Mapping[str, OpenModel], optimizer: Optimizer | None) -> list[SiteWork]:
    """The work at sites that are no feed-forward. Raises PlanError as ``check_sites`` does, and with an optimiser."""
    parts = check_sites(plan, opened)
    if parts and optimizer is not None:
        raise PlanError(f"{len(parts)} {parts[0].entry.kind} sites are made anew; an optimiser cannot move along yet")
    return parts


def opened_all(model: nn.Module, donors: Mapping[str, nn.Module]) -> dict[str, OpenModel]:
    """The model under the name ``self``, and its donors. Raises PlanError for a donor of that name."""
    if "self" in donors:
        raise PlanError("a donor cannot be called 'self': that is the model the plan is applied to")
    opened = {"self": OpenModel(model)}
    opened.update({name: OpenModel(donor, f"donor {name!r}") for name, donor in donors.items()})
    return opened


def _change(
    model: nn.Module, work: Work, opened: Mapping[str, OpenModel], ledger: Ledger, optimizer: Optimizer | None
) -> None:
    """Build, fill and install one layer."""
    state = state_of(model)
    layer = work.build(state.shared)
    if len(state.shared.modules) and not hasattr(model, SHARED):
        model.add_module(SHARED, state.shared.modules)
    expect(ledger, work, layer)
    fill(layer, work, opened, into=lambda parameter: parameter.detach(), ledger=ledger)
    there = work.place.site.module
    parameter, _ = work.place.slot(None if work.place.dense is not None else 0, "up")
    layer.to(parameter.device)
    layer.train(there.training)
    layer.bank.requires_grad_(parameter.requires_grad)
    if isinstance(there, MoELayer):
        learns = {name: p.requires_grad for name, p in there.router.named_parameters()}
        for name, p in layer.router.named_parameters():
            p.requires_grad_(learns.get(name, True))
    if optimizer is not None:
        move_moments(optimizer, layer, work, opened)
    stand(model, work.place.site, layer)


def last_reads(works: Sequence[Work]) -> dict[int, int]:
    """Layer of the target -> number of the last piece of work that reads or replaces it; it may be let go then."""
    found: dict[int, int] = {}
    for number, work in enumerate(works):
        found[work.entry.layer] = max(found.get(work.entry.layer, 0), number)
        for sources in [*work.entry.experts, work.entry.shared or []]:
            for source in sources:
                if source.donor == "self":
                    found[source.layer] = number
    return found
