"""How many bytes a model takes on disk, before and after a plan, so that a full disk is noticed before the work."""

from collections.abc import Mapping

from torch import nn

from moestro.core.layer import MoELayer
from moestro.core.plan import BitPlan, ExpertPlan, Plan
from moestro.models.save import unsaved
from moestro.surgery.bits import check_bits
from moestro.surgery.check import check
from moestro.surgery.memory import opened_all
from moestro.surgery.opened import OpenModel


def nbytes_of(model: nn.Module, *, experts: bool = True) -> int:
    """Bytes of the tensors that a saved model has; without ``experts`` those that no plan about experts takes away."""
    left_out = unsaved(model)
    sites = tuple(f"{path}." for path, there in model.named_modules() if isinstance(there, MoELayer) and not experts)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    return sum(tensor.nbytes for name, tensor in tensors.items() if not sites or not name.startswith(sites))


def nbytes_after(model: nn.Module, plan: Plan, donors: Mapping[str, nn.Module] | None = None) -> int:
    """Bytes after a plan about experts or bits, but for the rows of routers, which are few.

    Raises:
        PlanError: the plan does not fit.
    """
    total = nbytes_of(model)
    if isinstance(plan, BitPlan):
        opened = OpenModel(model)
        for packed in check_bits(plan, opened):
            bank = packed.place.mixture.bank
            total += packed.nbytes - sum(bank.nbytes(expert) for expert in range(bank.num_experts))
    elif isinstance(plan, ExpertPlan):
        for work in check(plan, opened_all(model, donors or {})):
            shape = work.place.shape
            slots = [work.place.slot(None if work.place.dense is not None else 0, name) for name in shape.names]
            one = sum(tensor[index].nbytes for tensor, index in slots)
            before = 1 if shape.num_experts is None else shape.num_experts
            total += one * len(work.entry.experts) * work.inner // shape.inner - one * before
    return total
