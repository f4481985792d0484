"""Transformers models as descriptions with float32 matrices: what the dialects mean, checked at the source."""

from typing import Any

import numpy as np

from moestro.engine.kernels.interface import Attention, Description, Ffn, Layer, Matrix, Router
from tests.engine.models import Packed, slab_of
from tests.engine.packing import pack


def described(model: Any, router: dict[str, Any]) -> Packed:
    """A causal LM of the Mixtral, Qwen or OLMoE kind -> its description."""
    config = model.config
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def matrix(name: str) -> Matrix:
        return packed(state[name])

    def packed(weight: np.ndarray) -> Matrix:
        return Matrix("f32", *weight.shape, pack(np.ascontiguousarray(weight), "f32")[0])

    def ffn(gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> Ffn:
        return Ffn(packed(up), packed(down), packed(gate))

    layers, slabs, addresses = [], {}, {}
    for index in range(config.num_hidden_layers):
        at = f"model.layers.{index}"
        norms = {name: state.get(f"{at}.self_attn.{name}.weight") for name in ("q_norm", "k_norm")}
        wide = norms["q_norm"] is not None and norms["q_norm"].size > head_dim
        attention = Attention(
            *(matrix(f"{at}.self_attn.{name}_proj.weight") for name in "qkvo"),
            scale=head_dim**-0.5,
            **{f"{name}_bias": state.get(f"{at}.self_attn.{name}_proj.bias") for name in "qkvo"},
            qk_norm="none" if norms["q_norm"] is None else "all" if wide else "head",
            **norms,
        )
        parts: dict[str, Any] = {}
        if f"{at}.mlp.gate.weight" in state:
            up, down = state[f"{at}.mlp.experts.gate_up_proj"], state[f"{at}.mlp.experts.down_proj"]
            inner = up.shape[1] // 2
            each = [ffn(u[:inner], u[inner:], d) for u, d in zip(up, down, strict=True)]
            parts = {"router": Router(weight=matrix(f"{at}.mlp.gate.weight"), **router), "experts": len(each)}
            parts["expert"], slabs[index], addresses[index] = slab_of(each)
            shared = f"{at}.mlp.shared_expert"
        else:
            shared = f"{at}.mlp"
        if f"{shared}.up_proj.weight" in state:
            parts["shared"] = ffn(*(state[f"{shared}.{name}_proj.weight"] for name in ("gate", "up", "down")))
        if f"{shared}_gate.weight" in state:
            parts["shared_gate"] = matrix(f"{shared}_gate.weight")
        norm = state[f"{at}.input_layernorm.weight"], state[f"{at}.post_attention_layernorm.weight"]
        layers.append(Layer(*norm, attention, **parts))
    description = Description(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim,
        config.vocab_size,
        matrix("model.embed_tokens.weight"),
        matrix("lm_head.weight"),
        state["model.norm.weight"],
        layers,
        [model.model.rotary_emb.inv_freq.float().numpy()],
        norm_eps=config.rms_norm_eps,
    )
    return Packed(description, slabs, addresses)
