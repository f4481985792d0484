"""`moestro doctor` reports and never fails."""

import json

import pytest

from moestro.cli import doctor, main


def test_all_groups_are_reported_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {check["group"] for check in found} == {"system", "packages", "optional", "speed", "kernels"}
    by_name = {check["name"]: check for check in found}
    assert by_name["torch"]["state"] == "ok"
    assert float(by_name["float32 products"]["value"].split()[0]) > 0
    assert by_name["loop"]["state"] == "ok", "the reference backend runs everywhere"


def test_a_check_that_raises_becomes_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> tuple[int, int]:
        raise OSError("no such page size")

    monkeypatch.setattr(doctor, "memory", broken)
    assert main(["doctor", "--quick"]) == 0
    told = capsys.readouterr().out
    assert "OSError: no such page size" in told
    assert "1 of" in told


def test_a_missing_requirement_is_bad_and_a_missing_extra_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    found = list(doctor.checks(quick=True))
    assert {check.state for check in found if check.group == "packages"} == {"bad"}
    assert "bad" not in {check.state for check in found if check.group == "optional"}


def test_little_memory_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory", lambda: (3 * doctor.GIB, 2 * doctor.GIB))
    memory = next(check for check in doctor.checks(quick=True) if check.name == "memory")
    assert (memory.state, memory.value) == ("bad", "2.0 GiB free of 3.0")
