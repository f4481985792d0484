"""`moestro plan` of a packed folder: the engine's bytes, refusals before anything is read, --verify."""

import json
from pathlib import Path

import pytest

from moestro.cli import main
from moestro.core.errors import ConfigError
from moestro.core.plan import ServingPlan
from moestro.engine import measure, profile, room
from moestro.engine.pack import pack_model
from moestro.engine.packed import Packed
from moestro.engine.profile import ROWS, Attend, Cost
from moestro.testing.tiny import tiny_folder


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, and a machine that takes no time to measure."""
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "rates", lambda *given: dict.fromkeys(ROWS, 1e9))
    looks = dict.fromkeys(("one", "many"), Attend(look_s=1e-9, product_s=1e-10))
    monkeypatch.setattr(measure, "attention", lambda threads: looks)
    costs = dict.fromkeys(("step", "layer", "resident", "stored"), Cost(once=1e-5, row=1e-7, expert=2e-6))
    monkeypatch.setattr(measure, "costs", lambda *given: costs)
    monkeypatch.setattr(profile, "busy", lambda: 0.1)
    tiny_folder("qwen3_moe", tmp_path / "model", head_dim=16, max_position_embeddings=128)
    pack_model(tmp_path / "model", tmp_path / "packed", bits=8)
    return tmp_path / "packed"


def test_bytes_speeds_and_the_plan_as_a_file(packed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", str(packed), "--memory", "8GiB", "--out", str(tmp_path / "plan.json"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    place = told["room"]
    assert place["budget"] == 8 * 2**30 - sum(place[name] for name in ("process", "weights", "cache", "working"))
    assert place["slots"] == place["count"] == 10
    assert place["cache"] == 128 * 3 * 2 * 2 * 16 * 4, "the model's own positions"
    assert told["tokens_per_second"]["decode"]["low"] > 0
    plan = ServingPlan.load(tmp_path / "plan.json")
    assert plan.tiers["memory.experts"] == Packed.open(packed).files["experts.bin"][0]
    assert plan.tiers["disk.experts"] == 0


def test_verify_prints_the_error(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(packed), "--memory", "8GiB", "--verify", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    for name in ("prompt", "decode"):
        found = told["verified"][name]
        estimate = told["tokens_per_second"][name]["estimate"]
        assert found["error"] == pytest.approx(estimate / found["measured"] - 1)
        assert found["hits"] == 1
    assert told["verified"]["memory"]["kept"] is True
    assert main(["plan", str(packed), "--memory", "8GiB", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "experts, 10 of 10" in shown
    assert "measured" in shown
    assert "memory at most" in shown
    assert "measured speeds may be too low" not in shown
    assert "reading ahead" not in shown, "nothing is read"


def test_speeds_of_experts_on_disk_say_what_they_leave_out(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "server_bytes", lambda path: 0)
    monkeypatch.setattr(room, "working_bytes", lambda model: 0)
    opened = Packed.open(packed)
    largest = max(there.stride for there in opened.experts.values())
    rest = sum(piece.nbytes for piece in opened.tensors.values()) + 8 * room.page_bytes(opened.model)
    assert main(["plan", str(packed), "--memory", f"{rest + 4 * largest}", "--context", "128"]) == 0
    shown = capsys.readouterr().out
    assert "experts, 4 of 10" in shown
    assert "both without reading ahead, which `moestro serve` does where the routers allow it" in shown


def test_a_busy_machine_is_named(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "busy", lambda: 3.5)
    assert main(["plan", str(packed), "--memory", "8GiB", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "the machine was busy (3.5 processes a core): measured speeds may be too low" in shown
    assert "while the machine was busy (3.5 processes a core; --measure does it again)" in shown
    assert str(packed.parent / "cache" / "engine.json") in shown
    assert "matrices, one row: f32 1 G weights/s, q8 1 G weights/s" in shown
    assert (
        "microseconds beside weights: a step 10, a layer 10, a mixture in memory 10, one in the store 10 and 2" in shown
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "1MiB"], "bytes are too few: the process"),
        (["--memory", "8GiB", "--context", "129"], "--context 129 is more than the 128 positions"),
        (["--memory", "8GiB", "--context", "64"], "give more"),
        (["--memory", "8GiB", "--bits", "4"], "a packed model has its bits"),
    ],
)
def test_refusals(
    arguments: list[str], words: str, packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Packed, "resident", lambda *given: pytest.fail("read"))
    assert main(["plan", str(packed), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_only_packed_models_are_verified(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(packed.parent / "model"), "--memory", "8GiB", "--verify"]) == 2
    assert "moestro pack" in capsys.readouterr().err


def test_a_server_s_own_bytes_count(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing what serves and reading the vocabulary take tens of megabytes, before the model takes any."""
    alone = room.server_bytes(packed)
    assert 40 << 20 < alone < 200 << 20
    monkeypatch.setattr(room, "_SERVER", "raise SystemExit('no module named uvicorn')")
    with pytest.raises(ConfigError, match=r"a serving process cannot be started here: no module named uvicorn"):
        room.server_bytes(packed)
