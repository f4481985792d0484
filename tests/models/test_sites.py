"""Sites: addressed by kind, layer and stack, described with their widths."""

import pytest
import torch
from torch import nn

import moestro
from moestro.core.errors import ConfigError, FamilyError
from moestro.core.layer import MoELayer
from moestro.models.sites import dense_ffn, sites, stacks
from moestro.testing.tiny import tiny_folder, tiny_model


def test_mlp_sites_of_a_decoder():
    model = tiny_model("llama")
    found = sites(model, "mlp")
    assert [site.path for site in found] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert [(s.layer, s.ordinal, s.num_layers, s.dim, s.out, s.family) for s in found] == [
        (0, 0, 2, 32, 32, "llama"),
        (1, 1, 2, 32, 32, "llama"),
    ]
    assert found[0].module is model.model.layers[0].mlp
    assert found[0].model_config is model.config


def test_the_bare_stack_has_the_same_sites():
    model = tiny_model("llama", cls="LlamaModel")
    assert [site.path for site in sites(model, "mlp")] == ["layers.0.mlp", "layers.1.mlp"]
    assert [site.path for site in sites(model, "stack")] == [""]


def test_linear_sites_come_layer_by_layer_with_their_widths():
    found = sites(tiny_model("llama"), "linear", [1])
    assert [site.path.removeprefix("model.layers.1.") for site in found] == [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert [(site.dim, site.out) for site in found] == [
        *((32, 32), (32, 16), (32, 16), (32, 32)),
        *((32, 48), (32, 48), (48, 32)),
    ]


def test_dense_layers_of_a_mixture_family_have_linear_sites_and_mixtures_have_not():
    model = tiny_model("qwen3_moe")
    by_layer = {}
    for site in sites(model, "linear"):
        by_layer.setdefault(site.layer, []).append(site.path.rpartition(".")[2])
    assert "gate_proj" in by_layer[0]
    assert "gate_proj" not in by_layer[1]


def test_both_stacks_of_an_encoder_decoder():
    model = tiny_model("switch_transformers")
    assert [place.spec.name for place in stacks(model)] == ["encoder", "decoder"]
    assert [s.path for s in sites(model, "mlp", [0], stack="decoder")] == ["decoder.block.0.layer.2.mlp"]
    assert [s.path for s in sites(model, "mlp", [0])] == ["encoder.block.0.layer.1.mlp", "decoder.block.0.layer.2.mlp"]
    assert len(sites(model, "attention", [0], stack="decoder")) == 2


def test_norms_and_heads():
    model = tiny_model("gemma3_text")
    assert len(sites(model, "norm", [0])) == 6
    assert [s.path for s in sites(model, "norm")][-1] == "model.norm"
    assert [s.path for s in sites(model, "head")] == ["lm_head"]
    assert sites(model, "head")[0].out == 97


def test_refusals():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="no site kind 'moe'"):
        sites(model, "moe")
    with pytest.raises(ConfigError, match=r"no mlp site in layer 5; llama has them in layers \[0, 1\]"):
        sites(model, "mlp", [0, 5])
    with pytest.raises(FamilyError, match="not a family Moestro knows"):
        sites(nn.Linear(2, 2), "mlp")


@pytest.mark.parametrize("family", ["llama", "bert", "gemma3_text", "cohere"])
def test_dense_feed_forward_computes_what_the_layer_does(family):
    model = tiny_model(family)
    site = sites(model, "mlp")[1]
    ffn = dense_ffn(model, site)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    act = {
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda t: nn.functional.gelu(t, approximate="tanh"),
    }[ffn.activation]
    up = nn.functional.linear(x, ffn.up, ffn.up_bias)
    hidden = act(up) if ffn.gate is None else act(nn.functional.linear(x, ffn.gate, ffn.gate_bias)) * up
    y = nn.functional.linear(hidden, ffn.down, ffn.down_bias)
    with torch.no_grad():
        if family == "bert":
            layer = model.bert.encoder.layer[1]
            expected = layer.output.dense(layer.intermediate(x))
        else:
            expected = site.module(x)
        assert (y - expected).abs().max() <= 1e-6
    assert ffn.inner == 48


def test_dense_feed_forward_of_a_mixture_is_refused(tmp_path):
    tiny_folder("qwen3_moe", tmp_path)
    model = moestro.load(tmp_path)
    dense, mixture, _ = sites(model, "mlp")
    assert dense_ffn(model, dense).inner == 48
    assert isinstance(mixture.module, MoELayer)
    with pytest.raises(ConfigError, match="holds a mixture layer, not the dense feed-forward"):
        dense_ffn(model, mixture)
