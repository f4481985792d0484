"""The ambiguity loss: how far the largest weight of each head is from all."""

import pytest
import torch
from torch import Tensor

from moestro.core.errors import ConfigError, ContextError
from moestro.core.registry import method
from moestro.core.routing import Routing
from moestro.methods.train.ambiguity_loss import ambiguity
from tests.methods.train.helpers import build, context


def routing(weight_TC: Tensor) -> Routing:
    return Routing.from_mask(weight_TC > 0, weight_TC, num_experts=weight_TC.shape[1])


def test_by_hand_with_two_heads_and_padding() -> None:
    weight_TC = torch.tensor([[0.7, 0.3, 1.0, 0.0], [0.5, 0.5, 0.2, 0.8], [0.5, 0.5, 0.5, 0.5]])
    ctx = context(1, 3, valid=[True, True, False])
    loss = build("train.ambiguity_loss", heads=2)
    expected = (0.3 + 0.0) / 2 + (0.5 + 0.2) / 2
    assert loss.unit == "token"
    assert loss("x", routing(weight_TC), ctx).item() == pytest.approx(expected)
    half = build("train.ambiguity_loss", heads=2, scale=0.5)
    assert half("x", routing(weight_TC), ctx).item() == pytest.approx(expected / 2)
    one = build("train.ambiguity_loss")  # all four choices belong to one head: its largest weight counts
    assert one("x", routing(weight_TC), ctx).item() == pytest.approx(0.0 + 0.2)


def test_it_lies_between_certainty_and_a_tie() -> None:
    assert ambiguity(torch.eye(4)[None]).tolist() == [0.0]
    assert ambiguity(torch.full((1, 2, 8), 1 / 8)).tolist() == pytest.approx([1 - 1 / 8])


def test_the_gradient_sharpens_the_largest_weight() -> None:
    logits = torch.tensor([[0.5, 0.1, -0.3]], requires_grad=True)
    weight = logits.softmax(-1)
    build("train.ambiguity_loss")("x", routing(weight), context(1, 1)).backward()
    p = weight.detach()[0]
    expected = torch.stack([-p[0] * (1 - p[0]), p[0] * p[1], p[0] * p[2]])  # -d softmax_0 / d logits
    torch.testing.assert_close(logits.grad[0], expected)


def test_what_capacity_dropped_weighs_nothing() -> None:
    kept = routing(torch.tensor([[0.6, 0.4]])).replace(kept_N=torch.tensor([False, True]))
    assert build("train.ambiguity_loss")("x", kept, context(1, 1)).item() == pytest.approx(0.6)


def test_heads_that_do_not_divide_the_choices_are_refused() -> None:
    with pytest.raises(ContextError, match="heads=3 do not divide the 4 choices"):
        build("train.ambiguity_loss", heads=3)("x", routing(torch.eye(4)), context(1, 4))
    with pytest.raises(ConfigError, match="greater than 0"):
        method("train.ambiguity_loss").configure({"scale": 0})
