"""Parameters, operations and cache bytes against counted runs of Transformers' modules, and against closed forms."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import MoEModelOutput

from moestro.core.bank import StackedFFN
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.models.load import adopt
from moestro.models.sizing import Amount, Attention, MixtureSize, ModelSize, training_bytes
from moestro.models.sizing_build import Weight, size_of_config, size_of_model, size_of_weights
from moestro.testing.tiny import TINY, tiny_model


LENGTH = 11
PLENTY = {"switch_transformers": {"expert_capacity": 64}}  # a dropped token would save operations


def stock(family: str) -> Any:
    """A tiny model of Transformers' own modules that computes every product as a plain one."""
    model = tiny_model(family, **PLENTY.get(family, {}))
    model.config.architectures = [type(model).__name__]
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def inputs(model: Any, length: int = LENGTH) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def counted(model: Any, **arguments: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**arguments)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", TINY)
def test_every_family_counts_as_it_runs(family: str) -> None:
    model = stock(family)
    size = size_of_config(model.config)
    tied = model.all_tied_weights_keys
    assert size.whole.parameters == sum(t.numel() for name, t in model.state_dict().items() if name not in tied)
    assert size.parts() == size_of_model(model).parts()
    assert "other" not in size.parts()
    assert counted(model, **inputs(model), use_cache=False) == size.forward_flops(LENGTH, masked=True)


@pytest.mark.parametrize("family", [name for name in TINY if size_of_config(stock(name).config).mixtures])
def test_moestros_form_counts_the_same(family: str) -> None:
    model = stock(family)
    before = size_of_config(model.config)
    adopted = adopt(model)
    size = size_of_model(adopted)
    assert sum(isinstance(m, MoELayer) for m in adopted.modules()) == len(before.mixtures)
    assert [(m.num_experts, m.top_k, m.experts) for m in size.mixtures] == [
        (m.num_experts, m.top_k, m.experts) for m in before.mixtures
    ]
    assert size.parts() == before.parts()
    run = counted(adopted, **inputs(adopted), use_cache=False)
    assert size.forward_flops(LENGTH, masked=True) == pytest.approx(run, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "deepseek_v2", "switch_transformers"])
def test_a_decoded_token_and_its_cache(family: str) -> None:
    model = stock(family)
    size = size_of_config(model.config)
    arguments = inputs(model)
    with torch.no_grad():
        out = model(**arguments)
    cache, last = out.past_key_values, arguments["input_ids"][:, -1:]
    step: dict[str, Any] = {"past_key_values": cache}
    if model.config.is_encoder_decoder:
        encoded = MoEModelOutput(last_hidden_state=out.encoder_last_hidden_state)
        step |= {"encoder_outputs": encoded, "decoder_input_ids": last}
    else:
        step |= {"input_ids": last}
    run = counted(model, **step)
    if model.config.is_encoder_decoder:
        # The source has one position less than the target has now.
        cross = [a for layer in size.decoder for a in layer.attentions if a.cross]
        run += sum(a.flops_per_pair for a in cross)
    assert run == size.decode_flops(LENGTH + 1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss", "deepseek_v3", "mixtral"])
def test_cache_bytes_are_those_of_transformers_cache(family: str) -> None:
    model = stock(family)
    size = size_of_config(model.config)
    with torch.no_grad():
        cache = model(**inputs(model), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    # A sliding layer forgets what the next token will not see, one position before it comes.
    sliding = sum(4 * a.cached for layer in size.layers for a in layer.attentions if a.window is not None)
    assert size.cache_bytes(LENGTH) == held + sliding
    assert size.cache_bytes_per_position() == size.cache_bytes(1)
    if family == "gemma3_text":
        assert sliding
        assert size.cache_bytes(100) - size.cache_bytes(99) == size.cache_bytes_per_position() // 2


def test_a_mixture_by_hand() -> None:
    # D 32, 4 heads and 2 key heads of 8, 5 experts of 48 with 2 chosen, 2 layers, V 97, not tied.
    size = size_of_config(stock("mixtral").config)
    attention, expert = 32 * 32 + 2 * 32 * 16 + 32 * 32, 3 * 32 * 48
    matrices = 2 * (attention + 5 * 32 + 2 * expert) + 97 * 32
    assert size.flops_per_token(7) == 2 * matrices + 2 * (4 * 4 * 8 * 7)
    assert size.active_parameters == matrices + 97 * 32 + 5 * 32
    assert size.whole.parameters == size.active_parameters + 2 * 3 * expert
    assert size.cache_bytes(10) == 2 * 2 * 16 * 10 * 4
    assert size.mixtures[0].slab == Amount(expert, expert, 4 * expert)
    assert size.decode_weights() == matrices


def test_published_sizes() -> None:
    from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig

    mixtral = size_of_config(MixtralConfig(architectures=["MixtralForCausalLM"]))
    assert mixtral.whole.parameters == 46_702_792_704
    assert mixtral.active_parameters == pytest.approx(12.9e9, rel=0.005)
    deepseek = size_of_config(DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"]))
    assert deepseek.whole.parameters == pytest.approx(671e9, rel=0.001)
    assert deepseek.active_parameters == pytest.approx(37e9, rel=0.02)
    assert deepseek.cache_bytes_per_position(2) == 2 * 61 * (512 + 64)
    oss = size_of_config(GptOssConfig(architectures=["GptOssForCausalLM"]))
    assert oss.whole.parameters == pytest.approx(116.8e9, rel=0.005)


def test_backward_costs_two_forwards() -> None:
    model = stock("qwen3").train()
    size = size_of_config(model.config)
    with FlopCounterMode(display=False) as counter:
        model(**inputs(model), use_cache=False).logits.sum().backward()
    assert counter.get_total_flops() == 3 * size.forward_flops(LENGTH, masked=True)
    assert size.train_flops_per_token(LENGTH) == 3 * size.forward_flops(LENGTH) // LENGTH
    assert size.train_flops_per_token(LENGTH, checkpointing=True) == 4 * size.forward_flops(LENGTH) // LENGTH


def test_training_bytes_by_hand() -> None:
    size = ModelSize(name="x", family="x", layers=(), outside={"dense": Amount(100, 100, 400)})
    assert training_bytes(size) == 100 * (4 + 4 + 8)
    assert training_bytes(size, trainable=10, itemsize=2) == 200 + 10 * (2 + 8)


def test_pairs_by_counting() -> None:
    for window, tokens in [(None, 6), (3, 6), (9, 6), (1, 4)]:
        attention = Attention(heads=1, qk_dim=1, v_dim=1, window=window)
        ids = torch.arange(tokens)
        distance = ids[:, None] - ids[None]
        mask = (distance >= 0) & (distance < (window or tokens))
        assert attention.pairs(tokens, masked=False) == int(mask.sum())
        assert attention.pairs(tokens, masked=True) == tokens**2


def test_distinct_experts_by_simulation() -> None:
    mixture = MixtureSize(path="", num_experts=8, top_k=2, experts=Amount(8, 8, 8))
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4000, 5, 8, generator=generator)
    chosen = torch.zeros(4000, 8).scatter(1, scores.topk(2).indices.flatten(1), 1)
    assert mixture.distinct(5) == pytest.approx(float(chosen.sum(1).mean()), rel=0.02)
    assert mixture.distinct(1) == pytest.approx(2)


def test_bytes_at_other_widths() -> None:
    amount = Amount(parameters=1010, matrix=1000, nbytes=2020)
    assert amount.bytes_at(None) == 2020
    assert amount.bytes_at(32) == 4040
    assert amount.bytes_at(16) == 2020
    assert amount.bytes_at(8) == 1000 + 16 * 2 + 40
    assert amount.bytes_at(4) == 500 + 16 * 2 + 40


def test_tied_copies_count_once() -> None:
    model = stock("cohere")
    assert model.config.tie_word_embeddings
    size = size_of_config(model.config)
    weights = [Weight(name, tuple(p.shape), 4 * p.numel()) for name, p in model.named_parameters()]
    assert "lm_head.weight" not in {weight.name for weight in weights}
    copy = Weight("lm_head.weight", (97, 32), 4 * 97 * 32)
    again = size_of_weights("copy", [*weights, copy], model.config)
    assert again.parts() == size.parts()
    assert again.head_matrix == size.head_matrix == 97 * 32


def test_a_base_model_has_no_head() -> None:
    model = tiny_model("bert", cls="BertModel")
    model.config.architectures = ["BertModel"]
    model.set_attn_implementation("eager")
    size = size_of_config(model.config)
    assert size.head_matrix == 0
    assert size.once == 32 * 32
    assert size.decoder == ()
    assert counted(model, **inputs(model)) == size.forward_flops(LENGTH)


class Digits(nn.Module):
    """A classifier of no family: linear, norm, mixture, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 24)
        self.norm = nn.LayerNorm(24)
        site = Site(path="mixture", kind="mlp", layer=0, num_layers=1, module=nn.Identity(), ordinal=0, dim=24, out=24)
        used = method("train.softmax_topk")
        router = used.build(site, used.configure({"num_experts": 6, "top_k": 2}), Shared())
        self.mixture = MoELayer(router, StackedFFN(6, 24, 10), site="mixture")
        self.last = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.mixture(self.norm(self.first(x))))
        return out


def test_any_module() -> None:
    model = Digits()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    size = size_of_model(model)
    assert size.whole.parameters == sum(p.numel() for p in model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.rand(9, 64))
    assert counter.get_total_flops() == pytest.approx(9 * size.flops_per_token(), rel=0.01)
    assert size.active_parameters == size.whole.parameters - 4 * 3 * 24 * 10
