"""A mixture whose experts live on two ranks computes what one rank computes, and counts what it sends."""

from typing import Any

import pytest
import torch

from moestro.core.bank import StackedFFN
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.routing import Routing
from moestro.core.session import Edit, session
from moestro.core.site import Shared, Site
from moestro.testing.distributed import run_distributed
from moestro.training.expert_parallel import AllToAll, _Journey, shard_experts


DIM, NARROW, INNER, EXPERTS, TOKENS, TOP_K, WORLD = 8, 4, 12, 6, 10, 3, 2


def layer(width: int = NARROW) -> MoELayer:
    torch.manual_seed(0)
    site = Site(path="mlp", kind="mlp", module=torch.nn.Identity(), dim=DIM)
    use = method("train.softmax_topk")
    router = use.build(site, use.configure({"num_experts": EXPERTS, "top_k": TOP_K}), Shared())
    made = MoELayer(
        router,
        StackedFFN(EXPERTS, width, INNER),
        site="mlp",
        pre=torch.nn.Linear(DIM, width, bias=False),
        post=torch.nn.Linear(width, DIM, bias=False),
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


def inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's tokens and the gradient of its outputs; ranks have different numbers of them."""
    generator = torch.Generator().manual_seed(10 + rank)
    shape = (TOKENS + 3 * rank, DIM)
    return torch.randn(shape, generator=generator).requires_grad_(), torch.randn(shape, generator=generator)


def tell(made: MoELayer, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    found = {name: p.grad.tolist() for name, p in made.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return found | {"y": y.tolist(), "x": x.grad.tolist()}


class Silence(Edit):
    """Only tokens below `until` are routed, and only to the first rank's experts."""

    def __init__(self, until: int) -> None:
        self.until = until

    def on_routing(self, site: str, routing: Routing, router: Any, ctx: Any) -> Routing:
        keep = (routing.token_N < self.until) & (routing.expert_N < EXPERTS // WORLD)
        return Routing(
            routing.token_N[keep], routing.expert_N[keep], routing.weight_N[keep], routing.num_tokens, EXPERTS
        )


def on_ranks(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, one_copy, until in (("copies", False, 99), ("one copy", True, 99), ("few", True, 4), ("none", True, 0)):
        made = layer()
        traffic = shard_experts(made, one_copy=one_copy).traffic
        x, grad = inputs(rank)
        with session(edits=[Silence(until)] if until < 99 else []):
            y = made(x)
        y.backward(grad)
        found[name] = tell(made, x, y)
        found[name + " bytes"] = [traffic.rows_out, traffic.rows_back, traffic.gradients, traffic.orders]
        traffic.reset()
        found[name + " reset"] = traffic.rows + traffic.orders
    for width in (DIM, NARROW):
        made = layer(width)
        traffic = shard_experts(made, one_copy=False).traffic
        with torch.no_grad():
            made(inputs(rank)[0])
        found[f"width {width}"] = traffic.rows
    with pytest.raises(ConfigError, match="mlp: its experts are shared out already, over 2 ranks"):
        shard_experts(made)
    rows = [3 * (other == rank) for other in range(world)]
    home = _Journey(torch.zeros(3, dtype=torch.int64), rows, rows, 1)
    answers = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # in bfloat16 256 + 1 is 256
    found["bfloat16"] = made.dispatcher.combine(answers, home).tolist()
    with pytest.raises(ConfigError, match="5 experts cannot be shared equally by 2 ranks"):
        AllToAll(5)
    with pytest.raises(ContextError, match="6 experts; the routing has 4 and 0 nulls"):
        AllToAll(EXPERTS).dispatch(torch.zeros(1, 2), Routing(*[torch.zeros(0, dtype=torch.int64)] * 3, 1, 4))
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_distributed(on_ranks, WORLD)
    return found


def alone(rank: int, until: int = 99) -> tuple[dict[str, Any], Routing]:
    made = layer()
    x, grad = inputs(rank)
    with session(collect=True, edits=[Silence(until)] if until < 99 else []) as opened:
        y = made(x)
        (ctx,) = opened.take()
    y.backward(grad)
    routing = ctx.routings["mlp"]
    assert routing is not None
    return tell(made, x, y), routing


@pytest.mark.parametrize(("case", "until"), [("copies", 99), ("one copy", 99), ("few", 4), ("none", 0)])
def test_two_ranks_equal_one(ranks: list[dict[str, Any]], case: str, until: int) -> None:
    single = [alone(rank, until)[0] for rank in range(WORLD)]
    for rank in range(WORLD):
        for name in ("y", "x"):
            assert_close(ranks[rank][case][name], single[rank][name])
        for name in ("pre.weight", "post.weight", "router.weight"):  # replicated: each rank has its tokens' share
            assert_close(ranks[rank][case].get(name), single[rank].get(name))
    for name in ("bank.gate_up_proj", "bank.down_proj"):  # experts: what the tokens of all ranks ask for
        whole = torch.tensor(single[0][name]) + torch.tensor(single[1][name])
        parts = [torch.tensor(ranks[rank][case][name]) for rank in range(WORLD)]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)
    if until:
        assert torch.tensor(single[0]["bank.down_proj"]).abs().max() > 0.1


def assert_close(found: Any, expected: Any) -> None:
    assert (found is None) == (expected is None)
    if found is not None:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("case", "until"), [("copies", 99), ("one copy", 99), ("few", 4), ("none", 0)])
def test_bytes_are_what_crosses_ranks(ranks: list[dict[str, Any]], case: str, until: int) -> None:
    leaving, arriving = [], []
    for rank in range(WORLD):
        routing = alone(rank, until)[1]
        owner_N = routing.expert_N // (EXPERTS // WORLD)
        away = owner_N != rank
        pairs = list(zip(routing.token_N[away].tolist(), owner_N[away].tolist(), strict=True))
        leaving.append(len(pairs) if case == "copies" else len(set(pairs)))
    arriving = leaving[::-1]
    for rank in range(WORLD):
        row = NARROW * 4
        out, back, gradients, _ = ranks[rank][case + " bytes"]
        assert (out, back) == (leaving[rank] * row, arriving[rank] * row)
        assert gradients == out + back
        assert ranks[rank][case + " reset"] == 0
    if until == 99:
        assert min(leaving) > 0


def test_answers_of_half_precision_are_added_in_float32(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["bfloat16"] == [[258.0]]


def test_one_copy_sends_less(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["one copy bytes"][0] < found["copies bytes"][0]


def test_bytes_scale_with_the_width_that_travels(ranks: list[dict[str, Any]]) -> None:
    """The routers are equal (they see the full width), so exactly the width decides."""
    for found in ranks:
        assert found[f"width {DIM}"] * NARROW == found[f"width {NARROW}"] * DIM > 0
