"""`moestro plan`: tables and JSON, budgets that are too small, wrong flags; nothing but headers is read."""

import json
from pathlib import Path

import pytest

from moestro.cli import main
from moestro.core.plan import ServingPlan
from moestro.models import sizing_machine
from moestro.models.sizing_machine import Machine
from moestro.testing.tiny import tiny_folder


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that has been measured, so that no test waits for one."""
    found = Machine(
        signature=sizing_machine.signature(),
        measured="2020-01-01 00:00",
        read_bytes_per_s=1e10,
        disk_bytes_per_s=1e9,
        row_weights_per_s=dict.fromkeys(sizing_machine.BITS, 4e9),
        gemm_flops_per_s=dict.fromkeys(sizing_machine.ROWS, 1e11),
        step_s=1e-4,
        layer_s=5e-4,
        mixture_s=1e-4,
        choice_s=1e-5,
        process_bytes=100 * 2**20,
    )
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))
    sizing_machine.machine_file().parent.mkdir()
    sizing_machine.machine_file().write_text(found.model_dump_json())
    return found


def mixtral_config(folder: Path) -> Path:
    """Mixtral-8x7B as a config alone."""
    folder.mkdir()
    values = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_everything_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folder("mixtral", tmp_path / "m")
    assert main(["plan", str(tmp_path / "m"), "--memory", "1GiB"]) == 0
    told = capsys.readouterr().out
    assert "experts, 10 of 10" in told
    assert "cache of 64 positions" in told, "the default context is the model's own where that is shorter"
    assert "disk " not in told.split("Seconds")[0]
    assert "tokens/s" in told
    assert "2020-01-01" in told


def test_a_config_alone_and_experts_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = mixtral_config(tmp_path / "big")
    out = tmp_path / "plan.json"
    arguments = ["--memory", "8GiB", "--bits", "4", "--context", "2048", "--out", str(out), "--json"]
    assert main(["plan", str(folder), *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == 46_702_792_704
    tiers = told["tiers"]
    slab = 3 * 4096 * 14336
    assert tiers["experts"] + tiers["disk"] == 256 * (slab // 2 + slab // 64 * 2)
    assert tiers["cache"] == 2048 * 32 * 2 * 1024 * 4
    assert 0 < tiers["slots"] < tiers["num_experts"] == 256
    assert told["memory_bytes"] <= 8 * 2**30
    speed = told["tokens_per_second"]["decode"]
    assert 0 < speed["low"] < speed["estimate"] < speed["high"]
    assert len(told["layers"]) == 32
    assert sum(row["parameters"] for row in told["layers"]) < told["parameters"]
    plan = ServingPlan.load(out)
    assert plan.tiers["disk.experts"] == tiers["disk"]
    assert plan.config == {"context": 2048, "bits": 4}
    assert main(["plan", str(folder), "--memory", "8GiB", "--bits", "4", "--layers"]) == 0
    told_text = capsys.readouterr().out
    assert f"experts, {tiers['num_experts']}" not in told_text
    assert "decoder 31" in told_text
    assert "2 of 8" in told_text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "2GiB"], "does not fit into 2.00 GiB"),
        (["--memory", "2GiB"], "what works: --memory 4.31GiB\n"),
        (["--memory", "3GiB"], "what works: --memory 4.31GiB or --bits 4 (needs 2.13 GiB)"),
        (["--memory", "3GiB", "--bits", "4", "--context", "65536"], "or --context 4096 (needs 2.13 GiB)"),
        (["--memory", "2G"], "write 2GiB"),
        (["--memory", "90GiB", "--bits", "5"], "--bits 5"),
        (["--memory", "90GiB", "--context", "140000"], "--context 131072 or less"),
        (["--memory", "90GiB", "--context", "-1"], "--context"),
        ([], "--memory"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mixtral_config(tmp_path / "big")
    out = tmp_path / "plan.json"
    assert main(["plan", str(folder), *arguments, "--out", str(out)]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not out.exists()


def test_a_measurement_of_a_busy_machine_is_called_one(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_folder("llama", tmp_path / "m")
    for busy, said in ((0.1, False), (3.0, True)):
        kept = machine.model_copy(update={"busy": busy})
        sizing_machine.machine_file().write_text(kept.model_dump_json())
        assert main(["plan", str(tmp_path / "m"), "--memory", "1GiB"]) == 0
        assert ("busy (3.0 processes a core; --measure" in capsys.readouterr().out) is said


def test_no_such_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "none"), "--memory", "1GiB"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
