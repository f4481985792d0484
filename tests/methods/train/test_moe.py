"""The mixture layer from its parts."""

from typing import Any

import pytest
import torch
from torch import nn

from moestro.core.errors import ConfigError, RegistryError
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.remap import RemapRouter
from moestro.core.site import Shared, Site
from moestro.models.sites import sites
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model
from tests.methods.train.helpers import DIM


MOE = method("train.moe")


def build(module: nn.Module | None = None, **config: Any) -> MoELayer:
    torch.manual_seed(0)
    site = Site(path="block.mlp", kind="mlp", module=module or nn.Identity(), dim=DIM)
    layer = MOE.build(site, MOE.configure({"expert_size": 5, **config}), Shared())
    assert isinstance(layer, MoELayer)
    return layer


def top(k: int) -> dict[str, Any]:
    return {"method": "train.softmax_topk", "config": {"top_k": k}}


def test_the_sum_is_written_out() -> None:
    layer = build(num_experts=3, router=top(2), shared=4)
    x = torch.randn(7, DIM)
    probability = (x @ layer.router.weight.T).softmax(-1)
    best = probability.topk(2)
    weight = best.values / best.values.sum(-1, keepdim=True)

    def ffn(bank: Any, expert: int, row: torch.Tensor) -> torch.Tensor:
        gate, up = bank.weight(expert, "gate") @ row, bank.weight(expert, "up") @ row
        return bank.weight(expert, "down") @ (nn.functional.silu(gate) * up)

    expected = torch.stack(
        [
            sum(weight[t, k] * ffn(layer.bank, int(best.indices[t, k]), x[t]) for k in range(2))
            + ffn(layer.shared.bank, 0, x[t])
            for t in range(7)
        ]
    )
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)


def test_a_gated_shared_branch() -> None:
    layer = build(num_experts=3, router=top(1), shared=4, shared_gate=True)
    x = torch.randn(7, DIM)
    plain = layer.shared.expert(x)
    torch.testing.assert_close(layer.shared(x), torch.sigmoid(x @ layer.shared.gate.weight.T) * plain)
    routed = layer.run_experts(x, layer.route(x, _context(x)))
    torch.testing.assert_close(layer(x), routed + layer.shared(x))


def _context(x: torch.Tensor) -> Any:
    from tests.methods.train.helpers import context

    return context(1, len(x))


@pytest.mark.parametrize(
    ("family", "inner", "activation", "gated", "bias"),
    [
        ("llama", 48, "silu", True, False),
        ("gemma3_text", 48, "gelu_tanh", True, False),
        ("bert", 48, "gelu", False, True),
    ],
)
def test_what_is_left_open_is_as_in_the_feed_forward_there(
    family: str, inner: int, activation: str, gated: bool, bias: bool
) -> None:
    model = tiny_model(family)
    swap(model, "train.moe", {"num_experts": 3})
    for site in sites(model, "mlp"):
        bank = site.module.bank
        assert (bank.inner, bank.activation, bank.gated, bank.up_bias is not None) == (inner, activation, gated, bias)
        assert bank.out == 32
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()


def test_elsewhere_the_width_must_be_given() -> None:
    site = Site(path="block.mlp", kind="mlp", module=nn.Identity(), dim=DIM)
    with pytest.raises(ConfigError, match=r"block.mlp: Identity does not tell expert_size; give it"):
        MOE.build(site, MOE.configure(), Shared())


def test_keep_takes_over_what_surrounds_the_experts() -> None:
    there = build(num_experts=3, router=top(1), shared=4, losses={"balance": {"method": "train.balance_loss"}})
    there.pre, there.noise = nn.Identity(), nn.Identity()
    layer = build(there, num_experts=5, router=top(1), keep=True)
    for name in ("shared", "pre", "post", "noise", "losses", "combine", "dispatcher"):
        assert getattr(layer, name) is getattr(there, name), name
    assert layer.bank is not there.bank
    assert layer.router.num_experts == 5


def test_remap_stands_between_router_and_bank() -> None:
    layer = build(num_experts=2, router=top(2), remap=[0, 1, 1, 0, 1])
    assert isinstance(layer.router, RemapRouter)
    assert layer.router.inner.weight.shape == (5, DIM)
    assert layer(torch.randn(3, DIM)).shape == (3, DIM)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shared_gate": True}, "shared_gate without a shared branch"),
        ({"keep": True, "shared": 3}, "leave shared and losses out"),
        ({"num_experts": 2, "remap": [0, 2]}, "must use every expert from 0 to 1"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"activation": "swish"}, "activation='swish'"),
    ],
)
def test_settings_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MOE.configure(config)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"router": {"method": "train.z_loss"}}, ConfigError, "train.z_loss' builds no router"),
        ({"router": {"method": "train.softmax"}}, RegistryError, "did you mean"),
        (
            {"router": {"method": "train.switch", "config": {"num_experts": 9}}},
            ConfigError,
            r"num_experts=9, but the layer has 8",
        ),
        ({"num_experts": 2, "router": top(3)}, ConfigError, "train.softmax_topk"),
        ({"losses": {"x": {"method": "train.switch"}}}, ConfigError, r"losses.x='train.switch' builds no routing loss"),
        ({"keep": True}, ConfigError, "keep=True, but a Identity stands there"),
    ],
)
def test_parts_that_do_not_fit(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**config)
