"""The native forward and its twin against Transformers' own models, float32 weights, random parameters."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moestro.engine.kernels import choose
from tests.engine.hf import described
from tests.engine.test_forward import forward, rows
from tests.engine.test_kernels import every_isa


SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
RENORMALISED = {"kind": "softmax_topk", "top_k": 3, "renormalise": True}

FAMILIES: dict[str, tuple[tuple[type, type], dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": (
        (Qwen3MoeConfig, Qwen3MoeForCausalLM),
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
        RENORMALISED,
    ),
    "qwen3_moe with a dense layer": (
        (Qwen3MoeConfig, Qwen3MoeForCausalLM),
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "head_dim": 32,
            "mlp_only_layers": [1],
        },
        {**RENORMALISED, "renormalise": False},
    ),
    "mixtral": (
        (MixtralConfig, MixtralForCausalLM),
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"kind": "topk_softmax", "top_k": 2},
    ),
    "qwen2_moe": (
        (Qwen2MoeConfig, Qwen2MoeForCausalLM),
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 80,
            "norm_topk_prob": False,
        },
        {**RENORMALISED, "renormalise": False},
    ),
    "olmoe": (
        (OlmoeConfig, OlmoeForCausalLM),
        {"num_experts": 8, "num_experts_per_tok": 3},
        {**RENORMALISED, "renormalise": False},
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    (settings, kind), config, router = FAMILIES[request.param]
    torch.manual_seed(0)
    model = kind(settings(**SIZES, **config)).eval()
    for parameter in model.parameters():  # routers and norms that say something
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model, router


def test_logits_equal_those_of_transformers(family: tuple[Any, dict[str, Any]]) -> None:
    model, router = family
    tokens = np.random.default_rng(0).integers(0, 100, 50).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens.astype(np.int64))[None]).logits[0].numpy()
    packed = described(model, router)
    for kernels in (every_isa()[0], choose("twin")):
        one = forward(packed, kernels=kernels)
        got = np.concatenate(
            [one.step(rows(tokens[:30])), one.step(rows(tokens[30:31], 30)), one.step(rows(tokens[31:], 31))]
        )
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
