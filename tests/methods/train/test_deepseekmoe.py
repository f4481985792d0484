"""DeepSeekMoE: equal budgets, shared experts, and the plain mixture as a special case."""

import pytest
import torch

from moestro.core.errors import ConfigError
from moestro.core.registry import method
from tests.methods.train.helpers import DIM, build


def parameters(layer: torch.nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(("segments", "shared"), [(2, 1), (4, 1), (4, 3), (1, 0)])
def test_total_and_active_expert_parameters_stay_constant(segments: int, shared: int) -> None:
    layer = build("train.deepseekmoe", num_experts=8, top_k=2, expert_size=16, segments=segments, shared=shared)
    coarse = 3 * DIM * 16
    router = layer.router.weight.numel()
    assert parameters(layer) - router == 8 * coarse
    thin = 3 * DIM * (16 // segments)
    assert thin * (layer.router.top_k + shared) == 2 * coarse
    assert layer.router.num_experts == segments * 8 - shared


def test_the_papers_16b_layer_has_64_routed_experts_beside_two_shared_ones() -> None:
    layer = build("train.deepseekmoe", num_experts=16, top_k=2, expert_size=16, segments=4, shared=2, routed=64)
    assert (layer.bank.num_experts, layer.router.num_experts, layer.router.top_k) == (64, 64, 6)
    assert (layer.bank.inner, layer.shared.bank.inner) == (4, 8)


def test_one_segment_and_no_shared_expert_is_the_plain_layer() -> None:
    layer = build("train.deepseekmoe", num_experts=4, top_k=2, expert_size=8, segments=1, shared=0)
    x = torch.randn(1, 5, DIM)
    probability = (x[0] @ layer.router.weight.T).softmax(-1)
    expected = torch.zeros(5, DIM)
    for token in range(5):
        for expert in probability[token].topk(2).indices.tolist():
            gate, up, down = (layer.bank.weight(expert, name) for name in ("gate", "up", "down"))
            row = x[0, token]
            out = (torch.nn.functional.silu(row @ gate.T) * (row @ up.T)) @ down.T
            expected[token] += probability[token, expert] * out  # as they are, not renormalised
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-6, rtol=1e-5)


def test_the_shared_branch_is_the_sum_of_its_experts() -> None:
    layer = build("train.deepseekmoe", num_experts=4, top_k=2, expert_size=8, segments=4, shared=3)
    x = torch.randn(5, DIM)
    gate, up, down = (layer.shared.bank.weight(0, name) for name in ("gate", "up", "down"))
    expected = torch.zeros(5, DIM)
    for expert in range(3):
        rows = slice(2 * expert, 2 * expert + 2)
        expected += (torch.nn.functional.silu(x @ gate[rows].T) * (x @ up[rows].T)) @ down[:, rows].T
    torch.testing.assert_close(layer.shared(x), expected, atol=1e-6, rtol=1e-5)
    routed = layer.run_experts(x, layer.route(x, _context(5)))
    torch.testing.assert_close(layer(x[None])[0], routed + expected, atol=1e-6, rtol=1e-5)


def _context(count: int):
    from tests.methods.train.helpers import context

    return context(1, count)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"expert_size": 10, "segments": 4}, "segments=4 does not divide expert_size=10"),
        ({"expert_size": 8, "segments": 2, "top_k": 1, "shared": 2}, "leaves no routed expert"),
        ({"expert_size": 8, "routed": 6}, "routed=6, but a token takes segments \\* top_k - shared = 7 of them"),
        ({"expert_size": 8, "losses": {"x": {"method": "train.switch"}}}, "builds no routing loss"),
    ],
)
def test_wrong_sizes_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("train.deepseekmoe", **config)


def test_the_router_dialect_can_be_exchanged() -> None:
    layer = build(
        "train.deepseekmoe",
        num_experts=4,
        top_k=2,
        expert_size=8,
        segments=2,
        router={"method": "train.sigmoid_bias", "config": {"gamma": 0.01}},
    )
    layer.after_step(torch.tensor([9, 1, 1, 1, 1, 1, 1]))
    assert layer.router.selection_bias[0] == pytest.approx(-0.01)
    assert method("train.sigmoid_bias").card.paper == "deepseekmoe"
