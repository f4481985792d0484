"""Swaps: built by method id at named sites, written down, done again on load."""

from types import ModuleType

import pytest
import torch
from torch import nn

import moestro
from moestro.core import registry
from moestro.core.config import Config
from moestro.core.context import current_context
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.site import Borrowed
from moestro.methods.train.hash_router import HashRouter
from moestro.models.families import families
from moestro.models.load import adopt
from moestro.models.sites import sites, stacks
from moestro.models.swap import Jitter, Swap, apply_swap, state_of, swap
from moestro.testing.tiny import TINY, tiny_folder, tiny_model


IDS = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))


class ScaledConfig(Config):
    """Settings of the probe."""

    size: float = 1.0
    bank: str = ""


class Scaled(nn.Module):
    """Stands for a linear: that linear plus a low-rank term that uses a shared matrix."""

    def __init__(self, linear, size, common):
        super().__init__()
        self.linear = linear
        self.size = size
        self.down = nn.Parameter(torch.full((linear.out_features, 2), 0.01))
        self.common = Borrowed(common)

    def forward(self, x):
        return self.linear(x) + self.size * self.common(x) @ self.down.T


class Entry(nn.Module):
    """Runs when a context opens; leaves the mean id for the layers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, ctx, call):
        ctx.put("entry", "mean", call["input_ids"].float().mean() * self.weight)


def fake(build):
    """A method module as a third party would ship it."""
    module = ModuleType("probe")
    module.Config = ScaledConfig
    module.build = build
    return module


@pytest.fixture
def methods(monkeypatch):
    """Methods of a third party, as its entry points would make them known."""

    class Point:
        def __init__(self, module):
            self.module = module

        def load(self):
            return self.module

    def scaled(site, config, shared):
        common = shared("common", lambda: nn.Linear(site.dim, 2, bias=False))
        return Scaled(site.module, config.size, common)

    points = {
        "adapt.probe_linear": Point(fake(scaled)),
        "adapt.probe_entry": Point(fake(lambda site, config, shared: Entry())),
        "adapt.probe_nothing": Point(fake(lambda site, config, shared: 3)),
    }
    monkeypatch.setattr(registry, "_foreign", lambda: points)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_a_router_is_replaced_and_saved(tmp_path):
    tiny_folder("mixtral", tmp_path / "a")
    model = moestro.load(tmp_path / "a")
    before = logits(model)
    entry = swap(model, "train.hash_router", {"num_experts": 5, "vocabulary": 97}, layers=[1])
    assert entry.sites == ["decoder:layers.1.mlp"]
    layers = mixture_layers(model)
    assert isinstance(layers["model.layers.1.mlp"].router, HashRouter)
    assert not isinstance(layers["model.layers.0.mlp"].router, HashRouter)
    after = logits(model)
    assert not torch.allclose(before, after)
    moestro.save(model, tmp_path / "b")
    again = moestro.load(tmp_path / "b")
    assert state_of(again).swaps == [entry]
    assert (logits(again) - after).abs().max() <= 1e-6


def test_a_dense_feed_forward_becomes_a_mixture(tmp_path):
    tiny_folder("llama", tmp_path / "a")
    model = moestro.load(tmp_path / "a")
    settings = {"num_experts": 4, "top_k": 2, "expert_size": 12, "segments": 2, "shared": 1}
    swap(model, "train.deepseekmoe", settings)
    assert list(mixture_layers(model)) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    out = logits(model)
    assert out.shape == (2, 6, 97)
    moestro.save(model, tmp_path / "b")
    assert (logits(moestro.load(tmp_path / "b")) - out).abs().max() <= 1e-6


def test_the_second_half_of_a_split_feed_forward_becomes_an_identity(tmp_path):
    tiny_folder("bert", tmp_path / "a")
    model = moestro.load(tmp_path / "a")
    swap(
        model,
        "train.deepseekmoe",
        {"num_experts": 4, "expert_size": 12, "gated": False, "activation": "gelu"},
        layers=[1],
    )
    layer = model.bert.encoder.layer[1]
    assert isinstance(layer.intermediate, MoELayer)
    assert isinstance(layer.output.dense, nn.Identity)
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = layer.output.LayerNorm(layer.intermediate(x) + x)
        assert torch.equal(layer.output(layer.intermediate(x), x), expected)
    moestro.save(model, tmp_path / "b")
    again = moestro.load(tmp_path / "b")
    assert (logits(again) - logits(model)).abs().max() <= 1e-6


def test_what_stands_in_gpt_oss_returns_a_pair(tmp_path):
    tiny_folder("gpt_oss", tmp_path / "a")
    model = moestro.load(tmp_path / "a")
    x = torch.randn(1, 3, 32)
    output, scores = model.model.layers[0].mlp(x)
    assert output.shape == x.shape
    assert scores is None
    swap(model, "train.deepseekmoe", {"num_experts": 4, "expert_size": 12}, layers=[0])
    output, _ = model.model.layers[0].mlp(x)
    assert output.shape == x.shape
    logits(model)


def test_a_loss_joins_the_layer(tmp_path):
    tiny_folder("mixtral", tmp_path)
    model = moestro.load(tmp_path)
    swap(model, "train.z_loss")
    with moestro.session(collect=True) as session:
        model(IDS)
    (context,) = session.take()
    assert {name for _, name in context.losses} == {"balance", "z"}
    assert len(context.losses) == 4


def test_the_coefficient_of_the_stock_loss_is_taken_over(tmp_path):
    tiny_folder("mixtral", tmp_path / "a", router_aux_loss_coef=0.25, output_router_logits=True)
    model = moestro.load(tmp_path / "a")
    assert model.config.output_router_logits is False
    assert state_of(model).loss_weights == {"balance": 0.25}
    tiny_folder("mixtral", tmp_path / "b", router_aux_loss_coef=0.0)
    model = moestro.load(tmp_path / "b")
    assert state_of(model).loss_weights == {}
    assert all(not layer.losses for layer in mixture_layers(model).values())


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss", "granitemoe"])
def test_the_balance_loss_is_transformers_own(tmp_path, family):
    plain = tiny_folder(family, tmp_path)
    model = moestro.load(tmp_path)
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    with torch.no_grad():
        theirs = plain(IDS, attention_mask=mask, output_router_logits=True).aux_loss
        with moestro.session(collect=True) as session:
            model(IDS, attention_mask=mask)
    (context,) = session.take()
    total = sum(term.total for (_, name), term in context.losses.items() if name == "balance")
    assert abs(total - theirs) <= 1e-5


def test_input_noise_is_taken_over_and_silent_outside_training(tmp_path):
    tiny_folder("mixtral", tmp_path, router_jitter_noise=0.3)
    model = moestro.load(tmp_path)
    layer = mixture_layers(model)["model.layers.0.mlp"]
    assert isinstance(layer.noise, Jitter)
    x = torch.ones(500, 32)
    assert torch.equal(layer.noise(x), x)
    noisy = layer.noise.train()(x)
    assert noisy.min() >= 0.7
    assert noisy.max() <= 1.3
    assert noisy.std() > 0.1


def test_per_layer_settings_and_shared_parts(tmp_path, methods):
    tiny_folder("llama", tmp_path / "a", intermediate_size=32, num_key_value_heads=4)  # all linears read 32 values
    model = moestro.load(tmp_path / "a")
    before = logits(model)
    count = len(sites(model, "linear"))
    sizes = [0.1 * i for i in range(count)]
    with pytest.raises(ConfigError, match=rf"size lists 3 values per layer for {count} sites"):
        swap(model, "adapt.probe_linear", {"size": {"per_layer": sizes[:3]}}, kind="linear")
    assert torch.equal(logits(model), before)
    swap(model, "adapt.probe_linear", {"size": {"per_layer": sizes}}, kind="linear")
    assert [module.size for module in model.modules() if isinstance(module, Scaled)] == sizes
    assert [n for n, _ in model.named_parameters() if "common" in n] == ["moestro_shared.common.weight"]
    out = logits(model)
    assert not torch.allclose(out, before)
    moestro.save(model, tmp_path / "b")
    again = moestro.load(tmp_path / "b")
    common = {id(module.common.module) for module in again.modules() if isinstance(module, Scaled)}
    assert common == {id(again.moestro_shared["common"])}
    assert (logits(again) - out).abs().max() <= 1e-6


def test_a_head_is_a_site(tmp_path, methods):
    tiny_folder("llama", tmp_path / "a")
    model = moestro.load(tmp_path / "a")
    entry = swap(model, "adapt.probe_linear", {"size": 0.5}, kind="head")
    assert entry.sites == ["lm_head"]
    out = logits(model)
    moestro.save(model, tmp_path / "b")
    assert (logits(moestro.load(tmp_path / "b")) - out).abs().max() <= 1e-6


def test_a_stack_entry_runs_when_the_context_opens(tmp_path, methods):
    tiny_folder("mixtral", tmp_path / "a")
    model = moestro.load(tmp_path / "a")
    swap(model, "adapt.probe_entry", kind="stack")
    moestro.save(model, tmp_path / "b")
    for one in (model, moestro.load(tmp_path / "b")):
        seen = []
        one.model.layers[0].register_forward_pre_hook(
            lambda m, a, seen=seen: seen.append(current_context().get("entry", "mean"))
        )
        logits(one)
        assert abs(seen[0].item() - IDS.float().mean()) <= 1e-5


def test_refusals(tmp_path, methods):
    tiny_folder("llama", tmp_path / "a")
    model = moestro.load(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"needs a mixture layer, but model\.layers\.0\.mlp holds LlamaMLP"):
        swap(model, "train.softmax_topk", {"num_experts": 5})
    with pytest.raises(ConfigError, match="no mlp site in layer 7"):
        swap(model, "train.deepseekmoe", {"expert_size": 12}, layers=[7])
    with pytest.raises(ConfigError, match="built a int"):
        swap(model, "adapt.probe_nothing")
    before = logits(model)
    places = ["decoder:layers.0.mlp", "decoder:layers.9.mlp"]
    entry = Swap(sites=places, method="train.deepseekmoe", config={"expert_size": 12})
    with pytest.raises(ConfigError, match=r"has no mlp site 'decoder:layers\.9\.mlp'"):
        apply_swap(model, entry)
    assert torch.equal(logits(model), before)
    assert state_of(model).swaps == []
    tiny_folder("mixtral", tmp_path / "b")
    with pytest.raises(ConfigError, match="chooses among 4 experts, the bank has 5"):
        swap(moestro.load(tmp_path / "b"), "train.softmax_topk", {"num_experts": 4})


def test_new_parts_take_the_type_of_the_model(tmp_path):
    tiny_folder("llama", tmp_path)
    model = moestro.load(tmp_path, dtype=torch.bfloat16)
    swap(model, "train.deepseekmoe", {"expert_size": 12}, layers=[0])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", [name for name in TINY if families()[name].kind == "moe"])
def test_adopt_opens_a_model_in_memory(family):
    plain, model = tiny_model(family), adopt(tiny_model(family))
    assert isinstance(model, type(plain))
    assert mixture_layers(model)
    batch = {"input_ids": IDS}
    if family == "switch_transformers":
        batch["decoder_input_ids"] = IDS.flip(1)
    with torch.no_grad():
        assert (model(**batch).logits - plain(**batch).logits).abs().max() <= 1e-5


def test_stacks_are_watched_once(tmp_path):
    tiny_folder("switch_transformers", tmp_path)
    model = moestro.load(tmp_path)
    assert [place.path for place in stacks(model)] == ["encoder", "decoder"]
    with moestro.session(collect=True) as session:
        model(input_ids=IDS, decoder_input_ids=IDS)
    assert [context.stack for context in session.take()] == ["encoder", "decoder"]
