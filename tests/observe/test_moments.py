"""Streaming moments against direct formulas, in any split and order of merging."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.core.errors import ConfigError
from moestro.observe import GroupMoments, Moments, SecondMoments


@given(cuts=st.lists(st.integers(0, 60), max_size=4), seed=st.integers(0, 99), shift=st.sampled_from([0.0, 1e6, -3.0]))
def test_any_split_equals_the_direct_formula(cuts, seed, shift):
    torch.manual_seed(seed)
    group_N, value = torch.randint(0, 4, (60,)), torch.randn(60, 3, dtype=torch.float64) + shift
    bounds = [0, *sorted(cuts), 60]
    parts = []
    for start, stop in itertools.pairwise(bounds):
        part = GroupMoments(5, (3,))
        part.add(group_N[start:stop], value[start:stop])
        parts.append(part)
    whole = GroupMoments(5, (3,))
    for part in parts:
        whole.merge(part)
    for group in range(5):
        rows = value[group_N == group]
        assert whole.count_G[group] == len(rows)
        if len(rows):
            torch.testing.assert_close(whole.mean[group], rows.mean(0))
            torch.testing.assert_close(whole.variance[group], rows.var(0, correction=0), rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(whole.total[group], rows.sum(0))
            assert torch.equal(whole.low[group], rows.min(0).values)
            assert torch.equal(whole.high[group], rows.max(0).values)
        else:
            assert whole.mean[group].tolist() == [0, 0, 0]
            assert whole.variance[group].tolist() == [0, 0, 0]


def test_a_large_offset_does_not_eat_the_variance():
    """The textbook formula E[x^2] - E[x]^2 gives 0 here in float32 and noise in float64."""
    moments = Moments()
    for value in (4.0, 7.0, 13.0, 16.0):
        moments.update(torch.tensor([1e9 + value], dtype=torch.float64))
    assert moments.count == 4
    assert moments.mean.item() == 1e9 + 10
    assert moments.variance.item() == 22.5


def test_second_moments_by_hand_and_merged():
    first, second = SecondMoments(2, 2), SecondMoments(2, 2)
    first.add(0, torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    first.add(0, torch.empty(0, 2))
    second.add(0, torch.tensor([[0.0, 1.0]]))
    second.add(1, torch.tensor([[2.0, 2.0]]))
    first.merge(second)
    assert first.of(0).tolist() == [[10, 2], [2, 5]]
    assert first.of(1).tolist() == [[4, 4], [4, 4]]
    assert first.count_G.tolist() == [3, 1]
    assert 1 not in SecondMoments(2, 2).gram
    second.gram[1].add_(1)
    assert first.of(1).tolist() == [[4, 4], [4, 4]]


def test_shapes_must_agree():
    with pytest.raises(ConfigError, match=r"moments of \(3,\) do not join \(2,\)"):
        GroupMoments(2).merge(GroupMoments(3))
    with pytest.raises(ConfigError, match="width 3 do not join those of width 2"):
        SecondMoments(2, 2).merge(SecondMoments(2, 3))
