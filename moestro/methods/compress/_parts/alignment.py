"""Inner units of one expert in the order of another's: merging averages unit by unit, and units have no order.

An expert computes the same function whatever the order of its inner units. The order pi of a member that fits a
reference best makes sum_i s(i, pi(i)) largest, a linear assignment problem over I x I, where s is

    weights       <gate^r_i, gate^m_j> + <up^r_i, up^m_j> + <down^r_i, down^m_j>   (rows of gate, up; columns of down)
    activations   Pearson's correlation of the two units' inner activations on the same tokens

Above ``EXACT`` units the assignment, which costs I^3, is made within runs of units of like length (of their weights),
so that a permuted copy is still found exactly.

Source: Ainsworth et al. 2022 (2209.04836, sections 3.1 and 3.2); for experts MC-SMoE (2310.01334, section 3.2).
"""

from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moestro import ops
from moestro.core.errors import PlanError
from moestro.core.inputs import LayerShape, Subject


Align = Literal["weights", "activations", "none"]
EXACT = 4096


def units(subject: Subject, there: LayerShape, expert: int) -> Tensor:
    """The weights of each inner unit of an expert: rows of gate and up, columns of down, side by side, [I, F]."""
    parts = []
    for name in there.names:
        if name == "down_bias":
            continue  # it belongs to no inner unit
        tensor = subject.tensor(there.layer, expert, name).float()
        parts.append(tensor.T if name == "down" else tensor.reshape(there.inner, -1))
    return torch.cat(parts, 1)


def activations(subject: Subject, there: LayerShape, expert: int, input_TD: Tensor) -> Tensor:
    """Inner activations of an expert on some tokens, centred and of length 1, float32 [I, T]; constants become 0.

    What rounding makes of the mean of equal numbers is no variation.
    """
    names = ("gate", "up") if there.gated else ("up",)
    weight = torch.cat([subject.tensor(there.layer, expert, name).float() for name in names])
    bias = None
    if there.bias:
        bias = torch.cat([subject.tensor(there.layer, expert, f"{name}_bias").float() for name in names])
    pre_TJ = torch.nn.functional.linear(input_TD, weight.cpu(), None if bias is None else bias.cpu())
    inner_IT = ops.apply_activation(pre_TJ, there.activation, there.gated).T  # type: ignore[arg-type]
    size_I1 = inner_IT.norm(dim=1, keepdim=True)
    inner_IT = inner_IT - inner_IT.mean(1, keepdim=True)
    length_I1 = inner_IT.norm(dim=1, keepdim=True)
    return torch.where(length_I1 > 1e-6 * size_I1, inner_IT / length_I1.clamp(min=1e-30), 0.0)


def order(reference: Tensor, member: Tensor, runs: tuple[Tensor, Tensor] | None = None) -> list[int]:
    """For each unit of the reference the unit of the member that fits it: rows of features, [I, F] both.

    The identity where the two are equal, whatever ties there are.

    Args:
        runs: the units of each in an order that puts likely partners at like places; assign in runs of ``EXACT``.
    """
    if torch.equal(reference, member):
        return list(range(len(reference)))
    if runs is None:
        return assigned(reference, member)
    found = torch.empty(len(reference), dtype=torch.int64)
    for one, two in zip(torch.split(runs[0], EXACT), torch.split(runs[1], EXACT), strict=True):
        found[one] = two[torch.tensor(assigned(reference[one], member[two]))]
    listed: list[int] = found.tolist()
    return listed


def assigned(reference: Tensor, member: Tensor) -> list[int]:
    """The exact solution for all units at once."""
    fit = (reference.double() @ member.double().T).cpu().numpy()
    _, columns = linear_sum_assignment(fit, maximize=True)
    found: list[int] = np.asarray(columns).tolist()
    return found


def permutations(
    subject: Subject, there: LayerShape, groups: list[list[int]], by: Align, input_TD: Tensor | None
) -> dict[int, list[int]]:
    """Expert -> order of its inner units, for all but the first of each group, which is the reference.

    Raises:
        PlanError: activations without sampled tokens, or weights that are not finite.
    """
    found: dict[int, list[int]] = {}
    if by == "none":
        return found
    if by == "activations" and (input_TD is None or not len(input_TD)):
        raise PlanError("align=activations needs sampled tokens; calibrate with sample=512")

    def features(expert: int) -> Tensor:
        if by == "weights":
            rows = units(subject, there, expert)
        else:
            assert input_TD is not None
            rows = activations(subject, there, expert, input_TD)
        if not bool(torch.isfinite(rows).all()):
            raise PlanError(
                f"layer {there.layer} expert {expert}: its {by} hold NaN or infinity in "
                f"{int((~torch.isfinite(rows)).any(1).sum())} of {there.inner} inner units; mend or prune it first"
            )
        return rows

    def by_length(expert: int) -> Tensor:
        return torch.argsort(units(subject, there, expert).norm(dim=1), stable=True)

    for first, *others in groups:
        reference = features(first) if others else None
        for expert in others:
            assert reference is not None
            runs = None if there.inner <= EXACT else (by_length(first), by_length(expert))
            found[expert] = order(reference, features(expert), runs)
    return found
