"""Expert choice: who takes whom, by hand and against brute force."""

import math

import pytest
import torch

from moestro.methods.train.expert_choice import take_tokens
from tests.methods.train.helpers import build, context, layer, route


def test_four_tokens_three_experts_by_hand() -> None:
    select = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.3, 0.4], [0.1, 0.7, 0.3], [0.2, 0.6, 0.2]])
    chosen = take_tokens(select, torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool), 1, 1.5)
    # ceil(1.5 * 4 / 3) = 2 tokens an expert: {0,1}, {2,3}, {0,1}
    expected = [[True, False, True], [True, False, True], [False, True, False], [False, True, False]]
    assert chosen.tolist() == expected


@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_every_expert_takes_the_same_number_of_valid_tokens(over: str) -> None:
    router = build("train.expert_choice", num_experts=4, capacity_factor=2.0, over=over)
    valid = [True] * 6 + [False] * 2 + [True] * 8
    routing = route(router, torch.randn(16, 6), context(2, 8, valid=valid))
    counts = routing.counts_C()
    each = math.ceil(2.0 * 14 / 4) if over == "batch" else math.ceil(2.0 * 6 / 4) + math.ceil(2.0 * 8 / 4)
    assert counts.tolist() == [each] * 4
    assert not {6, 7} & set(routing.token_N.tolist()), "padding is never picked"
    assert routing.causal is False
    assert router.causal is False


def test_weights_are_the_probabilities_and_the_output_sums_them() -> None:
    router = build("train.expert_choice", num_experts=3, capacity_factor=1.0, over="batch")
    mixture = layer(router)
    x = torch.randn(1, 6, 6)
    probability = (x[0] @ router.weight.T).softmax(-1)
    expected = torch.zeros(6, 6)
    for expert in range(3):
        gate, up, down = (mixture.bank.weight(expert, name) for name in ("gate", "up", "down"))
        for token in probability[:, expert].topk(2).indices:
            row = x[0, token]
            out = (torch.nn.functional.silu(row @ gate.T) * (row @ up.T)) @ down.T
            expected[token] += probability[token, expert] * out
    torch.testing.assert_close(mixture(x)[0], expected)


def test_a_sequence_is_routed_by_itself() -> None:
    router = build("train.expert_choice", num_experts=4, over="sequence")
    x = torch.randn(2, 8, 6)
    both = route(router, x.view(16, 6), context(2, 8))
    alone = route(router, x[1], context(1, 8))
    mine = both.token_N >= 8
    assert torch.equal(both.token_N[mine] - 8, alone.token_N)
    assert torch.equal(both.expert_N[mine], alone.expert_N)


def test_a_closed_expert_takes_nobody() -> None:
    select = torch.rand(4, 3)
    select[:, 1] = float("-inf")
    chosen = take_tokens(select, torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool), 1, 1.5)
    assert chosen.sum(0).tolist() == [2, 0, 2]
