"""Torch's own grouped matrix product: all experts in one call. The path for accelerators."""

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.core.errors import ConfigError
from moestro.ops.activation import Activation, apply_activation
from moestro.ops.rows import Segments, scatter_rows, sort_rows
from moestro.ops.weights import FFNWeights


def grouped_ffn(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor | None,
    weights: FFNWeights,
    activation: Activation,
) -> Tensor:
    """The same function as `loop_ffn`, by two `grouped_mm` calls. Raises ConfigError where torch has none."""
    _check(weights)
    segments = sort_rows(expert_N, weights.num_experts)
    token_sorted = token_N[segments.order_N]
    pre_NJ = _linear(x_TD[token_sorted], weights.up_EJD, weights.up_bias_EJ, segments)
    hidden_NI = apply_activation(pre_NJ, activation, weights.gated, weights.interleaved)
    rows_NO = _linear(hidden_NI, weights.down_EOI, weights.down_bias_EO, segments)
    weight_sorted = None if weight_N is None else weight_N[segments.order_N]
    return scatter_rows(rows_NO, token_sorted, weight_sorted, x_TD.shape[0])


def _check(weights: FFNWeights) -> None:
    dtype = weights.up_EJD.dtype
    widths = {weights.up_EJD.shape[2], weights.up_EJD.shape[1], weights.down_EOI.shape[2], weights.out_dim}
    if dtype.itemsize > 4 or any(width * dtype.itemsize % 16 for width in widths):
        raise ConfigError(
            f"backend 'grouped' takes 16 or 32 bit floats and widths that are multiples of 16 bytes; "
            f"got {dtype} and widths {sorted(widths)}; use backend='segments' or 'loop'"
        )


def _linear(rows_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, segments: Segments) -> Tensor:
    ends_E = segments.expert_offsets_E1[1:].to(torch.int32)
    rows_NO = F.grouped_mm(rows_NI, weight_EOI.transpose(-2, -1), offs=ends_E)
    if bias_EO is None:
        return rows_NO
    counts_E = segments.expert_offsets_E1.diff()
    return rows_NO + bias_EO.repeat_interleave(counts_E, dim=0, output_size=segments.num_rows)
