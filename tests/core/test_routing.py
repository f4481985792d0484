"""The flat routing type: views, nulls, drops, counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.core.errors import ContextError
from moestro.core.routing import Routing


def test_a_regular_routing_keeps_its_view() -> None:
    expert = torch.tensor([[2, 0], [1, 3]])
    weight = torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    routing = Routing.from_topk(expert, weight, num_experts=4)
    assert routing.token_N.tolist() == [0, 0, 1, 1]
    assert torch.equal(routing.expert_TK, expert)
    assert torch.equal(routing.weight_TK, weight)
    assert routing.real() is routing


def test_nulls_count_and_are_not_real() -> None:
    routing = Routing.from_topk(torch.tensor([[0, 3], [2, 4], [1, 1]]), torch.ones(3, 2), num_experts=3, num_null=2)
    assert routing.counts_C().tolist() == [1, 2, 1, 1, 1]
    real = routing.real()
    assert real.token_N.tolist() == [0, 1, 2, 2]
    assert real.expert_N.tolist() == [0, 2, 1, 1]
    assert real.num_choices == 3
    with pytest.raises(ContextError, match="ragged"):
        _ = real.expert_TK


def test_dropped_assignments_count_as_demand_and_are_not_real() -> None:
    routing = Routing.from_topk(
        torch.tensor([[0, 1], [0, 2]]),
        torch.ones(2, 2),
        num_experts=3,
        kept_TK=torch.tensor([[True, True], [False, True]]),
    )
    assert routing.counts_C().tolist() == [2, 1, 1]
    assert routing.real().counts_C().tolist() == [1, 1, 1]


def test_padding_is_left_out_of_counts() -> None:
    routing = Routing.from_topk(torch.tensor([[0], [1], [1]]), torch.ones(3, 1), num_experts=2)
    assert routing.counts_C(torch.tensor([True, False, True])).tolist() == [1, 1]


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ContextError, match="3 tokens, 2 experts"):
        Routing(torch.tensor([0, 0, 1]), torch.tensor([1, 1]), torch.ones(3), 2, 2)
    with pytest.raises(ContextError, match="top_k=2 for 2 tokens but holds 3"):
        Routing(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]), torch.ones(3), 2, 2, top_k=2)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 2), st.integers(0, 2**31 - 1))
def test_a_mask_and_its_routing_say_the_same(num_tokens: int, num_experts: int, num_null: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    choices = num_experts + num_null
    chosen = torch.rand(num_tokens, choices, generator=generator) < 0.4
    weight = torch.rand(num_tokens, choices, generator=generator)
    routing = Routing.from_mask(chosen, weight, num_experts=num_experts, num_null=num_null)
    back = torch.zeros(num_tokens, choices)
    back[routing.token_N, routing.expert_N] = routing.weight_N
    assert torch.equal(back, weight * chosen)
    assert torch.equal(routing.counts_C(), chosen.sum(0))
    assert torch.equal(routing.real().counts_C(), chosen[:, :num_experts].sum(0))
