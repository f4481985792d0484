"""What packing one expert alone would do to its layer: measured on the layer's own inputs, one block at a time.

    eps_ij = sum over batches of || y(i in j bits) - y ||_F     over the tokens of a batch that count for expert i

Routers read the layer's input, which stays as it is, so only the rows of expert i change: the difference is the
weighted difference of that expert's outputs, and E times J full forwards of the block are not needed. A policy other
than ``natural`` adds tokens that would reach an expert if more were chosen, under the weights they would have then.

Source: MC-MoE (2410.06270, section 3.2), read as its code does: the output of the mixture block, not of the model.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro import ops
from moestro.core.bank import StackedFFN
from moestro.core.context import RoutingContext
from moestro.core.errors import PlanError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.routing import Routing
from moestro.core.session import session
from moestro.observe import layerwise
from moestro.observe.policy import Policy, counted
from moestro.ops.formats import Packing, check_packing, dequantise, quantise
from moestro.surgery.rounding import Batches


Matrices = Mapping[str, Tensor]
"""gate, up, down of one expert."""


def expert_rows(bank: StackedFFN, expert: int, matrices: Matrices, rows_ND: Tensor) -> Tensor:
    """Outputs [N, O] of one expert with these matrices and its own biases."""
    pre_NJ = torch.cat([F.linear(rows_ND, matrices[name]) for name in bank.projections[:-1]], -1)
    if bank.up_bias is not None:
        pre_NJ = pre_NJ + bank.up_bias[expert]
    y_NO = F.linear(ops.apply_activation(pre_NJ, bank.activation, bank.gated), matrices["down"])
    return y_NO if bank.down_proj_bias is None else y_NO + bank.down_proj_bias[expert]


class _Taken:
    """Recorder: a layer's routing and input of one forward."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.seen: list[tuple[Tensor, Routing, Tensor]] = []

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """See Recorder. The layer kept its input for the session before it routed."""
        if site == self.layer.site and ctx.tokens is not None:
            self.seen.append((ctx.kept[site, "input"].detach(), routing, ctx.tokens.valid_T))


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    batches: Batches,
    layers: Sequence[int],
    packings: Sequence[Packing],
    *,
    policy: Policy = "natural",
    raise_to: int | None = None,
) -> dict[int, Tensor]:
    """How far the output of some layers moves with each packing of each expert alone, on the float model.

    Args:
        batches: arguments of the model's forward. layers: indices of blocks, all of them mixtures of float experts.
        packings: a group wider than a row means the whole row. policy, raise_to: whom a token counts for.

    Returns:
        eps_EJ by layer, float64; 0 for an expert that no token counts for.

    Raises:
        PlanError: an output that is not finite.
    """
    found: dict[int, Tensor] = {}
    for step in layerwise(model, batches):
        inside = [layer for layer in mixture_layers(step.block).values() if step.index in layers]
        if not inside:
            continue
        (layer,) = inside
        assert isinstance(layer.bank, StackedFFN)
        taken = _Taken(layer)
        with session(recorder=taken, keeps=["input"]):
            step.run()
        found[step.index] = _of_layer(layer, taken, packings, (policy, raise_to))
        if not bool(found[step.index].isfinite().all()):
            raise PlanError(f"layer {step.index}: the sensitivity of an expert is not finite; look for NaN weights")
    return found


def _of_layer(layer: MoELayer, taken: _Taken, packings: Sequence[Packing], policy: tuple[Policy, int | None]) -> Tensor:
    bank = layer.bank
    assert isinstance(bank, StackedFFN)
    eps_EJ = torch.zeros(bank.num_experts, len(packings), dtype=torch.float64)
    rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(bank.num_experts)]
    for x_TD, routing, valid_T in taken.seen:
        real = counted(layer.site, layer.router, routing, *policy)
        live_N = valid_T[real.token_N]
        token_N, expert_N, weight_N = real.token_N[live_N], real.expert_N[live_N], real.weight_N[live_N]
        narrow_TD = x_TD if layer.pre is None else layer.pre(x_TD)
        for expert in sorted(set(expert_N.tolist())):
            mine_N = expert_N == expert
            rows[expert].append((narrow_TD[token_N[mine_N]].float(), weight_N[mine_N].float()))
    for expert, parts in enumerate(rows):
        if parts:
            eps_EJ[expert] = _moved(bank, expert, parts, packings)
    return eps_EJ


def _moved(
    bank: StackedFFN, expert: int, parts: Sequence[tuple[Tensor, Tensor]], packings: Sequence[Packing]
) -> Tensor:
    """eps of one expert for each packing, [J]; ``parts``: its rows and their weights, batch by batch."""
    whole = {name: bank.weight(expert, name).float() for name in bank.projections}
    before = [expert_rows(bank, expert, whole, rows_ND) for rows_ND, _ in parts]
    eps_J = []
    for used in packings:
        coarse = {name: rounded(matrix, used) for name, matrix in whole.items()}
        total = 0.0
        for (rows_ND, weight_N), y_NO in zip(parts, before, strict=True):
            gap_NO = expert_rows(bank, expert, coarse, rows_ND) - y_NO
            total += float((gap_NO * weight_N[:, None]).double().norm())
        eps_J.append(total)
    return torch.tensor(eps_J, dtype=torch.float64)


def rounded(matrix: Tensor, used: Packing) -> Tensor:
    """A matrix [out, in] as its nearest codes stand for."""
    used = check_packing(used.fitting(matrix.shape[1]), matrix.shape[1])
    parts, final = quantise(matrix[None], used)
    return dequantise(parts, (matrix.shape[0], matrix.shape[1]), final)[0]
