"""The uniformity loss: the logarithm of mean weights, so that no choice is left without tokens."""

import math

import pytest
import torch
from torch import Tensor

from moestro.core.errors import ConfigError, ContextError
from moestro.core.registry import method
from moestro.core.routing import Routing
from moestro.methods.train.uniformity_loss import uniformity
from tests.methods.train.helpers import build, context


def routing(weight_TC: Tensor) -> Routing:
    return Routing.from_mask(weight_TC > 0, weight_TC, num_experts=weight_TC.shape[1])


def test_by_hand_with_two_heads_and_padding() -> None:
    weight_TC = torch.tensor([[0.8, 0.2, 1.0, 0.0], [0.2, 0.8, 0.6, 0.4], [1.0, 0.0, 0.0, 1.0]])
    ctx = context(1, 3, valid=[True, True, False])
    loss = build("train.uniformity_loss", heads=2)
    expected = -(math.log(0.5) + math.log(0.5) + math.log(0.8) + math.log(0.2)) / 4
    assert loss.unit == "batch"
    assert loss("x", routing(weight_TC), ctx).item() == pytest.approx(expected)
    half = build("train.uniformity_loss", heads=2, scale=0.5)
    assert half("x", routing(weight_TC), ctx).item() == pytest.approx(expected / 2)


def test_the_floor_is_the_logarithm_of_the_choices_and_needs_the_mean_over_tokens() -> None:
    one_each = torch.eye(8)[:, None]  # every token leaves 7 of 8 choices out; over the batch all are used alike
    assert float(uniformity(one_each)) == pytest.approx(math.log(8), rel=1e-6)
    assert float(uniformity(torch.eye(8)[:4, None])) == pytest.approx((math.log(4) + math.log(1e12)) / 2, rel=1e-4)
    assert math.log(512) == pytest.approx(6.238, abs=5e-4)  # what the paper's values lie just above


def test_the_gradient_moves_weight_to_the_choice_used_least() -> None:
    weight = torch.tensor([[0.9, 0.1], [0.7, 0.3]], requires_grad=True)
    build("train.uniformity_loss")("x", routing(weight), context(1, 2)).backward()
    expected = torch.tensor([[-1 / 0.8, -1 / 0.2]] * 2) / 4  # -1 / (2 choices * 2 tokens * p)
    torch.testing.assert_close(weight.grad, expected)


def test_a_forward_of_padding_alone_costs_nothing() -> None:
    found = build("train.uniformity_loss")("x", routing(torch.eye(2)), context(1, 2, valid=[False, False]))
    assert found.item() == 0.0


def test_heads_that_do_not_divide_the_choices_are_refused() -> None:
    with pytest.raises(ContextError, match="heads=3 do not divide the 4 choices"):
        build("train.uniformity_loss", heads=3)("x", routing(torch.eye(4)), context(1, 4))
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        method("train.uniformity_loss").configure({"heads": 0})
