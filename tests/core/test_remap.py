"""The remapped router: choices under new names, duplicates run once, scores grouped."""

import pytest
import torch

from moestro.core.bank import StackedFFN
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.remap import RemapRouter
from moestro.core.router import Router
from moestro.methods.train import sigmoid_bias, softmax_topk, switch
from tests.methods.train.helpers import DIM, context, route


def inner(experts: int = 4, **config: object) -> Router:
    torch.manual_seed(0)
    router = softmax_topk.SoftmaxTopK(DIM, softmax_topk.Config(num_experts=experts, **config))
    torch.nn.init.normal_(router.weight)
    return router


def test_choices_that_meet_are_added_and_run_once() -> None:
    old = inner(top_k=3)
    router = RemapRouter(old, [1, 0, 1, 0])
    x, ctx = torch.randn(20, DIM), context(2, 10)
    before, after = route(old, x, ctx), route(router, x, ctx)
    dense = torch.zeros(20, 2)
    dense.index_put_((before.token_N, torch.tensor([1, 0, 1, 0])[before.expert_N]), before.weight_N, accumulate=True)
    found = torch.zeros(20, 2)
    found[after.token_N, after.expert_N] = after.weight_N
    torch.testing.assert_close(found, dense)
    pairs = list(zip(after.token_N.tolist(), after.expert_N.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    assert after.token_N.tolist() == sorted(after.token_N.tolist())
    assert after.num_experts == 2


def test_the_best_choice_stays_first() -> None:
    old = inner(top_k=2)
    router = RemapRouter(old, [2, 1, 0, 1])
    x, ctx = torch.randn(50, DIM), context(5, 10)
    before, after = route(old, x, ctx), route(router, x, ctx)
    first = torch.tensor([(after.token_N == t).nonzero()[0, 0] for t in range(50)])
    assert torch.equal(after.expert_N[first], torch.tensor([2, 1, 0, 1])[before.expert_TK[:, 0]])


def test_grouped_scores_are_sums_of_probabilities() -> None:
    old = inner(top_k=2)
    router = RemapRouter(old, [0, 1, 0, 1])
    x, ctx = torch.randn(10, DIM), context(1, 10)
    old_TC = old.score(x, StackedFFN(4, DIM, 3), ctx).probabilities()
    scores = route(router, x, ctx).scores
    assert scores is not None
    expected = torch.stack([old_TC[:, 0] + old_TC[:, 2], old_TC[:, 1] + old_TC[:, 3]], 1)
    torch.testing.assert_close(scores.probabilities(), expected)
    torch.testing.assert_close(scores.logits_TC.softmax(-1), expected)
    assert scores.logits_TC.requires_grad


def test_merged_copies_are_the_same_layer() -> None:
    old = inner(top_k=2)
    bank = StackedFFN(4, DIM, 3)
    with torch.no_grad():
        for tensor in (bank.gate_up_proj, bank.down_proj):
            tensor[2], tensor[3] = tensor[0], tensor[1]
    small = StackedFFN(2, DIM, 3)
    with torch.no_grad():
        small.gate_up_proj.copy_(bank.gate_up_proj[:2])
        small.down_proj.copy_(bank.down_proj[:2])
    x = torch.randn(2, 9, DIM)
    full = MoELayer(old, bank, site="a")
    merged = MoELayer(RemapRouter(old, [0, 1, 0, 1]), small, site="b")
    torch.testing.assert_close(merged(x), full(x), atol=1e-6, rtol=0)


def test_dropped_choices_stay_apart_from_kept_ones() -> None:
    old = switch.Switch(DIM, switch.Config(num_experts=4, capacity=1))
    torch.nn.init.normal_(old.weight)
    router = RemapRouter(old, [0, 0, 1, 1])
    x, ctx = torch.randn(12, DIM), context(2, 6)
    before, after = route(old, x, ctx), route(router, x, ctx)
    assert before.kept_N is not None
    assert not before.kept_N.all()
    assert after.kept_N is not None
    assert torch.equal(after.kept_N, before.kept_N)
    assert torch.equal(after.counts_C(), before.counts_C().view(2, 2).sum(1))


def test_load_is_shared_among_the_old_experts() -> None:
    old = sigmoid_bias.SigmoidBias(DIM, sigmoid_bias.Config(num_experts=4, top_k=1, gamma=0.5))
    router = RemapRouter(old, [0, 0, 0, 1])
    router.after_step(torch.tensor([3, 5]))  # 1 each for the first three, 5 for the last; the mean is 2
    assert old.selection_bias.tolist() == [0.5, 0.5, 0.5, -0.5]


def test_gradients_reach_the_router() -> None:
    old = inner(top_k=2)
    layer = MoELayer(RemapRouter(old, [0, 1, 2, 0]), StackedFFN(3, DIM, 3), site="a")
    layer(torch.randn(1, 8, DIM)).square().sum().backward()
    assert old.weight.grad is not None
    assert (old.weight.grad.abs().sum(1) > 0).all()


def test_no_tokens_is_no_error() -> None:
    assert route(RemapRouter(inner(top_k=2), [0, 1, 0, 1]), torch.randn(0, DIM), context(1, 0)).token_N.numel() == 0


@pytest.mark.parametrize(
    ("remap", "message"), [([0, 1], "2 entries for a router of 4"), ([0, 2, 2, 0], "must use every expert from 0 to 2")]
)
def test_maps_that_cannot_be(remap: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RemapRouter(inner(), remap)
