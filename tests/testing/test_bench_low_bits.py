"""The benchmark of layouts with few bits: arms hold what they say, and every ratio is there."""

from typing import Any

import numpy as np
import pytest

from moestro.engine.kernels.twin import floats
from moestro.testing.bench import low_bits


def test_arms_have_the_bits_of_their_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bits, "HIDDEN", 1024)
    monkeypatch.setattr(low_bits, "EXPERTS", 8)
    monkeypatch.setattr(low_bits, "INNER", 64)
    kernels: Any = object()
    bits = {name: low_bits.Bank(kernels, used).bits for name, used in low_bits.ARMS.items()}
    assert bits["fp32"] == 32
    assert bits["4 bits"] == 4.25
    assert bits["mixed 2.5 bits"] == pytest.approx((1.25 + 2 * 2.375 + 5 * 3.375) / 8)
    assert 0.7 < bits["ternary"] < 1.3


def test_the_ternary_arm_has_the_zeros_of_the_paper() -> None:
    weight = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    made = floats(low_bits.matrix_of(weight, "t1"))
    assert (made == 0).mean() == pytest.approx(low_bits.ZEROS, abs=0.001)
    kept = made != 0
    assert np.array_equal(np.sign(made[kept]), np.sign(weight[kept]))


def test_every_layout_is_held_against_4_bits_and_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moestro_native", reason="the native wheel is not installed: pip install ./native")
    for name, value in (("HIDDEN", 128), ("INNER", 64), ("EXPERTS", 8), ("CHOSEN", 2)):
        monkeypatch.setattr(low_bits, name, value)
    rows = low_bits.run(2)
    assert len(rows) == 2 * (2 * (len(low_bits.ARMS) - 2) + 1)
    assert {row.peer_name for row in rows} == {"4 bits", "fp32"}
    assert all(row.ratio > 0 for row in rows)
