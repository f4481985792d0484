"""The non-linearities of an expert, with derivatives written by hand for the paths that bypass autograd.

An expert computes h = a(g) for pre-activations g, or h = a(g) * b(u) when gated, where (g, u) are the two
halves of one up-projection. b(u) = u for all but `swiglu_oss`, the clamped form of gpt-oss (OpenAI, 2025,
model card): a(g) = m * sigmoid(1.702 m) with m = min(g, 7), and b(u) = clamp(u, -7, 7) + 1.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.core.errors import ConfigError


Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "swiglu_oss"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)

OSS_ALPHA = 1.702
OSS_LIMIT = 7.0

_aten = torch.ops.aten


def check_activation(activation: str, gated: bool) -> None:
    """Refuse an unknown name, and `swiglu_oss` without a gate."""
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
    if activation == "swiglu_oss" and not gated:
        raise ConfigError("activation 'swiglu_oss' needs gated experts (up projection with 2 x inner rows)")


def gate_and_up(pre_NJ: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Views of the gate's columns and of the others: two halves, or every second column."""
    if interleaved:
        return pre_NJ[..., ::2], pre_NJ[..., 1::2]
    half = pre_NJ.shape[-1] // 2
    return pre_NJ[..., :half], pre_NJ[..., half:]


def apply_activation(pre_NJ: Tensor, activation: Activation, gated: bool, interleaved: bool = False) -> Tensor:
    """h [N, I] of pre-activations [N, J] by plain autograd operations; J = 2I, or I without a gate."""
    gate, up = gate_and_up(pre_NJ, interleaved) if gated else (pre_NJ, None)
    if activation == "swiglu_oss":
        assert up is not None
        gate = gate.clamp(max=OSS_LIMIT)
        return (up.clamp(-OSS_LIMIT, OSS_LIMIT) + 1) * (gate * torch.sigmoid(OSS_ALPHA * gate))
    if activation == "silu":
        hidden = F.silu(gate)
    elif activation == "relu":
        hidden = F.relu(gate)
    else:
        hidden = F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return hidden if up is None else hidden * up


def gate_value(gate_NI: Tensor, activation: Activation, out: Tensor) -> Tensor:
    """Write a(g) into `out`."""
    if activation == "silu":
        _aten.silu.out(gate_NI, out=out)
    elif activation == "relu":
        torch.clamp(gate_NI, min=0, out=out)
    elif activation == "swiglu_oss":
        # m sigmoid(alpha m) = silu(alpha m) / alpha
        torch.clamp(gate_NI, max=OSS_LIMIT, out=out).mul_(OSS_ALPHA)
        _aten.silu.out(out, out=out)
        out.div_(OSS_ALPHA)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        _aten.gelu.out(gate_NI, approximate=approximate, out=out)
    return out


def gate_derivative(grad_NI: Tensor, gate_NI: Tensor, activation: Activation, out: Tensor) -> Tensor:
    """Write grad * a'(g) into `out`; `out` must not overlap the inputs."""
    if activation == "silu":
        _aten.silu_backward.grad_input(grad_NI, gate_NI, grad_input=out)
    elif activation == "relu":
        _aten.threshold_backward.grad_input(grad_NI, gate_NI, 0, grad_input=out)
    elif activation == "swiglu_oss":
        clamped = gate_NI.clamp(max=OSS_LIMIT).mul_(OSS_ALPHA)
        _aten.silu_backward.grad_input(grad_NI, clamped, grad_input=out)
        out.masked_fill_(gate_NI > OSS_LIMIT, 0)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        _aten.gelu_backward.grad_input(grad_NI, gate_NI, approximate=approximate, grad_input=out)
    return out


def multiply_up(hidden_NI: Tensor, up_NI: Tensor, activation: Activation, out: Tensor) -> Tensor:
    """Write hidden * b(u) into `out`, which may be `hidden_NI`."""
    if activation == "swiglu_oss":
        up_NI = up_NI.clamp(-OSS_LIMIT, OSS_LIMIT).add_(1)
    return torch.mul(hidden_NI, up_NI, out=out)


def up_derivative(grad_NI: Tensor, hidden_NI: Tensor, up_NI: Tensor, activation: Activation, out: Tensor) -> Tensor:
    """Write grad * a(g) * b'(u) into `out`, where `hidden_NI` = a(g)."""
    torch.mul(grad_NI, hidden_NI, out=out)
    if activation == "swiglu_oss":
        out.masked_fill_(up_NI.abs() > OSS_LIMIT, 0)
    return out
