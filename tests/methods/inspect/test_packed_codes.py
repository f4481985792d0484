"""The report of packed experts: every figure counted again from dequantised weights and stored tensors."""

import pytest
import torch

from moestro import surgery
from moestro.core.inputs import MeterInputs
from moestro.core.registry import method
from moestro.methods.planning import make_plan
from tests.surgery.helpers import layers_of, mixture


METER = method("inspect.packed_codes")


def test_the_report_counts_what_is_there() -> None:
    model = mixture()
    surgery.apply(model, make_plan("compress.qmoe", model, {"down": "int4:g8", "rounding": "nearest"}))
    report = METER.module.measure(MeterInputs(name="tiny", model=model), METER.configure({}))
    table = report.tables["codes"]
    assert [row[:3] for row in table.rows[:3]] == [
        ["model.layers.0.mlp", "gate", "ternary"], ["model.layers.0.mlp", "up", "ternary"],
        ["model.layers.0.mlp", "down", "int4"],
    ]  # fmt: skip
    bank = layers_of(model)[0].bank
    row = dict(zip(table.columns, table.rows[1], strict=True))
    whole = torch.stack([bank.weight(expert, "up") for expert in range(4)])
    parts = [bank.parts(expert, "up") for expert in range(4)]
    assert (row["matrices"], row["weights"]) == (4, whole.numel())
    assert row["zeros"] == pytest.approx(float((whole == 0).float().mean()))
    assert row["codes"] == pytest.approx(16 * sum(len(one["codes"]) for one in parts) / whole.numel())
    assert row["beside"] == pytest.approx(48 * whole.shape[0] * whole.shape[1] / whole.numel())
    low, high = (float(share.float().mean()) for share in (whole < 0, whole > 0))
    share = torch.tensor([row["zeros"], low, high]).double()
    assert row["entropy"] == pytest.approx(float(-(share * share.log2()).sum()), rel=1e-5)
    assert report.numbers["ternary_matrices"] == 2 * 2 * 4
    assert report.numbers["packed_matrices"] == 2 * 3 * 4
    held = sum(layer.bank.nbytes(expert) for layer in layers_of(model) for expert in range(4))
    assert report.numbers["packed_bits"] * report.numbers["packed_weights"] / 8 == pytest.approx(held)


def test_a_model_without_packed_experts_has_none() -> None:
    report = METER.module.measure(MeterInputs(model=mixture()), METER.configure({}))
    assert report.numbers == {"packed_matrices": 0.0, "ternary_matrices": 0.0}
    assert report.tables["codes"].rows == []
