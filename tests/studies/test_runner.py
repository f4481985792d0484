"""Running, resuming and recording fake studies."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.cli import main
from moestro.core.errors import ConfigError, DataError, MoestroError, NonFiniteError, RegistryError
from moestro.studies import _results, _runner
from moestro.studies._figure import draw
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, Study


FULL = BUDGETS["full"]
NUMBERS = {"new": [1.0, 1.2, 1.1], "old": [2.0, 2.1, 2.2]}


def numbers(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    return {"loss": NUMBERS[arm][seed]}


def study(winner: str = "new", **changes: Any) -> Study:
    judge = Beats(method=winner, control="old" if winner == "new" else "new", by=0.5)
    claim = Claim(key="c", text="New wins.", where="Table 1", claimed="half", metric="loss", judge=judge)
    fields: dict[str, Any] = {
        "paper": "some-paper",
        "title": "A fake",
        "setting": "No setting.",
        "claims": (claim,),
        "arms": (Arm(name="new", text="it"), Arm(name="old", text="the usual", role="control")),
        "run": numbers,
    }
    return Study(**(fields | changes))


def run(one: Study, seeds: list[int], work: Path, **options: Any) -> int:
    return _runner.run_jobs(one, FULL, seeds, work=work, report=lambda line: None, **options)


def test_the_record_holds_every_number(tmp_path: Path) -> None:
    one = study(units={"loss": "nats"})
    assert run(one, [0, 1, 2], tmp_path) == 6
    record = _runner.compile_record(one, FULL, work=tmp_path)
    json.dumps(record, allow_nan=False)
    assert record["verdict"] == "shown"
    assert record["seeds"] == [0, 1, 2]
    new = record["measured"]["new"]["loss"]
    assert new["seeds"] == {"0": 1.0, "1": 1.2, "2": 1.1}
    assert (new["mean"], new["std"]) == (pytest.approx(1.1), pytest.approx(0.1))
    claim = record["claims"][0]
    assert (claim["measured"], claim["claimed"], claim["where"]) == (pytest.approx(1.0), "half", "Table 1")
    assert record["command"] == "moestro study some_paper --seeds 3"
    for field in ("commit", "dirty", "date", "machine", "wall_seconds", "versions", "arms", "setting"):
        assert field in record


def test_finished_jobs_are_not_run_again_and_an_interrupt_loses_one(tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    def until_third(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
        asked.append((arm, seed))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return numbers(arm, seed, budget)

    one = study(run=until_third)
    with pytest.raises(KeyboardInterrupt):
        run(one, [0, 1], tmp_path)
    assert run(one, [0, 1], tmp_path) == 2
    assert asked == [("new", 0), ("old", 0), ("new", 1), ("new", 1), ("old", 1)]
    assert run(one, [0, 1], tmp_path) == 0
    assert run(one, [0, 1], tmp_path, fresh=True) == 4


def test_seeds_run_apart_give_the_same_record(tmp_path: Path) -> None:
    run(study(), [0, 1, 2], tmp_path / "together")
    for seed in (2, 0, 1):
        run(study(), [seed], tmp_path / "apart")
    together, apart = (_runner.compile_record(study(), FULL, work=tmp_path / name) for name in ("together", "apart"))
    for field in ("verdict", "claims", "measured", "seeds"):
        assert together[field] == apart[field]


def test_an_unfinished_seed_is_left_out(tmp_path: Path) -> None:
    run(study(), [0, 1], tmp_path)
    (tmp_path / "some_paper" / "full" / "old.1.json").unlink()
    assert _runner.compile_record(study(), FULL, work=tmp_path)["seeds"] == [0]
    with pytest.raises(ConfigError, match="no seed has finished at budget ci"):
        _runner.compile_record(study(), BUDGETS["ci"], work=tmp_path)


def test_a_changed_method_outdates_finished_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "moestro"
    method = package / "methods" / "train" / "one.py"
    method.parent.mkdir(parents=True)
    method.write_text("first")
    monkeypatch.setattr(_runner, "__file__", str(package / "studies" / "_runner.py"))
    one = study(methods=("train.one",))
    before = _runner.fingerprint(one)
    assert _runner.fingerprint(one) == before
    run(one, [0], tmp_path)
    assert run(one, [0], tmp_path) == 0
    method.write_text("second")
    assert _runner.fingerprint(one) != before
    assert run(one, [0], tmp_path) == 2


def test_a_changed_bench_outdates_finished_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bench that the study imports, one that this imports inside a function; not the framework, nor other benches."""
    folder = tmp_path / "moestro" / "studies"
    folder.mkdir(parents=True)
    monkeypatch.setattr(_runner, "__file__", str(folder / "_runner.py"))
    benches = {
        "_near": "from moestro.studies._far import thing\n",
        "_far": "def thing():\n    from moestro.studies import _near, _deep\n",
        "_deep": "import moestro.studies._near\n",
        "_other": "",
        "_framework": "",
    }
    for name, text in benches.items():
        (folder / f"{name}.py").write_text(text)
    source = "from moestro.studies._framework import Study\nfrom moestro.studies._near import thing\n"
    monkeypatch.setattr(_runner.inspect, "getsource", lambda module: source)
    before = _runner.fingerprint(study())
    for name, text in benches.items():
        (folder / f"{name}.py").write_text(f"{text}changed = True\n")
        assert (_runner.fingerprint(study()) != before) == (name not in ("_other", "_framework")), name
        (folder / f"{name}.py").write_text(text)
    assert _runner.fingerprint(study()) == before


def test_the_benches_of_a_study_are_found() -> None:
    """By hand: the study of UNCURL imports the mixture's bench, which imports that of language models."""
    folder = Path(_runner.__file__).parent
    found = _runner._benches((folder / "uncurl.py").read_text(), folder)
    assert found == [(folder / name).read_text() for name in ("_language.py", "_mixture.py")]


def test_a_damaged_job_file_is_run_again(tmp_path: Path) -> None:
    run(study(), [0], tmp_path)
    (tmp_path / "some_paper" / "full" / "new.0.json").write_text('{"finger')
    assert run(study(), [0], tmp_path) == 1


def test_jobs_do_not_depend_on_what_ran_before(tmp_path: Path) -> None:
    def random_number(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
        return {"loss": float(np.random.random())}

    one = study(run=random_number)
    run(one, [0, 1], tmp_path / "a")
    np.random.seed(99)
    run(one, [1], tmp_path / "b")
    first, second = (
        json.loads((tmp_path / name / "some_paper" / "full" / "old.1.json").read_text())["values"] for name in "ab"
    )
    assert first == second


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ({"loss": math.nan}, NonFiniteError, "arm new, seed 0: loss is nan"),
        ({"accuracy": 1.0}, ConfigError, "a claim needs 'loss'; run returned accuracy"),
        ({}, ConfigError, "return a mapping"),
        (1.0, ConfigError, "run returned float"),
    ],
)
def test_answers_that_are_no_measurement_are_refused(
    answer: Any, error: type[MoestroError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        run(study(run=lambda arm, seed, budget: answer), [0], tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_the_figure_depends_on_the_numbers_alone(tmp_path: Path) -> None:
    run(study(), [0, 1], tmp_path)
    record = _runner.compile_record(study(), FULL, work=tmp_path)
    for name in ("a.svg", "b.svg"):
        draw(record, tmp_path / name)
    first = (tmp_path / "a.svg").read_bytes()
    assert first == (tmp_path / "b.svg").read_bytes()
    record["measured"]["new"]["loss"]["seeds"]["0"] = 1.9
    draw(record, tmp_path / "c.svg")
    assert first != (tmp_path / "c.svg").read_bytes()


def written(folder: Path, one: Study, seeds: list[int]) -> None:
    run(one, seeds, folder / "work")
    record = _runner.compile_record(one, FULL, work=folder / "work")
    _runner.write_json(folder / "results" / f"{one.key}.json", record)


def test_parts_of_a_paper_merge(tmp_path: Path) -> None:
    written(tmp_path, study(part="a"), [0, 1, 2])
    written(tmp_path, study("old", part="b"), [0, 1])
    records = _results.load(tmp_path / "results")
    found = _results.summary("some-paper", records)
    assert found is not None
    assert found["verdict"] == "partly"
    assert (found["metric"], found["claimed"], found["seeds"]) == ("loss", "half", 2)
    assert found["measured"] == pytest.approx(1.0)
    assert found["parts"] == ["some_paper_a", "some_paper_b"]
    assert _results.summary("another", records) is None


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match=r"x.json: not a study record"):
        _results.load(tmp_path)


def test_an_unknown_study_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_results, "study_keys", lambda: ["deepseekmoe_balance", "upcycling"])
    with pytest.raises(RegistryError, match="there is: upcycling"):
        _results.study("upcyclin")
    with pytest.raises(RegistryError, match="its parts are: deepseekmoe_balance"):
        _results.study("deepseekmoe")
    assert main(["study", "upcyclin"]) == 2
    assert capsys.readouterr().err == "error: no study 'upcyclin'; there is: upcycling\n"


def test_the_command_records_and_prints_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_results, "study", lambda key: study())
    monkeypatch.chdir(tmp_path)
    assert main(["study", "some-paper", "--seeds", "3"]) == 0
    told = capsys.readouterr().out
    assert "verdict: shown -> results/some_paper.json" in told
    assert json.loads(Path("results/some_paper.json").read_text())["verdict"] == "shown"
    assert Path("results/some_paper.svg").read_text().startswith("<?xml")
    assert main(["study", "some-paper", "--micro"]) == 0
    assert Path("runs/studies/some_paper/some_paper.micro.json").exists()
    assert sorted(path.name for path in Path("results").iterdir()) == ["some_paper.json", "some_paper.svg"]
