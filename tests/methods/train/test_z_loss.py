"""The z-loss against its closed form."""

import math

import torch

from tests.methods.train.helpers import build, context, route


def test_equal_logits_give_the_square_of_log_e_per_token() -> None:
    router = build("train.softmax_topk", num_experts=8, top_k=2)
    torch.nn.init.zeros_(router.weight)
    ctx = context(1, 5)
    total = build("train.z_loss")("s", route(router, torch.randn(5, 6), ctx), ctx)
    torch.testing.assert_close(total / 5, torch.tensor(math.log(8) ** 2))


def test_padding_does_not_count() -> None:
    router = build("train.softmax_topk", num_experts=8, top_k=2)
    x = torch.randn(6, 6)
    whole, padded = context(1, 4), context(1, 6, valid=[True] * 4 + [False] * 2)
    loss = build("train.z_loss")
    a, b = loss("s", route(router, x[:4], whole), whole), loss("s", route(router, x, padded), padded)
    torch.testing.assert_close(a, b)
    assert loss.unit == "token"
