"""Monet's block by block pass against the plain sums over all tokens: outputs, gradients, and when which one runs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.methods.train import monet
from moestro.methods.train._parts import paired_halves
from moestro.methods.train.monet import Config, HalfExperts


KINDS = pytest.mark.parametrize("kind", ["horizontal", "vertical"])
TOKENS, WIDTH, AXIS, HEADS = 8, 6, 5, 3


def experts(kind: str, **config: Any) -> HalfExperts:
    torch.manual_seed(1)
    made = HalfExperts(WIDTH, 4, Config(axis=AXIS, top_k=2, expert_size=4, decompose=kind, **config)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.6)
    return made


def inputs() -> list[Tensor]:
    """x, and weights of both axes with some zeros, none of which sum to 1."""
    torch.manual_seed(2)
    weights = [torch.rand(TOKENS, HEADS, AXIS).double() for _ in range(2)]
    return [part.requires_grad_() for part in (torch.randn(TOKENS, WIDTH).double(), *(g * (g > 0.4) for g in weights))]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of the pass."""
    made: list[int] = []
    real = monet.paired_halves
    monkeypatch.setattr(monet, "paired_halves", lambda x_TD, *rest: (made.append(len(x_TD)), real(x_TD, *rest))[1])
    return made


@KINDS
@pytest.mark.parametrize("block", [1, 3, 8, 100])
def test_blocks_equal_the_sums_over_all_tokens(
    kind: str, block: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paired_halves, "BLOCK", block)
    made, given = experts(kind), inputs()
    wanted = [*given, *made.parameters()]
    found = made(*given)
    assert calls == [TOKENS]
    monkeypatch.setattr(monet, "fits", lambda *args: False)
    plain = made(*given)
    assert calls == [TOKENS]
    torch.testing.assert_close(found, plain)
    wish = torch.randn_like(plain)
    ours, theirs = (torch.autograd.grad((y * wish).sum(), wanted) for y in (found, plain))
    for one, two in zip(ours, theirs, strict=True):
        assert two.abs().max() > 1e-3
        torch.testing.assert_close(one, two)


@KINDS
def test_what_a_block_does_not_suit_is_computed_plainly(kind: str, calls: list[int]) -> None:
    made, given = experts(kind), inputs()
    ones = torch.ones(AXIS, AXIS, dtype=torch.bool)
    torch.testing.assert_close(made(*given, ones), made(*given))
    assert calls == [TOKENS]
    experts(kind, activation="gelu")(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made.float()(*(part.float() for part in given))
    made.double()
    next(made.parameters()).requires_grad_(False)
    made(*given)  # a frozen weight needs no gradient, the block makes all
    assert calls == [TOKENS]
    with torch.no_grad():
        made(*given)
    assert calls == [TOKENS] * 2
