"""The study of Z-code M3's pruning: its rule about the best criterion, and what random arms are the mean of."""

import pytest

from moestro.studies import zcode_m3_pruning
from moestro.studies._framework import BUDGETS, Measured
from moestro.studies.zcode_m3_pruning import QUARTERS, STUDY, BestStaysClose


def judged(ppl: dict[str, list[float]], seconds: float = 5.0) -> tuple[str, str]:
    values = {
        arm: {"ppl": dict(enumerate(numbers)), "recovery_seconds": dict.fromkeys(range(len(numbers)), seconds)}
        for arm, numbers in ppl.items()
    }
    rule = BestStaysClose(methods=("one", "two"), control="whole", tolerance=0.03, seconds=120.0)
    found = rule(Measured(values), "ppl")
    return found.verdict, found.note


def test_the_best_criterion_is_held_against_the_whole_mixture() -> None:
    whole = [100.0, 100.0, 100.0]
    verdict, note = judged({"one": [101.0, 101.5, 101.2], "two": [90.0, 120.0, 110.0], "whole": whole})
    assert verdict == "shown"
    assert note.startswith("one: mean 0.01233 worse over 3 seeds")
    verdict, note = judged({"one": [109.0, 108.0, 107.0], "two": [101.0, 104.0, 101.0], "whole": whole})
    assert (verdict, note[:4]) == ("partly", "two:"), "the mean is within 3 %, its interval is not"
    assert judged({"one": [105.0, 106.0, 105.0], "two": [104.0, 104.1, 104.0], "whole": whole})[0] == "not_shown"


def test_a_long_recovery_does_not_count() -> None:
    numbers = {"one": [101.0, 101.5, 101.2], "two": [102.0, 102.0, 102.0], "whole": [100.0, 100.0, 100.0]}
    assert judged(numbers, seconds=121.0)[0] == "not_shown"
    assert judged(numbers, seconds=119.0)[0] == "shown"


def test_the_best_is_sought_among_arms_that_leave_out_a_quarter() -> None:
    assert set(QUARTERS) <= {arm.name for arm in STUDY.arms}


def test_a_random_arm_is_the_mean_of_its_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draw leaves out experts of its own and recovers by itself."""
    seen = []
    real = zcode_m3_pruning.measures

    def measures(*args: object) -> dict[str, float]:
        seen.append(real(*args))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(zcode_m3_pruning, "measures", measures)
    monkeypatch.setattr(zcode_m3_pruning, "draws", lambda arm, budget: 3)
    found = zcode_m3_pruning.run("random_quarter", 0, BUDGETS["ci"])
    before = [each["loss_before"] for each in seen]
    assert len(set(before)) == 3
    assert found["loss_before"] == pytest.approx(sum(before) / 3)
