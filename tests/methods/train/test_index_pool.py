"""Experts of a pool at a site: what the settings leave open comes from the feed-forward there; what is refused."""

import pytest
import torch
from torch import nn

from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import layers_of


POOL = method("train.index_pool")


def test_the_form_is_that_of_the_feed_forward_there_and_the_experts_cover_it() -> None:
    model = tiny_model("llama", mlp_bias=True, hidden_act="relu")
    swap(model, "train.index_pool", {"num_experts": 3, "expert_size": 20})
    bank = layers_of(model)[0].bank
    assert (bank.inner, bank.width, bank.pool.activation, bank.pool.gated) == (48, 20, "relu", True)
    assert bank.pool.up_bias is not None
    assert sorted(bank.rows_EW.unique().tolist()) == list(range(48))


def test_one_expert_of_all_units_is_the_feed_forward_written_out() -> None:
    torch.manual_seed(0)
    site = Site(path="block.mlp", kind="linear", module=nn.Identity(), dim=6)
    layer = POOL.build(
        site, POOL.configure({"num_experts": 1, "expert_size": 4, "pool_size": 4, "activation": "silu"}), Shared()
    )
    assert isinstance(layer, MoELayer)
    x = torch.randn(2, 3, 6)
    up, down = layer.bank.pool.gate_up_proj[0], layer.bank.pool.down_proj[0]
    want = (nn.functional.silu(x @ up[:4].T) * (x @ up[4:].T)) @ down.T
    torch.testing.assert_close(layer(x), want, atol=1e-6, rtol=1e-5)  # the only choice weighs 1


def test_bad_settings_and_places_are_refused() -> None:
    with pytest.raises(ConfigError, match="expert_size=9 of pool_size=8"):
        POOL.configure({"expert_size": 9, "pool_size": 8})
    attention = Site(path="block.attn", kind="attention", module=nn.Identity(), dim=6)
    with pytest.raises(ConfigError, match="kind attention"):
        POOL.build(attention, POOL.configure({}), Shared())
    nowhere = Site(path="block.mlp", kind="linear", module=nn.Identity(), dim=6)
    with pytest.raises(ConfigError, match="give it"):
        POOL.build(nowhere, POOL.configure({}), Shared())
