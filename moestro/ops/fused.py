"""`fused_ffn`: the feed-forward experts of a layer, whichever way is fastest here."""

from typing import Literal, get_args

import torch
from torch import Tensor

from moestro.core.errors import ConfigError
from moestro.ops.activation import Activation, check_activation
from moestro.ops.counters import count
from moestro.ops.decode import one_token_ffn
from moestro.ops.grouped import grouped_ffn
from moestro.ops.loop import loop_ffn
from moestro.ops.native import are_plain, fits, is_fast, native_ffn
from moestro.ops.segments import reproducible_ffn, segments_ffn
from moestro.ops.weights import FFNWeights


Backend = Literal["auto", "loop", "grouped", "segments", "native", "one_token", "reproducible"]

_BACKENDS = {
    "loop": loop_ffn,
    "grouped": grouped_ffn,
    "segments": segments_ffn,
    "native": native_ffn,
    "one_token": one_token_ffn,
    "reproducible": reproducible_ffn,
}
BACKENDS = tuple(_BACKENDS)


def fused_ffn(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor | None,
    num_tokens: int,
    weights: FFNWeights,
    activation: Activation,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """y[t] = sum over the assignments n of token t of weight_n * expert_n(x[t]).

    x_TD: [T, D] with T = num_tokens. token_N, expert_N: integer [N], any order, any number per token; ids >=
    num_experts are left out. weight_N: [N] in any float dtype, or None for ones. Returns [T, O] in x's dtype;
    the experts run in the dtype of their weights. A token's terms are added in ascending order of experts,
    then assignments, so its sum does not depend on other tokens. Gradients reach x, weight_N, weights and
    biases. Raises ConfigError for an unknown backend or activation.
    """
    return _eager(x_TD, token_N, expert_N, weight_N, num_tokens, weights, activation, backend)  # type: ignore[no-any-return]


def _fused_ffn(
    x_TD: Tensor, token_N: Tensor, expert_N: Tensor, weight_N: Tensor | None, num_tokens: int,
    weights: FFNWeights, activation: Activation, backend: Backend,
) -> Tensor:  # fmt: skip
    check_activation(activation, weights.gated)
    if x_TD.dim() != 2 or x_TD.shape != (num_tokens, weights.up_EJD.shape[2]):
        raise ConfigError(f"x must be [{num_tokens}, {weights.up_EJD.shape[2]}]; got {list(x_TD.shape)}")
    if not len(token_N) == len(expert_N) == (len(expert_N) if weight_N is None else len(weight_N)):
        raise ConfigError("token, expert and weight lists must be equally long")
    chosen = choose_backend(x_TD, expert_N, weight_N, weights) if backend == "auto" else backend
    if chosen not in _BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; known: {', '.join(get_args(Backend))}")
    count(chosen)
    rows_TD = x_TD.to(weights.up_EJD.dtype)
    return _BACKENDS[chosen](rows_TD, token_N, expert_N, weight_N, weights, activation).to(x_TD.dtype)


# Sizes of the groups are data: one graph break a layer under torch.compile.
_eager = torch.compiler.disable(_fused_ffn)  # type: ignore[no-untyped-call]


def choose_backend(x_TD: Tensor, expert_N: Tensor, weight_N: Tensor | None, weights: FFNWeights) -> str:
    """The rule of `auto`.

    On a CPU `native` beats the others at every shape measured; where it cannot be had, `segments`, but for inference
    on one token, where sorting is not worth it. On accelerators torch's grouped product runs in bfloat16 only;
    other dtypes take the loop.
    """
    if x_TD.device.type != "cpu":
        return "grouped" if weights.up_EJD.dtype == torch.bfloat16 else "loop"
    tensors = (x_TD, weight_N, weights.up_EJD, weights.down_EOI, weights.up_bias_EJ, weights.down_bias_EO)
    if is_fast() and fits(*tensors[2:]) and are_plain(*tensors[:2]):  # x and weights of the routing are cast
        return "native"
    trains = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return "one_token" if len(x_TD) == 1 and not trains else "segments"
