"""The C++ path of training: forward and backward of all experts of a layer in the wheel `moestro-native`.

Optional: without the wheel, without vector units it knows, or for other dtypes than float32, torch's own products do
the work (`segments`). What it saves over them: no call for each expert, gathers and activations inside the products'
panels, and every thread of torch's own team on another expert. Bits do not depend on the number of threads. The
environment variable MOESTRO_NATIVE=0 switches it off.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from moestro.core.errors import ConfigError
from moestro.ops.activation import Activation
from moestro.ops.loop import NAMES, loop_gradients
from moestro.ops.operators import experts_backward, experts_forward, wheel
from moestro.ops.weights import FFNWeights


@cache
def is_fast() -> bool:
    """Does the wheel have vector kernels for this processor? Its plain loops are slower than torch's products."""
    native = wheel()
    return native is not None and native.train_features()["isa"] != "scalar"


def training_backend() -> str:
    """What `auto` takes for float32 on the CPU: "native", or "segments" where that is not to be had."""
    return "native" if is_fast() else "segments"


def fits(*tensors: Tensor | None) -> bool:
    """Can the wheel read these? Dense float32 of the CPU, and no tensor of another kind than torch's own."""
    return all(t is None or t.dtype == torch.float32 for t in tensors) and are_plain(*tensors)


def are_plain(*tensors: Tensor | None) -> bool:
    """Like `fits`, for tensors that are cast."""
    return all(
        t is None or (t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided)
        for t in tensors
    )


def native_ffn(
    x_TD: Tensor,
    token_N: Tensor,
    expert_N: Tensor,
    weight_N: Tensor | None,
    weights: FFNWeights,
    activation: Activation,
) -> Tensor:
    """The same function as `loop_ffn`. Raises ConfigError without the wheel and for tensors that do not `fit`."""
    tensors = (weights.up_EJD, weights.down_EOI, weights.up_bias_EJ, weights.down_bias_EO)
    if wheel() is None:
        raise ConfigError("backend 'native' needs the wheel moestro-native (pip install ./native); use 'segments'")
    if not (fits(x_TD, *tensors) and are_plain(weight_N)):
        kinds = ", ".join(sorted({type(t).__name__ for t in (x_TD, weight_N, *tensors) if t is not None}))
        raise ConfigError(
            f"backend 'native' takes float32 on the CPU; got {weights.up_EJD.dtype} on {x_TD.device} ({kinds}); "
            "use 'segments'"
        )
    args = (x_TD, weight_N, *tensors, token_N, expert_N, activation, weights.gated, weights.interleaved)
    trains = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in args[:6])
    if trains or forward_ad._current_level >= 0:  # the operator would drop tangents; the function refuses them
        y_TO: Tensor = _NativeFFN.apply(*args)  # type: ignore[no-untyped-call]
        return y_TO
    return experts_forward(*args, False)[0]  # type: ignore[no-any-return]


class _NativeFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y_TO, pre_NJ = experts_forward(*args, True)
        ctx.save_for_backward(pre_NJ, *args[:8])
        ctx.rest = args[8:]
        return y_TO  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        pre_NJ, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[:6]
        names = [name for name, needed in zip(NAMES, needs, strict=True) if needed]
        if torch.is_grad_enabled():  # create_graph=True: derivatives of derivatives come from the reference
            x_TD, weight_N, up, down, up_bias, down_bias, token_N, expert_N = tensors
            activation, gated, interleaved = ctx.rest
            weights = FFNWeights(up, down, gated, up_bias, down_bias, interleaved)
            grads = loop_gradients(x_TD, token_N, expert_N, weight_N, weights, activation, grad_TO, names)
        else:
            grads = dict(zip(names, experts_backward(grad_TO, pre_NJ, *tensors, *ctx.rest, needs), strict=True))
        return (*(grads.get(name) for name in NAMES), *[None] * 5)
