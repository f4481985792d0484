"""Inference on one token: matrix-vector products on the experts as they come, without sorting or gathering rows."""

import torch
from torch import Tensor

from moestro.core.errors import ConfigError
from moestro.ops.activation import Activation, apply_activation
from moestro.ops.route import compute_dtype
from moestro.ops.weights import FFNWeights


@torch.no_grad()
def one_token_ffn(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor | None,
    weights: FFNWeights,
    activation: Activation,
) -> Tensor:
    """The same function as `loop_ffn` for T = 1, without gradients. Experts are added in ascending order."""
    if len(x_TD) != 1:
        raise ConfigError(f"backend 'one_token' takes 1 token; got {len(x_TD)}")
    dtype = compute_dtype(weights.up_EJD.dtype)
    x_D = x_TD[0].to(dtype)
    ids = expert_N.tolist()
    slots = sorted((slot for slot, expert in enumerate(ids) if expert < weights.num_experts), key=ids.__getitem__)
    experts = [ids[slot] for slot in slots]
    if not experts:
        return x_TD.new_zeros(1, weights.out_dim)
    pre_KJ = torch.empty(len(experts), weights.up_EJD.shape[1], dtype=dtype)
    for expert, pre_J in zip(experts, pre_KJ.unbind(0), strict=True):
        torch.mv(_cast(weights.up_EJD[expert], dtype), x_D, out=pre_J)
    if weights.up_bias_EJ is not None:
        pre_KJ.add_(weights.up_bias_EJ[experts])
    hidden_KI = apply_activation(pre_KJ, activation, weights.gated, weights.interleaved)
    weight_K = None if weight_N is None else weight_N[slots].to(dtype)
    if weight_K is not None:
        hidden_KI = hidden_KI * weight_K.unsqueeze(-1)
    y_O = torch.zeros(weights.out_dim, dtype=dtype)
    for expert, hidden_I in zip(experts, hidden_KI.unbind(0), strict=True):
        y_O.addmv_(_cast(weights.down_EOI[expert], dtype), hidden_I)
    if weights.down_bias_EO is not None:
        bias_KO = weights.down_bias_EO[experts].to(dtype)
        y_O.add_((bias_KO if weight_K is None else bias_KO * weight_K.unsqueeze(-1)).sum(0))
    return y_O.unsqueeze(0).to(x_TD.dtype)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype == dtype else weight.to(dtype)
