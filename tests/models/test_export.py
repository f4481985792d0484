"""Export: the stock architecture, byte for byte where nothing changed; a refusal in one line where there is none."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import moestro
from moestro.core.bank import StackedFFN
from moestro.core.errors import SaveError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.registry import method
from moestro.core.site import Shared
from moestro.models.export import check_logits
from moestro.models.sites import dense_ffn, sites
from moestro.models.swap import stand, swap
from moestro.testing.tiny import TINY, tiny_folder


WEIGHTS = "model.safetensors"
IDS = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))


def opened(tmp_path, family, **changes):
    tiny_folder(family, tmp_path / "stock", **changes)
    return moestro.load(tmp_path / "stock")


@pytest.mark.parametrize("family", TINY)
def test_an_unchanged_model_exports_to_itself(tmp_path, family):
    model = opened(tmp_path, family)
    moestro.export(model, tmp_path / "out")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("stock", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == family
    assert "moestro" not in json.dumps(config)


def test_the_packing_it_was_read_in_is_kept(tmp_path):
    plain = tiny_folder("mixtral", tmp_path / "stock")
    plain.save_pretrained(tmp_path / "stock", save_original_format=False)
    moestro.export(moestro.load(tmp_path / "stock"), tmp_path / "out")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("stock", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_half_precision(tmp_path):
    model = opened(tmp_path, "qwen3_moe").to(torch.bfloat16)
    moestro.export(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}


def drop_experts(layer, keep):
    """The layer with only the experts of ``keep``, as pruning leaves it."""
    router, bank = layer.router, layer.bank
    config = router.config.model_copy(update={"num_experts": len(keep)})
    new_router = type(router)(bank.dim, config)
    new_bank = StackedFFN(len(keep), bank.dim, bank.inner, activation=bank.activation)
    with torch.no_grad():
        new_router.weight.copy_(router.weight[keep])
        new_bank.gate_up_proj.copy_(bank.gate_up_proj[keep])
        new_bank.down_proj.copy_(bank.down_proj[keep])
    layer.router, layer.bank = new_router, new_bank


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_fewer_experts_in_every_layer(tmp_path, family):
    model = opened(tmp_path, family)
    for layer in mixture_layers(model).values():
        drop_experts(layer, [0, 2, 4])
    moestro.export(model, tmp_path / "out")
    again = moestro.load(tmp_path / "out")
    assert {layer.bank.num_experts for layer in mixture_layers(again).values()} == {3}
    with torch.no_grad():
        assert (again(IDS).logits - model(IDS).logits).abs().max() <= 1e-5


def test_different_numbers_of_experts_are_refused(tmp_path):
    model = opened(tmp_path, "mixtral")
    drop_experts(mixture_layers(model)["model.layers.1.mlp"], [0, 2, 4])
    with pytest.raises(SaveError, match=r"model\.layers\.1\.mlp has num_experts 3, model\.layers\.0\.mlp has 5"):
        moestro.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def upcycle(model, layers, **router):
    """Copies of the dense feed-forward as experts, in the given layers."""
    for site in sites(model, "mlp", layers):
        ffn = dense_ffn(model, site)
        bank = StackedFFN(4, site.dim, ffn.inner, activation=ffn.activation)
        with torch.no_grad():
            bank.gate_up_proj.copy_(torch.cat([ffn.gate, ffn.up]).expand(4, -1, -1))
            bank.down_proj.copy_(ffn.down.expand(4, -1, -1))
        used = method("train.softmax_topk")
        made = used.build(site, used.configure({"num_experts": 4, "top_k": 2, **router}), Shared())
        stand(model, site, MoELayer(made, bank, site=site.path))


@pytest.mark.parametrize("softmax", ["all", "chosen"])
@pytest.mark.parametrize(
    ("family", "layers", "target"),
    [("llama", [0, 1], "mixtral"), ("mistral", [0, 1], "mixtral"), ("qwen3", [1], "qwen3_moe")],
)
def test_a_dense_family_with_experts_becomes_the_mixture_family(tmp_path, family, layers, target, softmax):
    model = opened(tmp_path, family)
    with torch.no_grad():
        dense = model(IDS).logits
    upcycle(model, layers, softmax=softmax)
    moestro.export(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == target
    again = moestro.load(tmp_path / "out")
    assert len(mixture_layers(again)) == len(layers)
    with torch.no_grad():  # equal experts with weights that sum to 1 compute the dense feed-forward
        assert (again(IDS).logits - dense).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("family", "layers", "router", "reason"),
    [
        ("llama", [1], {}, r"model\.layers\.0\.mlp is dense, mixtral wants it otherwise"),
        ("llama", [0, 1], {"renormalise": False}, "router has .*, the family"),
        ("llama", [0, 1], {"bias": True}, "router has bias=True, the family False"),
        ("llama", [0, 1], {"scale": 2.0}, r"router has scale=2\.0, the family 1\.0"),
        ("gemma3_text", [0, 1], {}, "no stock architecture has the attention of gemma3_text and experts"),
        ("qwen2", [0, 1], {}, "no stock architecture has the attention of qwen2 and experts"),
    ],
)
def test_mixtures_that_no_architecture_has(tmp_path, family, layers, router, reason):
    model = opened(tmp_path, family)
    upcycle(model, layers, **router)
    with pytest.raises(SaveError, match=reason) as error:
        moestro.export(model, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_bias_that_mixtral_has_no_place_for(tmp_path):
    model = opened(tmp_path, "llama", attention_bias=True)
    upcycle(model, [0, 1])
    with pytest.raises(SaveError, match=r"mixtral: it has no tensor for model\.layers\.0\.self_attn\.\w+\.bias"):
        moestro.export(model, tmp_path / "out")


def test_another_router_in_a_mixture_family(tmp_path):
    model = opened(tmp_path, "mixtral")
    swap(model, "train.hash_router", {"num_experts": 5, "top_k": 2, "vocabulary": 97})
    with pytest.raises(SaveError, match="router is HashRouter, not SoftmaxTopK"):
        moestro.export(model, tmp_path / "out")


def test_a_shared_expert_where_the_family_has_none(tmp_path):
    model = opened(tmp_path, "mixtral")
    mixture_layers(model)["model.layers.0.mlp"].shared = nn.Linear(32, 32)
    with pytest.raises(SaveError, match="it has a shared expert"):
        moestro.export(model, tmp_path / "out")


def test_foreign_modules_are_named(tmp_path):
    class Gate(nn.Module):
        def forward(self, x):
            return x

    model = opened(tmp_path, "llama")
    model.model.layers[1].post_attention_layernorm = Gate()
    with pytest.raises(SaveError, match=r"model\.layers\.1\.post_attention_layernorm is a Gate, which no stock"):
        moestro.export(model, tmp_path / "out")


def test_the_logits_check_finds_a_model_that_computes_something_else(tmp_path):
    model = opened(tmp_path, "mixtral")
    assert check_logits(model, type(model).__mro__[1], tmp_path / "stock") <= 1e-5
    model.model.layers[1].register_forward_hook(lambda module, args, out: out + 0.01 * out.roll(1, -1))
    with pytest.raises(SaveError, match="differs from the model by"):
        moestro.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    moestro.export(model, tmp_path / "out", check=False)


def test_a_nan_is_a_difference(tmp_path):
    model = opened(tmp_path, "mixtral")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(SaveError, match="differs from the model by nan"):
        moestro.export(model, tmp_path / "out")
