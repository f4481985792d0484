"""Union of experts in Transformers models: dense when whole, cached as uncached, saved as dense tensors and a gate."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import moestro
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import mixture_layers
from moestro.core.session import session
from moestro.methods.train.uoe import UnionAttention, UnionLayer, recompose
from moestro.models.load import adopt
from moestro.models.swap import state_of, swap
from moestro.testing.tiny import tiny_config, tiny_model
from moestro.training.size import size_of


IDS = torch.tensor([[3, 9, 41, 5, 77, 12, 8, 30, 61], [23, 60, 4, 90, 15, 33, 2, 7, 18]])
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def union(family: str = "llama", *, heads: dict[str, Any] | None = None, units: dict[str, Any] | None = None) -> Any:
    """A tiny model with its feed-forwards and attentions in slices, two of four for a token, gates that disagree."""
    model = adopt(tiny_model(family))
    swap(model, "train.uoe", {"top_k": 2, **(units or {})}, kind="mlp")
    swap(model, "train.uoe", {"top_k": 2, **(heads or {})}, kind="attention")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in mixture_layers(model).values():
            layer.router.weight.normal_(generator=generator)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_slices_for_all_tokens_give_the_logits_of_the_dense_model(family: str) -> None:
    model = union(family, heads={"top_k": 4}, units={"top_k": 4})
    torch.testing.assert_close(model(IDS).logits, tiny_model(family)(IDS).logits, atol=1e-5, rtol=1e-5)
    assert (union(family)(IDS).logits - tiny_model(family)(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_token_uses_half_of_what_is_cut(family: str) -> None:
    model, cut = union(family), ("mlp.up", "mlp.gate", "mlp.down", "q_proj", "k_proj", "v_proj", "o_proj")
    sliced = {name: p.numel() for name, p in model.named_parameters() if any(part in name for part in cut)}
    assert any(name.endswith("bias") for name in sliced) == (family == "qwen2")
    found = size_of(model, 9)
    assert found.parameters - found.active == sum(sliced.values()) / 2


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("positions", ["original", "compacted"])
def test_a_head_is_the_dense_attention_on_its_own_tokens(family: str, positions: str) -> None:
    """The reference is Transformers' attention, all columns of the output but the head's at 0, on the head's tokens."""
    model = union(family, heads={"position_ids": positions})
    seen: list[tuple[dict[str, Any], Tensor]] = []
    layer = model.model.layers[1].self_attn
    layer.register_forward_hook(lambda m, a, k, out: seen.append((k, out[0])), with_kwargs=True)
    with torch.no_grad(), session(collect=True) as opened:
        model(IDS)
        routing = opened.take()[0].routings["model.layers.1.self_attn"]
        assert routing is not None
        call, found = seen[0]
        x, expected = call["hidden_states"], torch.zeros_like(found)
        width, dense = layer.bank.head_dim, recompose(layer)
        for head in range(4):
            alone = copy.deepcopy(dense)
            columns = torch.arange(4 * width) // width
            alone.o_proj.weight[:, columns != head] = 0.0
            for row in range(2):
                at = routing.token_N[(routing.expert_N == head) & (routing.token_N // 9 == row)].sort().values - 9 * row
                places = at if positions == "original" else torch.arange(len(at))
                angles = model.model.rotary_emb(x, places[None])
                expected[row, at] += alone(x[row, at][None], position_embeddings=angles, attention_mask=None)[0][0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("positions", ["original", "compacted"])
def test_decoding_with_a_cache_equals_the_full_forward(family: str, positions: str) -> None:
    model = union(family, heads={"position_ids": positions})
    with torch.no_grad():
        full = model(IDS).logits
        out = model(IDS[:, :4], use_cache=True)
        logits = [out.logits]
        for cut in ((4, 5), (5, 8), (8, 9)):  # one token, several at once
            out = model(IDS[:, slice(*cut)], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), full, atol=1e-5, rtol=1e-5)


def test_norms_of_queries_and_keys_stay_apart() -> None:
    dense = tiny_model("qwen3")
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.self_attn.q_norm.weight.copy_(torch.linspace(0.2, 3.0, len(layer.self_attn.q_norm.weight)))
    model = adopt(copy.deepcopy(dense))
    swap(model, "train.uoe", {"top_k": 4}, kind="attention")
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["original", "compacted"])
def test_a_cache_that_was_cropped_forgets_what_heads_held(positions: str) -> None:
    model = union("llama", heads={"position_ids": positions})
    with torch.no_grad():
        cache = model(IDS[:, [0, 1, 2, 3, 8, 7, 6]], use_cache=True).past_key_values
        cache.crop(-3)
        found = model(IDS[:, 4:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(found, model(IDS).logits[:, 4:], atol=1e-5, rtol=1e-5)


def test_caches_that_do_not_fit_are_refused() -> None:
    model, dense = union("llama"), tiny_model("llama")
    with torch.no_grad():
        cache = dense(IDS[:, :4], use_cache=True).past_key_values
        with pytest.raises(ContextError, match="the cache holds 4 positions of another model; start a new one"):
            model(IDS[:, 4:], past_key_values=cache, use_cache=True)
        model = adopt(MistralForCausalLM(MistralConfig(**{**tiny_config("mistral").to_dict(), "sliding_window": 4})))
        swap(model, "train.uoe", {"top_k": 2}, kind="attention")
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(ContextError, match="the cache dropped 6 positions; use one without a window"):
            model(IDS[:, :1], past_key_values=cache, use_cache=True)


def test_heads_need_whole_sequences() -> None:
    model = union("llama")
    swap(model, "train.mixture_of_depths", {}, kind="block", layers=[1])
    with pytest.raises(ContextError, match=r"6 of 18 tokens come here, heads need whole sequences; keep sliced"):
        model(IDS)


@pytest.mark.parametrize("positions", ["original", "compacted"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generation_is_the_same_with_and_without_a_cache(positions: str, options: dict[str, Any]) -> None:
    model = union("llama", heads={"position_ids": positions})
    how = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    beams = {"num_beams": options.get("num_beams", 1)}
    cached = model.generate(IDS, **how, **options)
    assert torch.equal(cached, model.generate(IDS, **how, **beams, use_cache=False))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    left = model.generate(padded, attention_mask=(padded != 0).long(), **how, **beams)
    assert torch.equal(left[:, 3:], cached)


@pytest.mark.parametrize("positions", ["original", "compacted"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_padding_changes_nothing(positions: str, side: str, kind: str) -> None:
    model = union("llama", heads={"position_ids": positions})
    model.set_attn_implementation(kind)
    padding = torch.zeros(2, 3, dtype=torch.long)
    parts, start = ([padding, IDS], 3) if side == "left" else ([IDS, padding], 0)
    padded = torch.cat(parts, 1)
    mask = (padded != 0).long()
    place = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        heads: list[Tensor] = []
        model.model.layers[0].self_attn.register_forward_hook(lambda m, given, out: heads.append(out[0]))
        found = model(padded, attention_mask=mask, position_ids=place).logits[:, start : start + 9]
        assert (heads[0][mask == 0] == 0).all(), "heads leave padding out"
        torch.testing.assert_close(found, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_later_tokens_and_other_rows_change_nothing() -> None:
    model = union("qwen3")
    other = IDS.clone()
    other[:, 5:] = other[:, 5:].flip(1)
    with torch.no_grad():
        before, after = model(IDS).logits, model(other).logits
        torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-5, rtol=1e-5)
        assert (before[:, 5:] - after[:, 5:]).abs().max() > 0.1
        for row in range(2):
            torch.testing.assert_close(model(IDS[row : row + 1]).logits[0], before[row], atol=1e-5, rtol=1e-5)


def test_saved_weights_are_the_dense_models_and_a_gate(tmp_path: Path) -> None:
    dense, model = tiny_model("llama"), union("llama")
    moestro.save(model, tmp_path / "own")
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    gates = {name for name in tensors if ".router." in name}
    assert len(gates) == 8
    missing, unexpected = tiny_model("llama", seed=5).load_state_dict(tensors, strict=False)
    assert (missing, set(unexpected)) == ([], gates)
    assert all(torch.equal(tensors[name], value) for name, value in dense.state_dict().items())
    again = moestro.load(tmp_path / "own")
    assert all(isinstance(layer, UnionLayer) for layer in mixture_layers(again).values())
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    how = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(again.generate(IDS, **how), model.generate(IDS, **how, use_cache=False))


def test_a_recomposed_model_is_an_ordinary_dense_one(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    moestro.save(union("llama"), tmp_path / "own")
    model = moestro.load(tmp_path / "own")
    assert recompose(model) is model
    assert mixture_layers(model) == {}
    assert state_of(model).swaps == []
    dense = tiny_model("llama")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)
        moestro.export(model, tmp_path / "dense")
        stock = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
        assert torch.equal(stock(IDS).logits, dense(IDS).logits)


def gradients(model: Any) -> dict[str, Tensor]:
    with session(collect=True) as opened:
        loss = model(IDS, labels=IDS).loss
        (loss + 0.01 * sum(term.total for ctx in opened.take() for term in ctx.losses.values())).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_checkpointed_backward_is_bit_equal() -> None:
    plain, again = union("llama").train(), union("llama").train()
    moestro.checkpoint(again)
    ours, theirs = gradients(again), gradients(plain)
    assert ours.keys() == theirs.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(value.abs().max() > 0 for value in theirs.values())


def test_a_compiled_model_computes_the_same() -> None:
    model = union("llama", heads={"position_ids": "compacted"})
    with torch.no_grad():
        expected = model.model(IDS).last_hidden_state
        compiled = torch.compile(model.model, backend="eager")(IDS).last_hidden_state
    torch.testing.assert_close(compiled, expected, atol=1e-6, rtol=1e-6)


def test_half_precision_stays_near() -> None:
    model = union("llama", heads={"top_k": 4}, units={"top_k": 4}).to(torch.bfloat16)
    with torch.no_grad():
        gap = (model(IDS).logits.float() - tiny_model("llama").to(torch.bfloat16)(IDS).logits.float()).abs().max()
    assert gap < 0.1


ENCODED = {
    "expert_choice": {"mode": "expert_choice", "keep_ratio": 0.5, "top_k": None},
    "sequence": {"mode": "sequence", "sequence_length": 9},
    "token_choice": {},
}


@pytest.mark.parametrize("mode", ENCODED)
def test_heads_of_an_encoder_may_choose_positions(mode: str, tmp_path: Path) -> None:
    dense = tiny_model("bert")
    whole, model = adopt(tiny_model("bert")), adopt(tiny_model("bert"))
    swap(whole, "train.uoe", {"top_k": 4}, kind="attention")
    swap(model, "train.uoe", {"top_k": 2, **ENCODED[mode]}, kind="attention")
    with torch.no_grad():
        for layer in mixture_layers(model).values():
            layer.router.weight.normal_(generator=torch.Generator().manual_seed(7))
        torch.testing.assert_close(whole(IDS).logits, dense(IDS).logits, atol=1e-5, rtol=1e-5)
        found = model(IDS).logits
        assert (found - dense(IDS).logits).abs().max() > 0.1
        torch.testing.assert_close(model(IDS[1:]).logits[0], found[1], atol=1e-5, rtol=1e-5)
        if mode != "sequence":
            padded = torch.cat([IDS, torch.zeros(2, 3, dtype=torch.long)], 1)
            mask = (padded != 0).long()
            torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, :9], found, atol=1e-5, rtol=1e-5)
        moestro.save(model, tmp_path / "own")
        assert torch.equal(moestro.load(tmp_path / "own")(IDS).logits, found)
        assert torch.equal(recompose(model)(IDS).logits, dense(IDS).logits)


def test_padding_says_nothing_to_the_gate_of_a_sequence() -> None:
    model = adopt(tiny_model("bert"))
    swap(model, "train.uoe", {"mode": "sequence", "sequence_length": 12}, kind="attention")
    gates = [layer.router for layer in mixture_layers(model).values()]
    padded = [torch.cat([IDS, torch.full((2, 3), filling)], 1) for filling in (0, 50)]
    mask = (padded[0] != 0).long()
    with torch.no_grad():
        for gate in gates:
            gate.weight.normal_(generator=torch.Generator().manual_seed(7))
        first, second = (model(ids, attention_mask=mask).logits[:, :9] for ids in padded)
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_what_follows_the_heads_of_an_encoder_is_its_own() -> None:
    """With all of the heads' output dropped, what is left of a layer's attention is the norm of its input."""
    model = adopt(tiny_model("bert"))
    swap(model, "train.uoe", {}, kind="attention")
    layer = next(iter(mixture_layers(model).values()))
    layer.train().output.dropout.p = 1.0
    x = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(x)[0], layer.output.LayerNorm(x))


def test_feed_forwards_of_an_encoder_may_choose_positions_and_its_decoder_may_not() -> None:
    dense, model = tiny_model("switch_transformers"), adopt(tiny_model("switch_transformers"))
    swap(model, "train.uoe", {"mode": "expert_choice", "keep_ratio": 1.0}, kind="mlp", layers=[0], stack="encoder")
    with torch.no_grad():
        found = model(input_ids=IDS, decoder_input_ids=IDS.flip(1)).logits
        expected = adopt(dense)(input_ids=IDS, decoder_input_ids=IDS.flip(1)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="a causal model needs token_choice"):
        swap(model, "train.uoe", {"mode": "expert_choice"}, kind="mlp", layers=[0], stack="decoder")


@pytest.mark.parametrize(
    ("family", "kind", "config", "told"),
    [
        ("llama", "mlp", {"mode": "expert_choice"}, "reads later tokens; a causal model needs token_choice"),
        ("llama", "attention", {"mode": "sequence", "sequence_length": 9}, "a causal model needs token_choice"),
        ("gemma3_text", "attention", {}, "gemma3_text's attention is not sliced"),
        ("bert", "mlp", {}, "bert keeps half of it at another site"),
        ("bert", "attention", {"position_ids": "compacted"}, "needs rotary positions"),
        ("mixtral", "mlp", {}, "a MoELayer has no linear layer"),
        ("llama", "mlp", {"num_slices": 7}, "num_slices=7 does not divide the 48 hidden units"),
    ],
)
def test_refusals_are_one_line_and_leave_the_model_alone(
    family: str, kind: Any, config: dict[str, Any], told: str
) -> None:
    model = adopt(tiny_model(family))
    with pytest.raises(ConfigError) as caught:
        swap(model, "train.uoe", config, kind=kind)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(isinstance(module, UnionLayer) for module in model.modules())


def test_a_mixtures_attention_is_sliced_too() -> None:
    model = adopt(tiny_model("mixtral"))
    swap(model, "train.uoe", {"top_k": 4}, kind="attention")
    assert sum(isinstance(module, UnionAttention) for module in model.modules()) == 2
    with torch.no_grad():
        expected = tiny_model("mixtral")(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
