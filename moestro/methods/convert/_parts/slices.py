"""Cuts of a dense feed-forward's inner units into slices of equal width: who goes together.

contiguous    neighbours
random        a random permutation
weights       balanced k-means of the rows of gate and up, side by side
coactivation  balanced k-means of the units' activations on calibration data, from their Gram matrix
"""

from typing import Literal

import torch
from torch import Tensor

from moestro.core.errors import PlanError
from moestro.core.inputs import LayerShape, PlanInputs
from moestro.methods.convert._parts.clusters import balanced_clusters
from moestro.surgery.experts import generator


Partition = Literal["contiguous", "random", "weights", "coactivation"]

READS_MODEL: tuple[Partition, ...] = ("weights", "coactivation")
"""Partitions that rest on what is in the model, so that a plan fits that very model only."""


def statistics_of(partition: Partition) -> tuple[str, ...]:
    """What must be measured: per layer a matrix [I, I]."""
    return ("coactivation",) if partition == "coactivation" else ()


def gram_of_weights(gate_ID: Tensor | None, up_ID: Tensor) -> Tensor:
    """Gram matrix [I, I] of the rows of gate and up, side by side."""
    rows = up_ID if gate_ID is None else torch.cat([gate_ID, up_ID], 1)
    return rows.double() @ rows.double().T


def gram_of_activations(coactivation_II: Tensor) -> Tensor:
    """Co-activation scaled so that every unit has norm 1; a unit that was never active stays 0."""
    norm_I = coactivation_II.double().diagonal().clamp(min=0).sqrt()
    scale_I = torch.where(norm_I > 0, 1.0 / norm_I.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return coactivation_II.double() * scale_I[:, None] * scale_I


def slices(
    inputs: PlanInputs, there: LayerShape, num_experts: int, partition: Partition, purpose: str
) -> list[list[int]]:
    """The inner units of each slice, ascending within a slice.

    Args:
        there: the dense layer. num_experts: slices of equal width. purpose: names the random draws of a method.

    Raises:
        PlanError: a width that ``num_experts`` does not divide, or a statistic that was not measured.
    """
    if there.inner % num_experts:
        near = [e for e in range(2, there.inner + 1) if there.inner % e == 0 and e <= 4 * num_experts]
        raise PlanError(
            f"layer {there.layer}: {there.inner} inner units cannot be cut into {num_experts} equal slices; "
            f"num_experts may be {', '.join(map(str, near[-8:])) or there.inner}"
        )
    draw = generator(inputs.seed, there.layer, purpose)
    if partition == "contiguous":
        order = torch.arange(there.inner)
    elif partition == "random":
        order = torch.randperm(there.inner, generator=draw)
    else:
        if partition == "weights":
            gate = inputs.subject.tensor(there.layer, None, "gate") if there.gated else None
            gram_II = gram_of_weights(gate, inputs.subject.tensor(there.layer, None, "up"))
        else:
            gram_II = gram_of_activations(inputs.statistic("coactivation", there.layer))
            if gram_II.shape != (there.inner, there.inner):
                raise PlanError(
                    f"layer {there.layer}: co-activation of {gram_II.shape[0]} units, the layer has {there.inner}"
                )
        return balanced_clusters(gram_II, num_experts, int(torch.randint(2**31, (1,), generator=draw)))
    return order.view(num_experts, -1).sort(1).values.tolist()
