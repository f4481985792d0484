"""The measurement of the machine: its arithmetic, its file, and that it runs."""

import json
from pathlib import Path

import pytest

from moestro.models import sizing_machine
from moestro.models.sizing_machine import Machine, disk_rate, machine_file, this_machine


FIELDS = {
    "signature": "x",
    "measured": "then",
    "read_bytes_per_s": 4e9,
    "disk_bytes_per_s": 1e9,
    "row_weights_per_s": {4: 4e9, 8: 2e9, 16: 1.5e9, 32: 1e9},
    "gemm_flops_per_s": {1: 2e9, 8: 8e9, 32: 16e9, 128: 32e9, 512: 64e9},
    "step_s": 0.0,
    "layer_s": 0.0,
    "mixture_s": 0.0,
    "choice_s": 0.0,
    "process_bytes": 0,
}
MACHINE = Machine.parse(FIELDS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))


def test_seconds_per_weight() -> None:
    assert MACHINE.seconds_per_weight(1, 32) == pytest.approx(1e-9)
    assert MACHINE.seconds_per_weight(8, 32) == pytest.approx(2 * 8 / 8e9)
    assert MACHINE.seconds_per_weight(64, 32) == pytest.approx(2 * 64 / (16e9 * 32e9) ** 0.5)
    assert MACHINE.seconds_per_weight(4096, 32) == pytest.approx(2 * 4096 / 64e9)
    assert MACHINE.seconds_per_weight(1, 4) == pytest.approx(1 / 4e9)
    assert MACHINE.seconds_per_weight(1, 4.5) == pytest.approx(1 / 2e9), "widths between round up"
    assert MACHINE.seconds_per_weight(512, 8) == pytest.approx(1 / 2e9 + 1024 / 64e9)
    assert MACHINE.seconds_per_weight(0.3, 64) == pytest.approx(1e-9)


def test_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []

    def measure(progress: object = None) -> Machine:
        calls.append(None)
        return Machine.parse({**FIELDS, "signature": sizing_machine.signature(), "step_s": float(len(calls))})

    monkeypatch.setattr(sizing_machine, "measure", measure)
    assert this_machine() == this_machine()
    assert len(calls) == 1
    assert this_machine(again=True).step_s == 2
    assert this_machine().step_s == 2
    kept = json.loads(machine_file().read_text())
    machine_file().write_text(json.dumps({**kept, "signature": "another processor"}))
    assert this_machine().step_s == 3
    for damaged in ("", "[]", "{", json.dumps({**kept, "disk_bytes_per_s": 0})):
        machine_file().write_text(damaged)
        this_machine()
    assert len(calls) == 7
    assert [path.name for path in machine_file().parent.iterdir()] == ["machine.json"]


def test_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, to be quick: the rates are not looked at but for being there and positive."""
    for name, value in (("_SIDE", 64), ("_PANEL", 16), ("_BUDGET_S", 0.0), ("_DISK_BYTES", 2 << 20)):
        monkeypatch.setattr(sizing_machine, name, value)
    told: list[str] = []
    found = this_machine(progress=told.append)
    assert len(told) == 3
    assert set(found.row_weights_per_s) == set(sizing_machine.BITS)
    assert set(found.gemm_flops_per_s) == set(sizing_machine.ROWS)
    assert min(*found.row_weights_per_s.values(), *found.gemm_flops_per_s.values()) > 0
    assert found.step_s + found.layer_s > 0
    assert found.process_bytes > 50e6
    assert this_machine() == found


def test_the_disk_is_read_and_left_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing_machine, "_DISK_BYTES", 4 << 20)
    assert disk_rate(tmp_path / "new") > 0
    assert list((tmp_path / "new").iterdir()) == []
