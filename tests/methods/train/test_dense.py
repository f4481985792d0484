"""The dense feed-forward: its formula, what it takes from the site, what it costs, saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moestro
from moestro.core.cost import Work, cost
from moestro.core.errors import ConfigError
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.models.load import adopt
from moestro.models.sites import sites
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model


def build(**settings: Any) -> nn.Module:
    use = method("train.dense")
    site = Site(path="mlp", kind="mlp", module=nn.Identity(), dim=6, out=6)
    module: nn.Module = use.build(site, use.configure(settings), Shared())
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def test_gated_and_plain_are_their_formulas() -> None:
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    gated = build(size=5)
    up, down = gated.bank.gate_up_proj[0], gated.bank.down_proj[0]
    y = (nn.functional.silu(x @ up[:5].T) * (x @ up[5:].T)) @ down.T
    torch.testing.assert_close(gated(x), y)
    plain = build(size=5, gated=False, activation="relu", bias=True)
    bank = plain.bank
    hidden = torch.relu(x @ bank.up_proj[0].T + bank.up_proj_bias[0])
    torch.testing.assert_close(plain(x), hidden @ bank.down_proj[0].T + bank.down_proj_bias[0])


def test_operations_are_two_a_weight_and_width() -> None:
    assert cost(build(size=5), Work(4)) == 2 * 3 * 6 * 5
    assert cost(build(size=7, gated=False), Work(4)) == 2 * 2 * 6 * 7


def test_the_same_weights_are_the_same_model() -> None:
    """In the place of a stock feed-forward, with its weights, nothing changes; the width is the site's."""
    model = tiny_model("llama").eval()
    ids = torch.arange(12).view(2, 6)
    before = model(ids).logits
    stock = {site.path: site.module for site in sites(model, "mlp")}
    swap(model, "train.dense")
    for path, old in stock.items():
        new = model.get_submodule(path)
        with torch.no_grad():
            new.bank.gate_up_proj[0] = torch.cat([old.gate_proj.weight, old.up_proj.weight])
            new.bank.down_proj[0] = old.down_proj.weight
    torch.testing.assert_close(model(ids).logits, before)


def test_in_the_place_of_a_mixture_it_has_the_form_of_an_expert() -> None:
    model = tiny_model("llama")
    swap(model, "train.moe", {"num_experts": 4, "expert_size": 9, "activation": "relu", "gated": False})
    swap(model, "train.dense", {"size": {"per_layer": [18, 11]}})
    banks = [site.module.bank for site in sites(model, "mlp")]
    assert [(bank.inner, bank.activation, bank.gated) for bank in banks] == [(18, "relu", False), (11, "relu", False)]


def test_saved_and_loaded_it_generates_the_same(tmp_path: Path) -> None:
    model = adopt(tiny_model("llama").eval())
    swap(model, "train.dense", {"size": 20})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    moestro.save(model, tmp_path / "m")
    again = moestro.load(str(tmp_path / "m"))
    ids = torch.arange(6)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    cached = again.generate(ids, max_new_tokens=6, do_sample=False)
    assert cached.tolist() == model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False).tolist()


def test_what_cannot_be_built_is_refused() -> None:
    use = method("train.dense")
    with pytest.raises(ConfigError, match="size"):
        use.configure({"size": 0})
    with pytest.raises(ConfigError, match="does not tell size"):
        build()
    site = Site(path="q", kind="linear", module=nn.Linear(4, 8), dim=4, out=8)
    with pytest.raises(ConfigError, match="kind linear; use mlp"):
        use.build(site, use.configure({"size": 3}), Shared())
