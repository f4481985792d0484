"""Stock Transformers models give the same logits and gradients on Moestro's experts, and Moestro's experts ran."""

import pytest
import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moestro import ops
from moestro.core.errors import ConfigError
from moestro.models import experts_interface
from moestro.models.experts_interface import activation_of, experts_forward


SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SHAPE, num_experts=6, num_experts_per_tok=3)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, moe_intermediate_size=12, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2)
    ),
}


def build(family, implementation):
    torch.manual_seed(0)
    model = MODELS[family]()
    with torch.no_grad():
        for parameter in model.parameters():  # some families start their experts or biases at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_experts_implementation(implementation)
    return model


@pytest.mark.parametrize("family", MODELS)
def test_logits_and_gradients_equal_eager(family):
    ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    ours, eager = build(family, "moestro"), build(family, "eager")
    with ops.counting(ops.training_backend()) as calls:
        found = ours(ids, labels=ids)
    assert calls == 2  # once a layer
    with ops.counting(ops.training_backend()) as none:
        expected = eager(ids, labels=ids)
    assert none == 0
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    found.loss.backward()
    expected.loss.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", MODELS)
def test_generation_equals_eager(family):
    ids = torch.randint(1, 50, (1, 5), generator=torch.Generator().manual_seed(2))
    native = ops.training_backend() == "native"
    with ops.counting("native" if native else "one_token") as calls:
        found = build(family, "moestro").generate(ids, max_new_tokens=6, do_sample=False)
    assert calls == 2 * (6 if native else 5)  # two layers; the first new token comes from the prompt's forward
    expected = build(family, "eager").generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_padding_ids_are_left_out(family):
    experts = next(m for m in build(family, "moestro").modules() if hasattr(m, "_is_expert_parallel"))
    x = torch.randn(5, 32)
    index = torch.tensor([[0, 1], [3, experts.num_experts], [2, 0], [experts.num_experts] * 2, [1, 3]])
    weight = torch.rand(5, 2)
    padded = experts_forward(experts, x, index, weight)
    silent = torch.where(index == experts.num_experts, 0.0, weight)
    expected = experts_forward(experts, x, index.clamp(max=3), silent)
    torch.testing.assert_close(padded, expected, atol=1e-6, rtol=1e-6)
    assert (padded[3] == 0).all()


def test_activations_are_recognised_by_their_numbers():
    experts = next(m for m in build("mixtral", "moestro").modules() if hasattr(m, "_is_expert_parallel"))
    for function, name in [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
    ]:
        experts.act_fn = function
        experts_interface._activations.pop(experts, None)
        assert activation_of(experts) == name


@pytest.mark.parametrize("function", [nn.Tanh(), lambda x: x * torch.sigmoid(1.702 * x), nn.Hardtanh()])
def test_an_unknown_activation_is_refused(function):
    model = build("mixtral", "moestro")
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            del module.act_fn
            module.act_fn = function
    with pytest.raises(
        ConfigError, match=r"the activation of MixtralExperts is none of silu, .* 'eager' for this model"
    ):
        model(torch.ones(1, 3, dtype=torch.int64))


def test_other_clamps_than_those_of_gpt_oss_are_refused():
    model = build("gpt_oss", "moestro")
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            module.limit = 5.0
    with pytest.raises(ConfigError, match="the activation of GptOssExperts"):
        model(torch.ones(1, 3, dtype=torch.int64))


def test_a_norm_after_the_experts_is_refused():
    experts = next(m for m in build("mixtral", "moestro").modules() if hasattr(m, "_is_expert_parallel"))
    experts.has_post_expert_norm = True
    with pytest.raises(ConfigError, match="normalises each expert's output"):
        activation_of(experts)


def test_gradients_of_a_transposed_layout_keep_the_memory_order():
    model = build("gpt_oss", "moestro")
    ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    model(ids, labels=ids).loss.backward()
    experts = next(m for m in model.modules() if hasattr(m, "_is_expert_parallel"))
    for name in ("gate_up_proj", "down_proj"):
        assert getattr(experts, name).grad.is_contiguous()
