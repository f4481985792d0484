"""Experts on four ranks as two nodes of two: the way that rows travel, and slices of experts, change no numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.bank import StackedFFN
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.testing.distributed import run_distributed
from moestro.training.all_to_all import Links
from moestro.training.expert_parallel import shard_experts, slice_experts


DIM, INNER, TOP_K, WORLD = 8, 12, 2, 4


def layer(experts: int = 8, **form: Any) -> MoELayer:
    torch.manual_seed(0)
    site = Site(path="mlp", kind="mlp", module=torch.nn.Identity(), dim=DIM)
    use = method("train.softmax_topk")
    router = use.build(site, use.configure({"num_experts": experts, "top_k": min(TOP_K, experts)}), Shared())
    made = MoELayer(router, StackedFFN(experts, DIM, INNER, **form), site="mlp")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


def tokens(number: int) -> Tensor:
    return torch.randn(5 + 2 * number, DIM, generator=torch.Generator().manual_seed(10 + number))


def trained(made: MoELayer, x: Tensor) -> dict[str, Any]:
    x = x.clone().requires_grad_()
    y = made(x)
    y.square().sum().backward()
    assert x.grad is not None
    found = {name: p.grad.tolist() for name, p in made.named_parameters() if p.grad is not None}
    return found | {"y": y.tolist(), "x": x.grad.tolist()}


FORMS: dict[str, dict[str, Any]] = {"gated": {}, "bias": {"bias": True}, "plain": {"gated": False, "bias": True}}


def on_ranks(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    ways = {"default": None, "flat": Links("flat"), "hierarchical": Links("hierarchical", ranks_per_node=2)}
    for name, links in ways.items():
        made = layer()
        traffic = shard_experts(made, links=links).traffic
        found[name] = trained(made, tokens(rank))
        found[f"{name} bytes"] = [traffic.rows_out, traffic.rows_back, traffic.gradients, traffic.orders]
    together = Links("coordinated", ranks_per_node=2, slicing=2)
    made = layer()
    shard_experts(made, links=together)
    with pytest.raises(ContextError, match="the coordinated all-to-all has no gradient"):
        made(tokens(rank // 2))
    with torch.no_grad():
        found["coordinated"] = made(tokens(rank // 2)).tolist()
    for name, form in FORMS.items():
        made = layer(2, **form)
        shard_experts(made)
        found[f"sliced {name}"] = trained(made, tokens(rank))
        found[f"sizes {name}"] = [made.bank.num_experts, made.bank.inner, made.bank.nbytes(0)]
    with torch.no_grad():  # all at once: slices over nodes
        made = layer(2)
        shard_experts(made, links=together)
        found["sliced coordinated"] = made(tokens(rank // 2)).tolist()
    with pytest.raises(ConfigError, match="experts of 10 inner units cannot be cut into 4 equal slices"):
        shard_experts(MoELayer(layer(1).router, StackedFFN(1, DIM, 10), site="mlp"))
    with pytest.raises(ConfigError, match="3 experts cannot be shared equally by 4 ranks"):
        shard_experts(layer(3))
    with pytest.raises(ConfigError, match="group and links name different ranks"):
        shard_experts(layer(), torch.distributed.new_group(), links=together)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_distributed(on_ranks, WORLD)
    return found


@pytest.mark.parametrize("way", ["flat", "hierarchical"])
def test_the_way_changes_no_bit(ranks: list[dict[str, Any]], way: str) -> None:
    for found in ranks:
        assert found[way] == found["default"]
        assert len(found[way]["bank.down_proj"]) == 2


def test_bytes_of_each_way(ranks: list[dict[str, Any]]) -> None:
    """The direct ways count alike. Rows of the other way pass by a neighbour, so some are sent twice."""
    for found in ranks:
        assert found["flat bytes"] == found["default bytes"]
        assert found["hierarchical bytes"][2] == sum(found["hierarchical bytes"][:2])
    for kind in range(4):
        direct, tree = (sum(found[f"{way} bytes"][kind] for found in ranks) for way in ("flat", "hierarchical"))
        assert direct < tree <= 2 * direct


def test_ranks_that_hold_the_same_tokens_get_the_answers_of_one(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert found["coordinated"] == ranks[rank // 2 * 2]["coordinated"]
        with torch.no_grad():
            torch.testing.assert_close(
                torch.tensor(found["coordinated"]), layer()(tokens(rank // 2)), atol=1e-6, rtol=1e-6
            )
            torch.testing.assert_close(
                torch.tensor(found["sliced coordinated"]), layer(2)(tokens(rank // 2)), atol=1e-6, rtol=1e-6
            )


@pytest.mark.parametrize("name", list(FORMS))
def test_slices_of_experts_are_the_experts(ranks: list[dict[str, Any]], name: str) -> None:
    """More ranks than experts: outputs, and the gradients of tokens, router and sliced matrices."""
    alone = [trained(layer(2, **FORMS[name]), tokens(rank)) for rank in range(WORLD)]
    for rank, found in enumerate(ranks):
        for key in ("y", "x", "router.weight"):
            assert_close(found[f"sliced {name}"][key], torch.tensor(alone[rank][key]))
        whole = layer(2, **FORMS[name]).bank
        assert found[f"sizes {name}"][:2] == [1, INNER // 2]
        if name == "gated":
            assert found[f"sizes {name}"][2] == whole.nbytes(0) // 2
    bank = StackedFFN(2, DIM, INNER, **FORMS[name])
    for key in [key for key, _ in bank.named_parameters() if key != "down_proj_bias"]:
        with torch.no_grad():
            bank.get_parameter(key).copy_(sum(torch.tensor(one[f"bank.{key}"]) for one in alone))
        parts = torch.cat([torch.tensor(found[f"sliced {name}"][f"bank.{key}"]) for found in ranks])
        assert_close(parts, slice_experts(bank, 2)[key])
    if "bias" in FORMS[name]:
        for rank, found in enumerate(ranks):  # the bias belongs to the first slice: the others' zeros stay zeros
            expert, part = divmod(rank, 2)
            mine = found[f"sliced {name}"].get("bank.down_proj_bias")
            assert (mine is None) == (part > 0)
            if mine is not None:
                whole_gradient = sum(torch.tensor(one["bank.down_proj_bias"]) for one in alone)
                assert_close(mine, whole_gradient[expert : expert + 1])


def assert_close(found: Any, expected: Tensor) -> None:
    """To 1e-6 of the largest number, the float32 sums being taken in another order."""
    limit = 1e-6 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(torch.as_tensor(found), expected, atol=limit, rtol=1e-6)


def test_a_slice_holds_its_own_units() -> None:
    bank = layer(2).bank
    assert isinstance(bank, StackedFFN)
    cut = slice_experts(bank, 3)
    width = INNER // 3
    for expert in range(2):
        for number in range(3):
            units = slice(number * width, (number + 1) * width)
            up = torch.cat([bank.weight(expert, name)[units] for name in ("gate", "up")])
            assert torch.equal(cut["gate_up_proj"][expert * 3 + number], up)
            assert torch.equal(cut["down_proj"][expert * 3 + number], bank.weight(expert, "down")[:, units])
