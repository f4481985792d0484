"""Every study at its small budgets, and every record against its study."""

import time
from pathlib import Path

import pytest

from moestro.core.papers import load_papers
from moestro.core.registry import method_ids
from moestro.studies._framework import BUDGETS, Measured, merge
from moestro.studies._results import load, study, study_keys
from moestro.studies._runner import compile_record, run_jobs


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("key", study_keys())
def test_a_study_is_named_after_its_paper(key: str) -> None:
    one = study(key)
    assert one.key == key, f"the file of {one.paper} {one.part} is called {one.key}.py"
    assert one.paper in {paper.key for paper in load_papers()}
    assert set(one.methods) <= set(method_ids())
    assert one.methods, "name the methods the numbers depend on"


@pytest.mark.parametrize("name", ["ci", pytest.param("micro", marks=pytest.mark.slow)])
@pytest.mark.parametrize("key", study_keys())
def test_a_study_keeps_its_small_budget(key: str, name: str, tmp_path: Path) -> None:
    one, budget = study(key), BUDGETS[name]
    # Processor time of this process: what the budget means on a machine with nothing else to do.
    started = time.process_time()
    run_jobs(one, budget, range(budget.seeds), work=tmp_path)
    seconds = time.process_time() - started
    record = compile_record(one, budget, work=tmp_path)
    assert {claim["key"] for claim in record["claims"]} == {claim.key for claim in one.claims}
    assert seconds <= budget.seconds, f"{key} takes {seconds:.1f} s at budget {name}; at most {budget.seconds:g}"


@pytest.mark.parametrize("key", sorted(load(ROOT / "results")))
def test_a_record_belongs_to_its_study(key: str) -> None:
    record, one = load(ROOT / "results")[key], study(key)
    assert record["budget"] == "full"
    assert not record["dirty"], "recorded from uncommitted code; commit, then run with --fresh"
    assert record["commit"]
    assert [claim["key"] for claim in record["claims"]] == [claim.key for claim in one.claims]
    assert [arm["name"] for arm in record["arms"]] == [arm.name for arm in one.arms]
    assert (ROOT / "results" / f"{key}.svg").exists()
    # The verdicts follow from the recorded numbers: nobody edited them.
    values = {
        arm: {name: {int(seed): value for seed, value in found["seeds"].items()} for name, found in metrics.items()}
        for arm, metrics in record["measured"].items()
    }
    judged = one.judge(Measured(values))
    assert {claim["key"]: claim["verdict"] for claim in record["claims"]} == {k: j.verdict for k, j in judged.items()}
    assert record["verdict"] == merge([judgement.verdict for judgement in judged.values()])
