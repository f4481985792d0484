"""A pool of units with experts as index lists: against copies, its gradients, its bytes, what it refuses."""

import pytest
import torch
from torch import Tensor

from moestro.core.bank import PooledFFN, StackedFFN
from moestro.core.errors import ConfigError
from moestro.core.routing import Routing


ROWS = torch.tensor([[0, 2, 3], [3, 4, 6]])  # unit 3 is shared, 1, 5 and 7 are nobody's


def pool(**form: object) -> PooledFFN:
    torch.manual_seed(0)
    bank = PooledFFN(2, 5, 8, 3, **form)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    bank.set_rows(ROWS)
    return bank


def copies(bank: PooledFFN) -> StackedFFN:
    """The same experts with matrices of their own."""
    made = StackedFFN(2, 5, 3, **bank.pool.form)
    with torch.no_grad():
        for expert in range(2):
            for name in bank.projections:
                made.weight(expert, name).copy_(bank.weight(expert, name))
            if made.up_bias is not None:
                row_W = bank.rows_EW[expert]
                both = torch.cat([row_W, row_W + 8]) if made.gated else row_W
                made.up_bias[expert].copy_(bank.pool.up_bias[0, both])
                made.down_proj_bias[expert].copy_(bank.pool.down_proj_bias[0])
    return made


def routing(experts: list[int]) -> Routing:
    weight = torch.linspace(0.5, 1.5, len(experts))
    return Routing(torch.arange(len(experts)), torch.tensor(experts), weight, len(experts), 2)


def given(count: int) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("experts", [[0, 1, 1, 0], [1, 1], [0]])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_copies_do(gated: bool, bias: bool, experts: list[int]) -> None:
    bank = pool(gated=gated, bias=bias)
    x_TD, how = given(len(experts)), routing(experts)
    torch.testing.assert_close(bank(x_TD, how), copies(bank)(x_TD, how), atol=1e-5, rtol=1e-5)


def test_a_shared_unit_takes_the_gradients_of_both_experts_and_a_unit_of_nobody_none() -> None:
    bank = pool()
    twin = copies(bank)
    x_TD, how = given(4), routing([0, 1, 1, 0])
    bank(x_TD, how).square().sum().backward()
    twin(x_TD, how).square().sum().backward()
    found, apart = bank.pool.down_proj.grad[0], twin.down_proj.grad
    torch.testing.assert_close(found[:, 3], apart[0, :, 2] + apart[1, :, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, 6], apart[1, :, 2], atol=1e-4, rtol=1e-4)
    assert not found[:, [1, 5, 7]].any()


def test_unique_bytes_count_each_unit_once() -> None:
    bank = pool()
    assert bank.unique_bytes() == 5 * 3 * 5 * 4  # five units of three vectors of five floats
    assert bank.nbytes(0) + bank.nbytes(1) == 6 * 3 * 5 * 4
    assert bank.flops_per_row(0) == copies(bank).flops_per_row(0)


def test_no_assignment_gives_zero_and_bfloat16_stays() -> None:
    bank = pool().bfloat16()
    none = Routing(torch.empty(0).long(), torch.empty(0).long(), torch.empty(0), 2, 2)
    assert not bank(given(2).bfloat16(), none).any()
    assert bank(given(2).bfloat16(), routing([0, 1])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([[0, 1, 8], [0, 1, 2]], "pool has 8"),
        ([[-1, 1, 2], [0, 1, 2]], "-1 to"),
        ([[0, 0, 1], [0, 1, 2]], "twice"),
        ([[0, 1], [1, 2]], "shape"),
    ],
)
def test_wrong_lists_are_refused(rows: list[list[int]], word: str) -> None:
    bank = pool()
    with pytest.raises(ConfigError, match=word):
        bank.set_rows(torch.tensor(rows))
    assert torch.equal(bank.rows_EW, ROWS)
    with pytest.raises(ConfigError, match="9 units"):
        PooledFFN(2, 5, 8, 9)
