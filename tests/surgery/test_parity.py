"""Figures of a receipt, and the edit under which a cut expert is whole."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import moestro
from moestro.core.errors import DataError
from moestro.surgery.parity import AllOn, answers, difference
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import ids, layers_of, logits, mixture


def test_figures_by_hand() -> None:
    before = [torch.tensor([[1.0, -4.0]]), torch.tensor([[2.0, 0.0]])]
    after = [torch.tensor([[1.0, -3.0]]), torch.tensor([[2.5, 0.5]])]
    assert difference(before, after) == {
        "rows": 2,
        "max_abs_diff": 1.0,
        "mean_abs_diff": 0.5,
        "max_abs_before": 4.0,
        "max_rel_diff": 0.25,
    }


def test_padding_is_not_compared() -> None:
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    found = answers(tiny_model("llama"), [{"input_ids": ids(), "attention_mask": mask}, ids(1, 3)])
    assert [len(values) for values in found] == [11, 3]


class Odd(nn.Module):
    """A model without a head that remembers how it was run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, input_ids: Any, **more: Any) -> Any:
        self.seen.append((self.training, torch.is_grad_enabled()))
        return SimpleNamespace(last_hidden_state=input_ids[..., None].float() * self.weight)


def test_models_run_in_evaluation_mode_and_stay_in_theirs() -> None:
    model = Odd().train()
    assert answers(model, [torch.tensor([[1, 2]])])[0].tolist() == [[1.0], [2.0]]
    assert model.seen == [(False, False)]
    assert model.training


def test_no_batches_is_an_error() -> None:
    with pytest.raises(DataError, match="calib holds no batch"):
        answers(tiny_model("llama"), [])


def test_all_on_adds_every_expert_at_its_weight_and_only_where_it_is_meant() -> None:
    model = mixture()
    first, second = layers_of(model)
    x = torch.randn(1, 5, 32)
    plain = second(x)
    with moestro.session(edits=[AllOn([first.site], 0.25)]):
        found = first(x)
        assert torch.equal(second(x), plain)

    def expert(e: int) -> torch.Tensor:
        gate, up = x @ first.bank.weight(e, "gate").T, x @ first.bank.weight(e, "up").T
        return (nn.functional.silu(gate) * up) @ first.bank.weight(e, "down").T

    torch.testing.assert_close(found, 0.25 * sum(expert(e) for e in range(4)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first(x), found)
    assert logits(model).isfinite().all()
