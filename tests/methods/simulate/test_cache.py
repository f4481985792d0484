"""The simulated cache: steps of a trace by hand, counts, the timing, the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.cli import main
from moestro.core.errors import ConfigError
from moestro.core.inputs import MeterInputs
from moestro.core.registry import method
from moestro.core.report import Report
from moestro.core.trace import RoutingTrace, trace
from moestro.methods.simulate._parts.steps import Steps, steps_of
from moestro.models.load import load
from moestro.testing.policy_contract import fewest, stream
from moestro.testing.tiny import VOCAB, tiny_folder


METER = method("simulate.cache")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sequences of 40 tokens through a mixture of 2 layers, 5 experts, 2 a token."""
    folder = tmp_path_factory.mktemp("trace")
    tiny_folder("mixtral", folder / "model")
    model = load(folder / "model")
    ids = torch.randint(3, VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), trace(model, folder / "run.trace"):
        model(input_ids=ids)
    return folder / "run.trace"


def by_hand(found: RoutingTrace) -> dict[tuple[int, int, int], set[int]]:
    """(sequence, position, layer) -> experts."""
    needs: dict[tuple[int, int, int], set[int]] = {}
    for block in found.scan():
        for row in zip(*(block[name].tolist() for name in ("sequence", "position", "layer", "expert")), strict=True):
            needs.setdefault(row[:3], set()).add(row[3])
    return needs


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_steps_go_token_by_token_through_the_layers(recorded: Path, batch: int) -> None:
    found = RoutingTrace.open(recorded)
    needs = by_hand(found)
    expected = []
    for first in range(0, 3, batch):
        for position in range(40):
            for layer in range(2):
                mine = range(first, min(first + batch, 3))
                union = set().union(*(needs[sequence, position, layer] for sequence in mine))
                expected.append([(layer, expert) for expert in sorted(union)])
    steps = steps_of(found, "decode", batch)
    assert steps.keys == expected
    assert steps.tokens == [step // 2 for step in range(len(expected))]
    assert (steps.num_tokens, steps.experts) == (120, 10)


def test_recorded_forwards_stay_whole(recorded: Path) -> None:
    steps = steps_of(RoutingTrace.open(recorded), "recorded")
    assert len(steps.keys) == 2
    assert {layer for layer, _ in steps.keys[0]} == {0}
    past, rest = steps_of(RoutingTrace.open(recorded)).split(0.25)
    assert (len(past), len(rest.keys), rest.num_tokens, rest.tokens[0]) == (60, 180, 90, 0)


def test_the_wait_is_what_nothing_hides() -> None:
    waiting = METER.module.waiting
    assert waiting(2, 0, 1.0, 0.1) == pytest.approx(0)
    assert waiting(0, 1, 1.0, 0.1) == pytest.approx(1.0)
    assert waiting(0, 3, 1.0, 0.1) == pytest.approx(2.8)
    assert waiting(5, 1, 1.0, 0.3) == pytest.approx(0)
    assert waiting(2, 2, 1.0, 0.3) == pytest.approx(0.4 + 0.7)


def test_counts_add_up_and_nobody_beats_the_bound(recorded: Path) -> None:
    config = METER.configure({"budgets": [0.2, 0.4, 1.0], "expert_bytes": 1000, "learn": 0.5})
    report = METER.module.measure(MeterInputs(name="tiny", trace=RoutingTrace.open(recorded)), config)
    table = report.tables["policies"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert len(rows) == 3 * 6
    for row in rows:
        assert row["hits"] + row["misses"] == 60 * 2 * 2
        assert row["of bound"] >= 1.0
        assert row["bytes a token"] == pytest.approx(row["misses"] * 1000 / 60)
        assert row["wait a token (ms)"] >= 0
    assert {row["misses"] for row in rows if row["share"] == 1.0} == {report.notes["experts_met"]}
    assert [row["experts held"] for row in rows if row["policy"] == "belady"] == [2, 4, 10]
    assert Report.parse(json.loads(json.dumps(report.model_dump(mode="json")))) == report


def test_the_bound_is_the_exhaustive_optimum() -> None:
    keys: Any = stream(5, length=12, layers=2, experts=4, top_k=2)
    steps = Steps(keys, [step // 2 for step in range(12)], 6, 8)
    config = METER.configure({"expert_bytes": 10})
    bound = METER.module.made(METER.module.MethodUse(method="serve.belady"), [], steps)
    assert METER.module.play(bound, steps, 35, config)["misses"] == fewest(keys, 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budgets": [0.01]}, "less than one expert of 1048576; all 10 take"),
        ({"policies": [{"method": "train.switch"}]}, "train.switch is no serving policy"),
        ({"learn": 0.999}, "leaves none of 120 tokens"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: str, recorded: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        METER.module.measure(MeterInputs(trace=RoutingTrace.open(recorded)), METER.configure(settings))


def test_the_command_prints_draws_and_speaks_json(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figure = tmp_path / "cache.json", tmp_path / "cache.svg"
    arguments = ["simulate", "cache", str(recorded), str(out)]
    assert main([*arguments, "--budgets", "[0.3, 0.5]", "--batch", "2", "--figure", str(figure)]) == 0
    told = capsys.readouterr().out
    assert "hit ratio" in told
    assert "static_hot" in told
    assert "<svg" in figure.read_text()
    assert main([*arguments, "--json", "--overwrite"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert main([*arguments, "--budgets", "[1e-9]", "--overwrite"]) == 2
    assert capsys.readouterr().err.startswith("error: budget 1e-09 is 0 bytes")
