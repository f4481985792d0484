"""Hash routing: fixed, balanced, without gradient."""

import pytest
import torch

from moestro.core.errors import ConfigError, ContextError
from moestro.core.registry import method
from moestro.core.site import Shared
from moestro.methods.train.hash_router import hash_table
from tests.methods.train.helpers import build, context, route, site


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_table_is_balanced_and_slots_never_collide(top_k: int) -> None:
    table = hash_table(1000, 4, top_k, seed=3)
    for column in table.T:
        assert torch.bincount(column, minlength=4).tolist() == [250] * 4
    assert all(len(set(row.tolist())) == top_k for row in table)
    assert torch.equal(table, hash_table(1000, 4, top_k, seed=3))
    assert not torch.equal(table, hash_table(1000, 4, top_k, seed=4))


def test_the_same_id_goes_the_same_way_whatever_the_hidden_state() -> None:
    router = build("train.hash_router", num_experts=4, top_k=2, vocabulary=50)
    ids = torch.tensor([7, 12, 7, 49])
    routing = route(router, torch.randn(4, 6), context(1, 4, ids=ids))
    assert torch.equal(routing.expert_TK, router.table_VK[ids])
    assert torch.equal(routing.weight_TK, torch.full((4, 2), 0.5))


def test_embeddings_without_ids_are_refused() -> None:
    router = build("train.hash_router", num_experts=4, vocabulary=50)
    with pytest.raises(ContextError, match="input_ids"):
        route(router, torch.randn(4, 6), context(1, 4))


def test_a_model_without_a_vocabulary_must_say_its_size() -> None:
    use = method("train.hash_router")
    with pytest.raises(ConfigError, match="vocabulary="):
        use.build(site(), use.configure({}), Shared())
