"""Random and forced routing."""

import pytest
import torch

from moestro.core.errors import ConfigError, ContextError
from moestro.core.registry import method
from moestro.core.session import Session
from tests.methods.train.helpers import build, context, route


def test_random_choice_is_uniform_without_repeats_and_follows_the_seed() -> None:
    router = build("train.random_router", num_experts=5, top_k=2)
    torch.manual_seed(7)
    routing = route(router, torch.zeros(50_000, 6), context(1, 50_000))
    assert (routing.expert_TK[:, 0] != routing.expert_TK[:, 1]).all()
    share = routing.counts_C() / 100_000
    assert (share - 0.2).abs().max() < 0.01
    assert torch.equal(routing.weight_TK, torch.full((50_000, 2), 0.5))
    torch.manual_seed(7)
    again = route(router, torch.zeros(50_000, 6), context(1, 50_000))
    assert torch.equal(routing.expert_TK, again.expert_TK)


def test_forced_routing_follows_the_tag_of_each_row() -> None:
    router = build("train.random_router", num_experts=3, top_k=1, mode="forced")
    ctx = context(2, 3, session=Session(tags={"expert": torch.tensor([2, 0])}))
    assert route(router, torch.zeros(6, 6), ctx).expert_TK[:, 0].tolist() == [2, 2, 2, 0, 0, 0]


def test_forcing_an_expert_that_is_not_there_is_refused() -> None:
    router = build("train.random_router", num_experts=3, top_k=1, mode="forced")
    with pytest.raises(ContextError, match="0 to 2"):
        route(router, torch.zeros(6, 6), context(2, 3, session=Session(tags={"expert": torch.tensor([3, 0])})))
    with pytest.raises(ConfigError, match="top_k must be 1"):
        method("train.random_router").configure({"mode": "forced", "top_k": 2})
