"""The balance loss over active experts: by hand, against a loop, and where it pulls on nothing."""

import pytest
import torch
from torch import Tensor

from moestro.core.errors import ContextError
from moestro.core.routing import Routing
from moestro.core.session import session
from tests.methods.train.helpers import DIM, build, context, route


CHOSEN = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1]], dtype=torch.bool)
WEIGHT = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.2, 0.2, 0.6], [0.5, 0.25, 0.25]])


def routing(weight_TC: Tensor = WEIGHT) -> Routing:
    return Routing.from_mask(CHOSEN, weight_TC, num_experts=3)


def loss_of(found: Routing, ctx: object, **config: object) -> Tensor:
    return build("train.dts_balance_loss", **config)("block.mlp", found, ctx)


def test_by_hand() -> None:
    """ce = (3, 2, 2) / 4, me = (0.6 + 0.8 + 0.5, 0.3 + 0.25, 0.6 + 0.25) / 4, loss = 3 sum me ce."""
    wanted = 3 * (3 * 1.9 + 2 * 0.55 + 2 * 0.85) / 16
    assert loss_of(routing(), context(1, 4)).item() == pytest.approx(wanted)


def test_padding_is_left_out_and_sequences_stand_apart() -> None:
    padded = context(1, 4, valid=[True, True, False, True])
    wanted = 3 * (3 * 1.9 + 2 * 0.55 + 1 * 0.25) / 9
    assert loss_of(routing(), padded).item() == pytest.approx(wanted)
    first = 3 * (2 * 1.4 + 1 * 0.3) / 4
    second = 3 * (1 * 0.5 + 1 * 0.25 + 2 * 0.85) / 4
    assert loss_of(routing(), context(2, 2), scope="sequence").item() == pytest.approx(first + second)


def test_the_gradient_is_that_of_the_formula() -> None:
    """d loss / d w_ti = E m_ti ce_i / T: what is not active gets none."""
    weight = WEIGHT.clone().requires_grad_()
    loss_of(routing(weight), context(1, 4)).backward()
    torch.testing.assert_close(weight.grad, 3 * CHOSEN * torch.tensor([3.0, 2.0, 2.0]) / 16)


def test_while_all_are_active_it_is_constant() -> None:
    router = build("train.evomoe", num_experts=5, stage="dense", progress=0.0)
    torch.nn.init.normal_(router.weight)
    loss = loss_of(route(router, torch.randn(20, DIM), context(1, 20)), context(1, 20))
    assert loss.item() == pytest.approx(5)
    loss.backward()
    torch.testing.assert_close(router.weight.grad, torch.zeros(5, DIM), atol=1e-6, rtol=0)


def test_descent_on_it_evens_a_hard_gate() -> None:
    torch.manual_seed(0)
    router = build("train.evomoe", num_experts=4, stage="hard", progress=1.0).train()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0] = 1.0
    x = torch.randn(512, DIM) + 1.0
    ctx = context(1, 512)
    before = route(router.eval(), x, ctx).counts_C()
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    router.train()
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(route(router, x, ctx), ctx).backward()
        optimizer.step()
    with session():
        after = route(router.train(), x, ctx).counts_C().float()
    assert before.max() > 450
    assert after.max() / after.mean() < 1.5


def test_without_tokens_it_says_so() -> None:
    ctx = context(1, 4)
    ctx.tokens = None
    with pytest.raises(ContextError, match="tokens of the forward"):
        loss_of(routing(), ctx)
