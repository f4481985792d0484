"""Reading ahead by the next layer's gate."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.core.registry import method
from moestro.engine.store import ExpertStore
from tests.engine.models import build
from tests.engine.slab_files import policy
from tests.engine.test_forward import forward, prompt, rows
from tests.engine.test_forward_store import on_disk, session
from tests.engine.test_kernels import every_isa, same_bits
from tests.engine.test_peek import still


USE = method("serve.next_gate")
likely = USE.module.likely


def made(**config: Any) -> Any:
    return USE.entry("forecast")(USE.configure(config))


def plain(ranked: np.ndarray, count: int, least: float) -> list[int]:
    """The formula, expert by expert."""
    spared = np.ones(ranked.shape[1])
    for row in ranked.astype(np.float64):
        share = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        for expert in sorted(range(len(row)), key=lambda e: -row[e])[:count]:
            if share[expert] >= least:
                spared[expert] *= 1 - share[expert]
    return [e for e in sorted(range(ranked.shape[1]), key=lambda e: spared[e]) if spared[e] < 1]


@pytest.mark.parametrize("least", [0.0, 0.1])
@pytest.mark.parametrize("count", [1, 3, 8, 20])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_most_probable_come_first(batch: int, count: int, least: float) -> None:
    ranked = np.random.default_rng(batch).normal(size=(batch, 8)).astype(np.float32) * 2
    assert likely(ranked, count, least) == plain(ranked, count, least)


def test_closed_experts_are_never_wished_for() -> None:
    ranked = np.full((2, 6), -np.inf, np.float32)
    ranked[0, [1, 4]], ranked[1, [2, 4]] = [3.0, 1.0], [1.0, 2.0]
    assert likely(ranked, 4, 0.0) == likely(ranked, 6, 0.0) == [1, 4, 2]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_gates_that_are_sure_still_wish_for_all_and_in_order(batch: int) -> None:
    """Chances of 1e-9 to 1e-35, which one minus them would lose, and rows that leave no doubt about the first."""
    ranked = np.tile(np.array([-60.0, 0.0, -20.0, -80.0, 40.0, -30.0], np.float32), (batch, 1))
    assert likely(ranked, 5, 0.0) == [4, 1, 2, 5, 0]
    assert likely(ranked, 6, 0.0) == [4, 1, 2, 5, 0, 3]
    assert likely(ranked, 6, 1e-20) == [4, 1]


def test_a_multiple_of_what_a_row_chooses_is_rounded_up_only_where_it_is_no_whole_number() -> None:
    one = made(factor=1.1)
    one.meet((64, 64))
    scores = np.arange(64, dtype=np.float32)[None]
    for chosen, wanted in ((10, 11), (11, 13), (20, 22)):
        (wish,) = one.routed(0, np.zeros((1, chosen), np.int32), lambda later: scores)
        assert len(wish.experts) == wanted


def test_how_far_and_how_many() -> None:
    one = made(ahead=2, factor=1.5)
    one.meet((0, 8, 8, 0, 8))
    ids = np.zeros((1, 3), np.int32)
    scores = np.arange(8, dtype=np.float32)[None]
    wishes = one.routed(1, ids, lambda later: scores * (1 if later == 2 else -1))
    assert [(wish.layer, wish.priority) for wish in wishes] == [(2, 1), (4, 2)]
    assert wishes[0].experts == (7, 6, 5, 4, 3)
    assert wishes[1].experts == (0, 1, 2, 3, 4)
    assert one.routed(4, ids, lambda later: scores) == []
    few = made(least=0.2)
    few.meet((8, 8))
    assert few.routed(0, ids, lambda later: scores)[0].experts == (7, 6)


@pytest.mark.parametrize("count", [1, 5])
def test_blocks_that_add_nothing_are_foreseen_exactly(count: int, tmp_path: Path) -> None:
    """A hand-made model: every layer sees the same input, so the next gate is right about every expert."""
    packed = still(build(layers=4, experts=8))
    folder = on_disk(packed, tmp_path)
    forecast = made()
    wished: dict[int, set[int]] = {}
    routed = forecast.routed

    def spy(layer: int, ids: np.ndarray, peek: Any) -> Any:
        found = routed(layer, ids, peek)
        wished.update({wish.layer: set(wish.experts) for wish in found})
        return found

    forecast.routed = spy
    needed: dict[int, set[int]] = {}
    with ExpertStore(folder, 32 * folder.experts[0].stride, policy("lru")) as store:
        one = forward(packed, kernels=every_isa()[0], store=store, forecast=forecast)
        one.on_route = lambda layer, ids, weights: needed.__setitem__(layer, set(ids.ravel().tolist()))
        one.step(rows(prompt(count)))
        first = needed.pop(0)
        assert wished == needed
        counted = store.counters
        assert counted.misses - counted.joined <= len(first) + sum(map(len, needed.values()))
        assert counted.bytes == (len(first) + sum(map(len, needed.values()))) * folder.experts[0].stride
        assert counted.wasted == 0


@pytest.mark.parametrize("config", [{}, {"ahead": 3, "factor": 2.0}, {"least": 0.3}])
def test_outputs_keep_their_bits(config: dict[str, Any], tmp_path: Path) -> None:
    packed, tokens, kernels = build(layers=3, experts=8), prompt(36), every_isa()[0]
    folder = on_disk(packed, tmp_path)
    expected = session(forward(packed, kernels=kernels), tokens)
    for slots in (2, 6, 12):
        with ExpertStore(folder, slots * folder.experts[0].stride, policy("lru")) as store:
            one = forward(packed, kernels=kernels, store=store, forecast=made(**config), threads=2)
            assert same_bits(expected, session(one, tokens))
            assert store.cache.used <= store.cache.budget


def test_a_call_takes_microseconds() -> None:
    one = made(ahead=1)
    one.meet((64,) * 12)
    ids = np.zeros((1, 8), np.int32)
    scores = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
    best = min(_seconds(lambda: one.routed(3, ids, lambda later: scores)) for _ in range(50))
    assert best < 500e-6


def _seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
