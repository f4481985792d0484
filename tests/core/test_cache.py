"""State on the Transformers cache follows beams."""

import copy

import pytest
import torch
from transformers import DynamicCache

from moestro.core.cache import cache_state
from moestro.core.errors import ContextError


def filled() -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(3, 1, 2, 4), torch.zeros(3, 1, 2, 4), 0)
    return cache


def test_state_is_reordered_repeated_and_selected_with_the_cache() -> None:
    cache = filled()
    cache_state(cache)["choice"] = torch.tensor([10, 20, 30])
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache_state(cache)["choice"].tolist() == [30, 10, 10]
    cache.batch_repeat_interleave(2)
    assert cache_state(cache)["choice"].tolist() == [30, 30, 10, 10, 10, 10]
    cache.batch_select_indices(torch.tensor([1, 5]))
    assert cache_state(cache)["choice"].tolist() == [30, 10]


def test_two_caches_do_not_share_state() -> None:
    first, second = filled(), filled()
    cache_state(first)["choice"] = torch.tensor([1])
    assert cache_state(second) == {}


def test_without_a_cache_the_way_out_is_named() -> None:
    with pytest.raises(ContextError, match="use_cache=True"):
        cache_state(None)


def test_a_deep_copy_has_a_state_and_rows_of_its_own() -> None:
    cache = filled()
    cache_state(cache)["choice"] = torch.tensor([10, 20, 30])
    twin = copy.deepcopy(cache)
    twin.reorder_cache(torch.tensor([2, 2, 2]))
    assert cache_state(twin)["choice"].tolist() == [30, 30, 30]
    assert cache_state(cache)["choice"].tolist() == [10, 20, 30]
    assert isinstance(twin, DynamicCache)


def test_reset_empties_the_state() -> None:
    cache = filled()
    cache_state(cache)["choice"] = torch.tensor([10, 20, 30])
    cache.reset()
    assert cache_state(cache) == {}
