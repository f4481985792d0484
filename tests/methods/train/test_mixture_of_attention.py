"""Attention experts under soft gates: the fused form, its cache, and what it is when all experts are one."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moestro
from moestro.core.context import open_stack
from moestro.core.errors import ConfigError
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.methods.train.mixture_of_attention import Config, MixtureOfAttention, cache_bytes, soft_gates
from moestro.models.attention import attention_parts
from moestro.models.sites import sites
from moestro.models.swap import swap
from moestro.testing.tiny import VOCAB, tiny_model
from moestro.training.size import size_of


FAMILIES = ("llama", "cohere", "qwen3", "gemma3_text", "bert")
METHOD = "train.mixture_of_attention"


def ids(rows: int = 2, width: int = 7) -> Tensor:
    return torch.randint(3, VOCAB, (rows, width), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any, batch: Tensor | None = None, **more: Any) -> Tensor:
    return model(input_ids=ids() if batch is None else batch, **more).logits


def layers_of(model: nn.Module) -> list[MixtureOfAttention]:
    return [module for module in model.modules() if isinstance(module, MixtureOfAttention)]


def mixed(family: str, spread: bool = True, seed: int = 0, changes: dict[str, Any] | None = None, **config: Any) -> Any:
    """A tiny model whose attentions became mixtures; with ``spread`` of experts that differ."""
    model = tiny_model(family, seed=seed, **changes or {})
    swap(model, METHOD, {"num_experts": 3, **config}, kind="attention")
    draw = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.router.normal_(0.0, 1.0, generator=draw)
            for name, parameter in layer.named_parameters(recurse=False):
                if spread and name != "router":
                    parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model.eval()


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_experts_are_the_attention_whatever_the_gates(family: str, kv: str) -> None:
    wanted = logits(tiny_model(family).double())
    model = mixed(family, spread=False, kv=kv).double()
    torch.testing.assert_close(logits(model), wanted, atol=1e-6, rtol=0)  # gates are softmaxes in float32


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True}),
        ("cohere", {"use_qk_norm": True}),  # a norm of its own for each head
        ("qwen3", {}),
    ],
)
def test_the_fused_form_is_the_loop_over_experts(family: str, changes: dict[str, Any], kv: str) -> None:
    model, dense = mixed(family, kv=kv, changes=changes), tiny_model(family, **changes)
    layer, there = layers_of(model)[0], sites(dense, "attention")[0]
    paths, draw = attention_parts(there).tensors(), torch.Generator().manual_seed(5)
    for norm in attention_parts(there).norms:
        weight = layer.get_parameter(f"{norm[0]}_norm.weight").data.normal_(generator=draw)
        there.module.get_parameter(f"{norm[0]}_norm.weight").data.copy_(weight)
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    turns = dense.model.rotary_emb(x, torch.arange(6)[None])
    hides = torch.full((6, 6), float("-inf")).triu(1)[None, None].expand(2, 1, 6, 6)
    gates = (x @ layer.router.T).softmax(-1)
    wanted = torch.zeros_like(x)
    for expert in range(3):
        one = copy.deepcopy(there.module)
        for name, path in paths.items():
            rows = getattr(layer, name if name.endswith("_bias") else f"{name}_proj")
            one.get_parameter(path).data.copy_(rows[min(expert, len(rows) - 1)])
        said = one(x, position_embeddings=turns, attention_mask=hides)[0]
        wanted = wanted + gates[..., expert, None] * said
    found, _ = layer(x, position_embeddings=turns, attention_mask=hides)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert layer.key_proj.shape[0] == (3 if kv == "expert" else 1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_dropout": 0.25}),
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}),
        ("gemma3_text", {"use_bidirectional_attention": True, "query_pre_attn_scalar": 5}),
        ("bert", {"attention_probs_dropout_prob": 0.25, "hidden_dropout_prob": 0.0}),
    ],
)
def test_the_kernel_is_told_what_the_attention_that_stood_there_told_it(
    monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any], training: bool
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    told: list[dict[str, Any]] = []

    def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
        more.setdefault("sliding_window", None)
        more.pop("encoder_hidden_states", None)  # None, from BERT's block to itself
        told.append({"causal": module.is_causal, "layer": module.layer_idx, "mask": mask, **more})
        return query.transpose(1, 2), None

    stock, model = tiny_model(family, **changes), mixed(family, spread=False, changes=changes)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, stock.config._attn_implementation, kernel)
    for one in (stock, model):
        logits(one.train(training), attention_mask=torch.ones(2, 7, dtype=torch.long))
    count = len(layers_of(model))
    assert len(told) == 2 * count
    for want, found in zip(told[:count], told[count:], strict=True):
        assert found.keys() == want.keys()
        for name, value in want.items():
            same = torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value
            assert same, f"{name} is {found[name]}, the attention that stood there has {value}"


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("family", ["llama", "cohere", "gemma3_text"])
def test_decoding_with_a_cache_is_the_full_forward(family: str, kv: str) -> None:
    model, batch = mixed(family, kv=kv), ids(2, 9)
    whole = logits(model, batch)
    with torch.no_grad():
        first = model(input_ids=batch[:, :4], use_cache=True)
        steps, cache = [first.logits], first.past_key_values
        for place in range(4, 9):
            steps.append(model(input_ids=batch[:, place : place + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kv", "caches"), [("expert", 3), ("shared", 1)])
def test_the_cache_holds_keys_of_each_expert_or_one(kv: str, caches: int) -> None:
    dense, model = tiny_model("llama"), mixed("llama", kv=kv)
    sizes = []
    for one in (dense, model):
        with torch.no_grad():
            cache = one(input_ids=ids(), use_cache=True).past_key_values
        sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
    assert sizes[1] == caches * sizes[0]
    assert sizes[1] == 2 * 14 * cache_bytes(3, kv, 2, 8, 4)  # 2 layers, 14 tokens


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_it_writes_the_text_that_full_forwards_choose(kv: str) -> None:
    model, text = mixed("cohere", kv=kv), ids(1, 4)
    found = model.generate(text, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(6):
        text = torch.cat([text, logits(model, text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, text)


@pytest.mark.parametrize("family", ["llama", "cohere", "bert"])
def test_padding_changes_no_real_token(family: str) -> None:
    model, batch = mixed(family), ids(2, 6)
    wide = torch.cat([torch.zeros_like(batch[:, :3]), batch], 1) if family != "bert" else torch.cat([batch, batch], 1)
    mask = torch.ones_like(wide)
    if family == "bert":
        mask[:, 6:] = 0
        found = logits(model, wide, attention_mask=mask)[:, :6]
    else:
        mask[:, :3] = 0
        found = logits(model, wide, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))[:, 3:]
    torch.testing.assert_close(found, logits(model, batch), atol=2e-5, rtol=1e-5)


def test_gates_by_hand() -> None:
    logit = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 3.0]]).log_softmax(-1)
    whole = logit.softmax(-1)
    assert torch.equal(soft_gates(logit), whole)
    assert torch.equal(soft_gates(logit, 3), whole)
    one = soft_gates(logit, 1)
    assert torch.equal(one, torch.stack([whole[0] * torch.tensor([0, 0, 1]), whole[1] * torch.tensor([1, 0, 0])]))
    two = soft_gates(logit, 2, normalise=True)
    torch.testing.assert_close(two.sum(-1), torch.ones(2))
    torch.testing.assert_close(two[0, 2] / two[0, 1], torch.tensor(2.718281828), atol=1e-5, rtol=0)
    assert two[0, 0] == 0


def test_one_gate_hears_one_expert() -> None:
    """With top_k=1 and gates that sum to 1 a token hears its best expert alone."""
    model = mixed("llama", top_k=1, gate_norm="topk_softmax")
    only = copy.deepcopy(model)
    for layer in layers_of(model) + layers_of(only):
        layer.router.data.zero_()  # ties go to the lowest
    for layer in layers_of(only):
        layer.output_proj.data[1:] = 100.0
    assert torch.equal(logits(model), logits(only))


def test_first_weights_of_the_router_have_the_deviation_asked_for() -> None:
    for std in (0.0, 0.02, 0.5):
        model = tiny_model("llama")
        swap(model, METHOD, {"num_experts": 64, "router_std": std}, kind="attention")
        for layer in layers_of(model):
            assert float(layer.router.detach().std()) == pytest.approx(std, rel=0.1)


def test_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointed in (False, True):
        model = mixed("cohere", kv="shared").train()
        if checkpointed:
            moestro.checkpoint(model)
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, plain in found[0].items():
        assert plain is not None
        torch.testing.assert_close(found[1][name], plain, atol=1e-7, rtol=1e-6, msg=name)
        assert ".self_attn." not in name or bool(plain.any()), name


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_every_expert_costs_what_the_attention_costs(kv: str) -> None:
    """Three experts: three times the projections that each owns, the scores, and the router."""
    dense, model = size_of(tiny_model("llama"), 8).forward_flops, size_of(mixed("llama", kv=kv), 8).forward_flops
    matrices, pairs = {"expert": 2 * 32 * (32 + 32 + 16 + 16), "shared": 2 * 32 * (32 + 32)}[kv], 4 * 32 * 4.5
    assert model - dense == 2 * (2 * (matrices + pairs) + 2 * 3 * 32)


def test_narrow_types_and_single_tokens() -> None:
    model = mixed("cohere").to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert bool(logits(model).isfinite().all())
    gap = (logits(model).float() - logits(mixed("cohere"))).abs().max()
    assert gap < 0.1 * logits(mixed("cohere")).abs().max()
    assert logits(model, ids(1, 1)).shape == (1, 1, VOCAB)


def alone(**config: Any) -> Any:
    """A layer of three experts, width 8, where no Transformers model is around."""
    torch.manual_seed(0)
    site = Site(path="x", kind="attention", module=nn.Identity(), dim=8, out=8)
    layer = method(METHOD).build(site, Config(num_experts=3, num_heads=2, num_kv_heads=1, **config), Shared())
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize(
    ("top_k", "norm"), [(None, "full_softmax"), (1, "full_softmax"), (2, "full_softmax"), (2, "topk_softmax")]
)
def test_without_a_model_around_it_is_causal_attention(top_k: int | None, norm: Any) -> None:
    layer, x = alone(top_k=top_k, gate_norm=norm), torch.randn(1, 5, 8)
    gates = (x @ layer.router.T).softmax(-1)
    if top_k is not None:
        gates = gates * (gates >= gates.sort(-1, descending=True).values[..., top_k - 1, None])
    gates = gates / gates.sum(-1, keepdim=True) if norm == "topk_softmax" else gates
    wanted = torch.zeros_like(x)
    for expert in range(3):
        query, key, value = (x @ getattr(layer, f"{n}_proj")[expert].T for n in ("query", "key", "value"))
        heads = []
        for head in range(2):
            score = query[..., head * 4 : head * 4 + 4] @ key.transpose(1, 2) / 2
            score = score.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
            heads.append(score.softmax(-1) @ value)
        wanted = wanted + gates[..., expert, None] * (torch.cat(heads, -1) @ layer.output_proj[expert].T)
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


def test_without_a_model_around_padding_changes_no_real_token() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = alone()

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            said: Tensor = self.layer(inputs_embeds)
            return said

    stack, x = Stack(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
    open_stack(stack, "stack")
    mask = (torch.arange(8) >= 3).long().expand(2, -1)
    found = stack(torch.cat([torch.ones(2, 3, 8), x], 1), attention_mask=mask)
    torch.testing.assert_close(found[:, 3:], stack(x), atol=1e-6, rtol=1e-5)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"num_experts": 2, "top_k": 3}, "top_k=3 of 2 attention experts"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"num_kv_heads": 2}, "num_kv_heads=2 must divide num_heads=None"),
    ],
)
def test_impossible_settings_are_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        method(METHOD).configure(config)


def test_sites_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot stand at a site of kind mlp"):
        swap(tiny_model("llama"), METHOD, {}, kind="mlp")
    with pytest.raises(ConfigError, match="leave num_heads and num_kv_heads out"):
        swap(tiny_model("llama"), METHOD, {"num_heads": 2}, kind="attention")
    with pytest.raises(ConfigError, match="olmoe's attention has other parts"):
        swap(tiny_model("olmoe"), METHOD, {}, kind="attention")
    site = Site(path="x", kind="attention", module=nn.Identity(), dim=9)
    with pytest.raises(ConfigError, match="num_heads=4 does not divide its width 9"):
        method(METHOD).build(site, Config(), Shared())
