"""The rules of the studies framework on numbers whose verdicts can be worked out by hand."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from moestro.core.errors import ConfigError
from moestro.studies._framework import (
    BUDGETS,
    Arm,
    Beats,
    Budget,
    Claim,
    Judge,
    Matches,
    Measured,
    NotWorse,
    Recovers,
    Study,
    Within,
    interval,
    merge,
)


def study(judge: Judge | None = None, **changes: Any) -> Study:
    def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
        return {"loss": 1.0}

    judge = judge or Beats(method="new", control="old", by=0.5)
    claim = Claim(key="c", text="New wins.", where="Table 1", claimed="half", metric="loss", judge=judge)
    fields: dict[str, Any] = {
        "paper": "some-paper",
        "title": "A fake",
        "setting": "No setting.",
        "claims": (claim,),
        "arms": (Arm(name="new", text="it"), Arm(name="old", text="the usual", role="control")),
        "run": run,
    }
    return Study(**(fields | changes))


def measured(**arms: list[float]) -> Measured:
    return Measured({arm: {"loss": dict(enumerate(values))} for arm, values in arms.items()})


def test_interval_of_a_hand_worked_sample() -> None:
    # mean 2, standard deviation 1, t(0.975, 2 degrees) = 4.30265
    low, high = interval([1.0, 2.0, 3.0]) or (math.nan, math.nan)
    assert low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4)
    assert interval([1.0]) is None


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 5))
    inside = sum(low <= 3.0 <= high for low, high in filter(None, map(interval, draws)))
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("new", "old", "by", "better", "verdict"),
    [
        ([1.0, 1.2, 1.1], [2.0, 2.1, 2.2], 0.5, "lower", "shown"),  # effects 1.0 0.9 1.1
        ([1.0, 1.2, 1.1], [2.0, 2.1, 2.2], 1.5, "lower", "partly"),  # real, but smaller than claimed
        ([1.0, 3.0, 1.1], [2.0, 2.1, 2.2], 0.0, "lower", "partly"),  # mean 0.4, interval crosses zero
        ([2.0, 2.1, 2.2], [1.0, 1.2, 1.1], 0.0, "lower", "not_shown"),
        ([2.0, 2.1, 2.2], [1.0, 1.2, 1.1], 0.5, "higher", "shown"),
        ([1.0], [2.0], 0.5, "lower", "partly"),  # one seed has no interval
        ([1.0, 1.0], [1.0, 1.0], 0.0, "lower", "not_shown"),  # equal is not better
    ],
)
def test_beats(new: list[float], old: list[float], by: float, better: Any, verdict: str) -> None:
    judge = Beats(method="new", control="old", by=by, better=better)
    assert judge(measured(new=new, old=old), "loss").verdict == verdict


def test_beats_relative_divides_by_the_control() -> None:
    judge = Beats(method="new", control="old", by=0.4, relative=True)
    found = judge(measured(new=[1.0, 1.0], old=[2.0, 4.0]), "loss")
    assert found.measured == pytest.approx((0.5 + 0.75) / 2)


def test_beats_compares_the_seeds_both_arms_have() -> None:
    values = Measured({"new": {"loss": {0: 1.0, 1: 9.0}}, "old": {"loss": {1: 10.0, 2: 3.0}}})
    assert Beats(method="new", control="old")(values, "loss").measured == pytest.approx(1.0)


def test_not_worse_looks_at_the_worse_side_only() -> None:
    # Gaps 0.01, 0.03: mean 0.02, half interval t(0.975, 1) * 0.01 = 0.127062.
    judge = NotWorse(method="new", control="old", tolerance=0.15)
    close = judge(measured(new=[1.01, 1.03], old=[1.0, 1.0]), "loss")
    assert close.verdict == "shown"
    assert close.measured == pytest.approx(0.02)
    assert close.interval == pytest.approx((0.02 - 0.127062, 0.02 + 0.127062), abs=1e-5)
    assert (
        NotWorse(method="new", control="old", tolerance=0.14)(
            measured(new=[1.01, 1.03], old=[1.0, 1.0]), "loss"
        ).verdict
        == "partly"
    )
    assert judge(measured(new=[1.3, 1.1], old=[1.0, 1.0]), "loss").verdict == "not_shown"
    assert judge(measured(new=[0.2, 0.1], old=[1.0, 1.0]), "loss").verdict == "shown"  # Matches would refuse it
    higher = NotWorse(method="new", control="old", tolerance=0.1, better="higher", relative=True)
    assert higher(measured(new=[1.9, 1.9], old=[2.0, 2.0]), "loss").measured == pytest.approx(0.05)
    assert higher(measured(new=[1.7, 1.7], old=[2.0, 2.0]), "loss").verdict == "not_shown"
    assert judge(measured(new=[1.0], old=[1.0]), "loss").verdict == "partly"


@pytest.mark.parametrize(
    ("gap", "verdict"), [([0.01, -0.01, 0.0], "shown"), ([0.3, -0.3, 0.0], "partly"), ([0.5, 0.6, 0.5], "not_shown")]
)
def test_matches_needs_the_whole_interval_inside(gap: list[float], verdict: str) -> None:
    judge = Matches(method="new", other="old", tolerance=0.1)
    assert judge(measured(new=[1 + g for g in gap], old=[1.0] * 3), "loss").verdict == verdict


@pytest.mark.parametrize(("high", "verdict"), [(1.3, "shown"), (1.15, "partly"), (0.5, "not_shown")])
def test_within_looks_at_every_seed(high: float, verdict: str) -> None:
    assert Within(arm="new", high=high)(measured(new=[1.0, 1.2, 1.1]), "loss").verdict == verdict


def test_merged_verdicts() -> None:
    assert merge(["shown", "shown"]) == "shown"
    assert merge(["shown", "not_shown"]) == "partly"
    assert merge(["partly"]) == "partly"
    assert merge(["not_shown", "not_shown"]) == "not_shown"
    with pytest.raises(ConfigError, match="at least one claim"):
        merge([])


def test_a_study_without_a_control_is_refused() -> None:
    with pytest.raises(ConfigError, match="no control arm"):
        study(arms=(Arm(name="new", text=""), Arm(name="old", text="", role="reference")))


def test_a_claim_about_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ConfigError, match="looks at arm 'older'; arms are new, old"):
        study(Beats(method="new", control="older"))


def test_names_used_twice_and_missing_claims_are_refused() -> None:
    arm = Arm(name="old", text="", role="control")
    with pytest.raises(ConfigError, match="arm 'old' is declared twice"):
        study(arms=(Arm(name="new", text=""), arm, arm))
    with pytest.raises(ConfigError, match="declares no claim"):
        study(claims=())


def test_a_number_that_was_not_measured_is_named() -> None:
    with pytest.raises(ConfigError, match="arm 'new' did not measure 'accuracy'; it measured loss"):
        measured(new=[1.0]).of("new", "accuracy")


def test_keys_and_budgets() -> None:
    assert study(part="load-free").key == "some_paper_load_free"
    assert [BUDGETS[name].pick(ci=1, micro=2, full=3) for name in ("ci", "micro", "full")] == [1, 2, 3]


def test_what_tells_holds_measured_numbers() -> None:
    claim = Claim(
        key="c", text="t", where="w", claimed="x", metric="loss", judge=Within(arm="new"),
        tells="new {new}, old {old}, time of old {old.seconds}.",
    )  # fmt: skip
    found = Measured({"new": {"loss": {0: 1.0, 1: 2.0}}, "old": {"loss": {0: 3.0}, "seconds": {0: 9.0}}})
    assert claim.explain(found) == "new 1.5, old 3, time of old 9."
    with pytest.raises(ConfigError, match="arm 'ghost' did not measure 'loss'"):
        Claim(
            key="c", text="t", where="w", claimed="x", metric="loss", judge=Within(arm="new"), tells="{ghost}"
        ).explain(found)


RECOVERS = Recovers(method="a", cut="b", whole="c", share=0.25)


def recovered(method: list[float], cut: list[float], whole: list[float]) -> str:
    values = {"a": method, "b": cut, "c": whole}
    return RECOVERS(Measured({n: {"loss": dict(enumerate(v))} for n, v in values.items()}), "loss").verdict


def test_recovery_needs_a_loss_a_gain_and_certainty() -> None:
    cut, whole = [3.0, 3.1, 3.2], [2.0, 2.1, 2.2]
    assert recovered([2.5, 2.6, 2.69], cut, whole) == "shown"
    assert recovered([2.9, 3.0, 3.09], cut, whole) == "partly"  # a tenth
    assert recovered([2.5, 3.6, 2.69], cut, whole) == "not_shown"  # one seed against it
    assert recovered([2.0, 2.1, 2.2], cut, cut) == "not_shown"  # nothing was lost
    assert recovered([2.0, 2.1, 2.2], cut, [3.4, 2.1, 2.9]) == "not_shown"  # nor surely lost
    assert recovered([2.5], [3.0], [2.0]) == "partly"  # one seed shows nothing fully
    assert recovered([2.9], [3.0], [2.0]) == "not_shown"


def test_noise_recovers_nothing() -> None:
    draw = np.random.default_rng(0)
    passed = sum(recovered(*draw.normal(3.0, 0.01, (3, 3)).tolist()) != "not_shown" for _ in range(300))
    assert passed / 300 < 0.03
