"""The bench of studies of the native kernels' speed: ratios by a made-up clock, and matrices of random codes."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moestro.engine import layout as layouts
from moestro.engine.kernels import choose
from moestro.engine.kernels.twin import floats
from moestro.studies import _native as bench
from moestro.studies import finequant_inference, qmoe_inference
from moestro.studies._framework import BUDGETS


def test_ratios_are_times_as_fast_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round is thrown away, every arm begins as often as any other, and medians bear a stray round."""
    now, order, rounds = [0.0], [], itertools.count()
    cost = {"half": 6.0, "fast": 2.0, "slow": 12.0}
    monkeypatch.setattr(bench.time, "process_time", lambda: now[0])

    def call(name: str) -> None:
        turn = next(rounds) // 3
        order.append(name)
        now[0] += cost[name] * (50 if turn == 0 and name == "fast" else 9 if turn == 4 and name == "half" else 1)

    found = bench.ratios({name: lambda name=name: call(name) for name in cost}, 6, "half")
    assert found == {"half": 1.0, "fast": 3.0, "slow": 0.5}
    turns = [order[at : at + 3] for at in range(0, 21, 3)]
    assert all(sorted(turn) == sorted(cost) for turn in turns)
    first = [turn[0] for turn in turns[1:]]
    assert [first.count(name) for name in cost] == [2, 2, 2]


def test_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, cost = [0.0], {"half": itertools.chain([1.0], itertools.repeat(6.0)), "fast": itertools.repeat(2.0)}
    monkeypatch.setattr(bench.time, "process_time", lambda: now[0])

    def call(name: str) -> None:
        now[0] += next(cost[name])

    assert bench.ratios({name: lambda name=name: call(name) for name in cost}, 1, "half") == {"half": 1, "fast": 3}


@pytest.mark.parametrize("name", ["f16", "q8", "q4", "q2", "t1"])
def test_matrices_are_sound_and_as_large_as_their_layout(name: str) -> None:
    matrix = bench.drawn(np.random.default_rng(0), 96, 768, name)
    values = floats(matrix)
    assert values.shape == (96, 768)
    assert np.isfinite(values).all()
    assert 0 < np.abs(values).max() < 1
    bits = 8 * matrix.nbytes / values.size
    if name == "t1":
        assert (values == 0).mean() == pytest.approx(bench.ZEROS, abs=0.01)
        assert len(np.unique(values)) == 3
        assert bits < 1
    else:
        assert matrix.nbytes == layouts.matrix_bytes(name, 96, 768)
        assert values.std() == pytest.approx(768**-0.5, rel=0.1)
        assert bits == {"f16": 16, "q8": 8.25, "q4": 4.25, "q2": 2.375}[name]


def test_decoders_of_each_layout_answer_alike_token_by_token_and_at_once() -> None:
    size = bench.Shape(hidden=64, inner=64, layers=1, vocab=64, experts=4)
    tokens = np.random.default_rng(1).integers(0, 64, 5)
    for names in (("f16",), ("q4",), ("t1",), ("q8", "q2")):
        at_once = bench.decoder(size, names, choose("twin")).step(bench.rows(tokens, 0))
        one = bench.decoder(size, names, choose("twin"))
        for at, token in enumerate(tokens):
            last = one.step(bench.rows([token], at))
        assert at_once.shape == (1, 64)
        np.testing.assert_allclose(last, at_once, rtol=1e-4, atol=1e-4)


def layouts_of(monkeypatch: pytest.MonkeyPatch, study: Any) -> list[dict[str, Any]]:
    """What a study times: for each of its comparisons, what its arms do, on a machine that only keeps the books."""
    seen: list[dict[str, Any]] = []

    def linear(matrix: Any, x: Any) -> None:
        seen[-1].setdefault(matrix.layout, []).append(len(x))

    def decoder(size: Any, names: tuple[str, ...], kernels: Any) -> Any:
        (name,) = names
        return SimpleNamespace(step=lambda batch: seen[-1].setdefault(name, []).append(batch.positions.tolist()))

    def ratios(calls: Any, rounds: int, against: str) -> dict[str, float]:
        seen.append({})
        for call in calls.values():
            call()
        assert against == "half"
        return {arm: 2.0 * place + 10 * len(seen) for place, arm in enumerate(calls)}

    monkeypatch.setattr(study, "native", lambda: SimpleNamespace(linear=linear))
    monkeypatch.setattr(study, "decoder", decoder)
    monkeypatch.setattr(study, "ratios", ratios)
    study.speeds.cache_clear()
    return seen


def test_what_finequant_times(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = layouts_of(monkeypatch, finequant_inference)
    found = [finequant_inference.run(arm, 0, BUDGETS["ci"]) for arm in ("half", "eight_bits", "four_bits")]
    finequant_inference.speeds.cache_clear()
    assert found == [{"times": 10 + two, "prompt": 20 + two} for two in (0, 2, 4)]
    few, many = seen
    assert few == {name: [[0], [1]] for name in ("f16", "q8", "q4")}
    assert many == {name: [list(range(64))] for name in ("f16", "q8", "q4")}


class Thrice:
    """The shortest budget, with three matrices in turn."""

    def pick(self, *, ci: Any, micro: Any, full: Any) -> Any:
        return 3 if (ci, full) == (1, 12) else ci


def test_what_qmoe_times(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = layouts_of(monkeypatch, qmoe_inference)
    arms = ("half", "ternary", "four_bits", "two_bits")
    budget: Any = Thrice()
    found = {arm: qmoe_inference.run(arm, 0, budget) for arm in arms}
    qmoe_inference.speeds.cache_clear()
    one, many, whole = seen
    assert one == {name: [1] * 3 for name in ("f16", "t1", "q4", "q2")}
    assert many == {name: [32] * 3 for name in ("f16", "t1", "q4", "q2")}
    assert whole == {name: [[0], [1]] for name in ("f16", "t1", "q4", "q2")}
    assert [found["ternary"][name] for name in ("times", "times_32", "whole")] == [12, 22, 32]
    assert found["ternary"]["over_four_bits"] == 14 / 12  # four bits are 14 times as fast as 16, ternary is 12 times
    assert [found[arm]["bits"] for arm in ("half", "four_bits", "two_bits")] == [16, 4.25, 2.375]
    assert found["ternary"]["bits"] < 1
