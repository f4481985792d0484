"""Tiny random models of every family: a few thousand parameters, real architectures, deterministic.

Widths of an expert, of the model and of the heads all differ, so that a transposed matrix cannot pass for another.
"""

from pathlib import Path
from typing import Any

import torch

from moestro.core.errors import FamilyError


VOCAB = 97
_SIZE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {
    **_SIZE,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_experts_per_tok": 2}
_LATENT = {
    **_DECODER,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_group": 4,
    "topk_group": 2,
}

TINY: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "mistral": {**_DECODER, "sliding_window": None},
    "qwen2": {**_DECODER},
    "qwen3": {**_DECODER, "head_dim": 6},
    "gemma3_text": {
        **_DECODER,
        "head_dim": 6,
        "query_pre_attn_scalar": 6,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
    },
    "cohere": {**_DECODER},
    "bert": {**_SIZE, "intermediate_size": 48, "max_position_embeddings": 64, "type_vocab_size": 2, "pad_token_id": 0},
    "mixtral": {**_DECODER, **_MOE, "num_local_experts": 5},
    "olmoe": {**_DECODER, **_MOE, "num_experts": 6, "num_experts_per_tok": 3},
    "qwen2_moe": {
        **_DECODER,
        **_MOE,
        "num_hidden_layers": 3,
        "num_experts": 5,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        **_DECODER,
        **_MOE,
        "num_hidden_layers": 3,
        "num_experts": 5,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0},
    "deepseek_v3": {**_LATENT, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0},
    "gpt_oss": {
        **_DECODER,
        **_MOE,
        "head_dim": 6,
        "num_local_experts": 5,
        "sliding_window": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "granitemoe": {
        **_DECODER,
        **_MOE,
        "num_local_experts": 5,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
    },
    "switch_transformers": {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_kv": 6,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_heads": 4,
        "num_experts": 5,
        "expert_capacity": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
    },
}
"""Config values of each family's tiny model. The pad token is a real id, so that batches can be padded."""

_CLASSES = {"bert": "BertForMaskedLM", "switch_transformers": "SwitchTransformersForConditionalGeneration"}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The Transformers config of a tiny model; ``changes`` override values.

    Raises:
        FamilyError: no tiny model of that type.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in TINY:
        raise FamilyError(f"no tiny model of {model_type!r}; there are {', '.join(TINY)}")
    return CONFIG_MAPPING[model_type](**{**TINY[model_type], **changes})


def tiny_model(model_type: str, *, seed: int = 0, cls: str | None = None, **changes: Any) -> Any:
    """A plain Transformers model with random weights, the same at every call; in evaluation mode.

    Every parameter is random, norms, biases and routers included, and large enough for routers to disagree.

    Args:
        cls: name of another class of the family than the one with a language-model head.
    """
    import transformers

    config = tiny_config(model_type, **changes)
    if cls is None and model_type in _CLASSES:
        cls = _CLASSES[model_type]
    found = (
        transformers.AutoModelForCausalLM._model_mapping[type(config)] if cls is None else getattr(transformers, cls)
    )
    model = found(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            centre = 1.0 if param.ndim == 1 and not param.eq(0).all() else 0.0
            param.normal_(centre, 0.2, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3, generator=generator)
    return model


def tiny_folder(model_type: str, folder: str | Path, **options: Any) -> Any:
    """Save a tiny model the way Transformers does; returns the model."""
    model = tiny_model(model_type, **options)
    model.save_pretrained(folder)
    return model
