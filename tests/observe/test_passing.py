"""Modules watched and scaled while a model runs, and left as they were."""

import pytest
import torch
from torch import nn

from moestro.observe.passing import scaled_inputs, watched


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_every_forward_is_told_with_its_inputs_and_output() -> None:
    model, x, seen = net(), torch.randn(5, 3), []
    with watched({"first": model[0], "last": model[2]}, lambda *told: seen.append(told)):
        y = model(x)
        model(x[:1])
    assert [name for name, _, _ in seen] == ["first", "last", "first", "last"]
    assert torch.equal(seen[0][1][0], x)
    assert torch.equal(seen[1][2], y)
    model(x)
    assert len(seen) == 4


def test_scaled_inputs_are_the_weights_columns_scaled() -> None:
    model, x, factor = net(), torch.randn(5, 3), torch.tensor([0.0, 1.0, 2.0, 0.0])
    with scaled_inputs({model[2]: factor}):
        found = model(x)
    hidden = model[1](model[0](x))
    torch.testing.assert_close(found, hidden @ (model[2].weight * factor).T + model[2].bias)
    torch.testing.assert_close(model(x), model[2](hidden))


def test_hooks_are_gone_after_an_error() -> None:
    model = net()
    factors = {model[0]: torch.ones(3)}
    with pytest.raises(RuntimeError), watched({"m": model[0]}, lambda *_: None), scaled_inputs(factors):
        model(torch.randn(2, 7))
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks
