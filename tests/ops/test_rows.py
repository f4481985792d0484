"""Sorting, scattering and the linear layer per expert."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from moestro import ops
from moestro.core.errors import ConfigError
from moestro.ops import grouped_linear, scatter_rows, sort_rows


def test_sort_rows_by_hand():
    segments = sort_rows(torch.tensor([2, 0, 3, 2, 0]), 3)
    assert segments.order_N.tolist() == [1, 4, 0, 3]  # id 3 stands for no expert
    assert segments.expert_offsets_E1.tolist() == [0, 2, 2, 4]
    assert segments.expert_offsets == (0, 2, 2, 4)
    assert (segments.hit, segments.largest, segments.num_rows, segments.num_experts) == ([0, 2], 2, 4, 3)


@given(st.lists(st.integers(0, 6), max_size=40))
def test_sort_rows_is_a_stable_sort(ids):
    segments = sort_rows(torch.tensor(ids, dtype=torch.int64), 5)
    expected = sorted((i for i, e in enumerate(ids) if e < 5), key=lambda i: (ids[i], i))
    assert segments.order_N.tolist() == expected
    for expert in range(5):
        rows = segments.order_N[segments.slice(expert)]
        assert [ids[i] for i in rows] == [expert] * ids.count(expert)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_sort_rows_takes_any_integers(dtype):
    assert sort_rows(torch.tensor([1, 0, 1], dtype=dtype), 2).order_N.tolist() == [1, 0, 2]


def test_scatter_rows_by_hand():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    y = scatter_rows(rows, torch.tensor([2, 0, 2]), torch.tensor([1.0, 10.0, 0.5]), 4)
    assert y.tolist() == [[30.0, 40.0], [0.0, 0.0], [3.5, 5.0], [0.0, 0.0]]
    assert scatter_rows(rows, torch.tensor([0, 0, 0]), None, 1).tolist() == [[9.0, 12.0]]


def test_scatter_rows_gradients():
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    token = torch.tensor([0, 3, 0, 1, 1, 1])
    assert torch.autograd.gradcheck(lambda r, w: scatter_rows(r, token, w, 4), (rows, weight))


def test_scatter_rows_sums_half_precision_in_float32():
    rows = torch.ones(1000, 1, dtype=torch.bfloat16)
    y = scatter_rows(rows, torch.zeros(1000, dtype=torch.int64), None, 1)
    assert y.dtype == torch.bfloat16
    assert y.item() == 1000  # a bfloat16 sum would stop at 256


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("two_threads")
def test_grouped_linear_equals_a_linear_layer_per_row(bias):
    ids = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(0)) * 2 % 7  # some experts stay empty
    segments = sort_rows(ids, 8)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((300, 32), (8, 48, 32), (8, 48))]
    if not bias:
        leaves.pop()
    direction = torch.randn(300, 48, dtype=torch.float64)
    with ops.counting("grouped_linear") as calls:
        y = grouped_linear(*leaves[:2], segments, leaves[2] if bias else None)
    assert calls == 1
    grads = torch.autograd.grad(y, leaves, direction)
    sorted_ids = ids[segments.order_N]
    expected = torch.stack(
        [F.linear(leaves[0][n], leaves[1][e], leaves[2][e] if bias else None) for n, e in enumerate(sorted_ids)]
    )
    torch.testing.assert_close(y, expected)
    for found, wanted in zip(grads, torch.autograd.grad(expected, leaves, direction), strict=True):
        torch.testing.assert_close(found, wanted)


def test_grouped_linear_second_derivatives():
    segments = sort_rows(torch.tensor([0, 2, 2, 0]), 3)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (3, 2, 3), (3, 2))]
    assert torch.autograd.gradcheck(lambda r, w, b: grouped_linear(r, w, segments, b), leaves)
    assert torch.autograd.gradgradcheck(lambda r, w, b: grouped_linear(r, w, segments, b), leaves)


def test_grouped_linear_refuses_rows_of_another_sorting():
    with pytest.raises(ConfigError, match="3 rows and 2 weights for segments of 4 rows and 2 experts"):
        grouped_linear(torch.zeros(3, 2), torch.zeros(2, 2, 2), sort_rows(torch.tensor([0, 1, 1, 0]), 2))
