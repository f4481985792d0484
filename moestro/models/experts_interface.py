"""The second door: models loaded by Transformers alone run their experts on Moestro's compute.

Importing this module registers "moestro" with Transformers' experts interface; a stock model then takes it by
`from_pretrained(..., experts_implementation="moestro")` or `model.set_experts_implementation("moestro")`. It brings
speed only: there is no Routing here, so no edits, losses or traces (`moestro.load` gives those).
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moestro import ops
from moestro.core.errors import ConfigError


NAME = "moestro"

_activations: "WeakKeyDictionary[nn.Module, ops.Activation]" = WeakKeyDictionary()


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of the chosen experts, [T, D]; stands in for the forward of a Transformers experts module.

    Args:
        self: the experts module; read are its stacked weights and the flags set by `use_experts_implementation`.
        hidden_states: [T, D]. top_k_index: integer [T, K]; ids >= num_experts are padding and left out.
        top_k_weights: [T, K].

    Raises:
        ConfigError: the module does something between its projections that Moestro's experts do not.
    """
    num_tokens, top_k = top_k_index.shape
    token_N = torch.arange(num_tokens, device=top_k_index.device).repeat_interleave(top_k)
    return ops.fused_ffn(
        hidden_states,
        token_N,
        top_k_index.reshape(-1),
        top_k_weights.reshape(-1),
        num_tokens,
        _weights(self),
        activation_of(self),
    )


def activation_of(module: nn.Module) -> ops.Activation:
    """Which activation an experts module computes, found by comparing numbers, not names.

    Raises ConfigError when it is none of Moestro's, or when a norm follows the experts.
    """
    if module not in _activations:
        _activations[module] = _probe(module)
    return _activations[module]


def _probe(module: nn.Module) -> ops.Activation:
    way_out = "; choose experts_implementation='grouped_mm' or 'eager' for this model"
    if module.has_post_expert_norm:
        raise ConfigError(f"{type(module).__name__} normalises each expert's output, which Moestro does not{way_out}")
    gate = torch.linspace(-12, 12, 97, dtype=torch.float64)  # past the clamps of gpt-oss on both sides
    up = torch.linspace(9, -9, 97, dtype=torch.float64)
    if module.has_gate:
        pre_NJ = torch.stack([gate, up], dim=-1)  # one unit wide: the same in both layouts
        found = module._apply_gate(pre_NJ)  # type: ignore[operator]
    else:
        pre_NJ = gate.unsqueeze(-1)
        found = module.act_fn(pre_NJ)  # type: ignore[operator]
    for name in ops.ACTIVATIONS:
        if name == "swiglu_oss" and not module.has_gate:
            continue
        known = ops.apply_activation(pre_NJ, name, bool(module.has_gate))  # type: ignore[arg-type]
        if torch.allclose(found, known, rtol=0, atol=1e-6):
            return name  # type: ignore[return-value]
    raise ConfigError(f"the activation of {type(module).__name__} is none of {', '.join(ops.ACTIVATIONS)}{way_out}")


def _weights(module: nn.Module) -> ops.FFNWeights:
    up, down = ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"
    up_EJD, down_EOI = getattr(module, up), getattr(module, down)
    if module.is_transposed:
        up_EJD, down_EOI = up_EJD.transpose(1, 2), down_EOI.transpose(1, 2)
    return ops.FFNWeights(
        up_EJD,
        down_EOI,
        bool(module.has_gate),
        getattr(module, f"{up}_bias") if module.has_bias else None,
        getattr(module, f"{down}_bias") if module.has_bias else None,
        interleaved=not module.is_concatenated,
    )


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
