"""Reference: one expert after another in plain autograd operations. Slow, and obviously right."""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.ops.activation import Activation, apply_activation
from moestro.ops.rows import scatter_rows, sort_rows
from moestro.ops.weights import FFNWeights


NAMES = ("x", "weight", "up", "down", "up_bias", "down_bias")
"""The inputs of a layer's experts that may need gradients, in this order everywhere."""


def loop_ffn(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor | None,
    weights: FFNWeights,
    activation: Activation,
) -> Tensor:
    """y[t] = sum over the assignments n of token t of weight_n * expert_n(x[t]), [T, O].

    Differentiable any number of times.
    """
    segments = sort_rows(expert_N, weights.num_experts)
    outputs = []
    # Expert 0 runs even when nothing is assigned: the result keeps its place in the autograd graph.
    for expert in segments.hit or [0]:
        rows_ND = x_TD[token_N[segments.order_N[segments.slice(expert)]]]
        up_bias = None if weights.up_bias_EJ is None else weights.up_bias_EJ[expert]
        down_bias = None if weights.down_bias_EO is None else weights.down_bias_EO[expert]
        pre_NJ = F.linear(rows_ND, weights.up_EJD[expert], up_bias)
        hidden_NI = apply_activation(pre_NJ, activation, weights.gated, weights.interleaved)
        outputs.append(F.linear(hidden_NI, weights.down_EOI[expert], down_bias))
    weight_sorted = None if weight_N is None else weight_N[segments.order_N]
    return scatter_rows(torch.cat(outputs), token_N[segments.order_N], weight_sorted, x_TD.shape[0])


def loop_gradients(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor | None,
    weights: FFNWeights,
    activation: Activation,
    grad_TO: Tensor,
    needs: Collection[str],
) -> dict[str, Tensor]:
    """Gradients of `loop_ffn` that can be differentiated again.

    `needs`: those wanted of `NAMES`.
    """
    y_TO = loop_ffn(x_TD, token_N, expert_N, weight_N, weights, activation)
    inputs = (x_TD, weight_N, weights.up_EJD, weights.down_EOI, weights.up_bias_EJ, weights.down_bias_EO)
    named = zip(NAMES, inputs, strict=True)
    wanted = {name: tensor for name, tensor in named if name in needs and tensor is not None}
    found = torch.autograd.grad(y_TO, list(wanted.values()), grad_TO, create_graph=True, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))
