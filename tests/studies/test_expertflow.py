"""Parts of the study of ExpertFlow: what must hold on any routing, whatever the study measures."""

from typing import Any

import numpy as np
import pytest

from moestro.core.registry import method
from moestro.methods.serve._parts.route_paths import Paths
from moestro.methods.serve._parts.token_split import touched
from moestro.studies import expertflow as study
from moestro.studies._foreseen import Made, log_odds
from moestro.studies._offload import Gates, Step, Told, columns_of, decoding, keys_of, mean_need, replay
from tests.methods.serve.routes import LAYERS, planted


PATHS = planted(7, sequences=16, length=30)
SLOTS = (2, 4, 7, 12)


def said(paths: Paths, wrong: float = 0.0) -> Any:
    """What is used, with a share of the marks drawn anew."""
    draw = np.random.default_rng(1)
    noise = draw.random(paths.used.shape) < 0.2
    return log_odds(np.where(draw.random(paths.used.shape) < wrong, noise, paths.used).astype(np.float32))


def flown(paths: Paths, logits: Any) -> Any:
    both = study.flow()
    both.predictor = Told(paths, logits)
    return both


def fresh(policy: str) -> Any:
    return method(policy).entry("policy")(method(policy).configure({}))


def steps_of(batch: int) -> list[Step]:
    return decoding(PATHS, batch, 30, 2)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("slots", SLOTS)
def test_hits_and_misses_are_what_was_needed_and_belady_bounds_what_is_read(batch: int, slots: int) -> None:
    steps = steps_of(batch)
    needs = sum(map(len, keys_of(steps)))
    fits = max(map(len, keys_of(steps))) <= slots
    bound = replay(PATHS, steps, fresh("serve.belady"), None, slots)
    assert bound.bytes == bound.misses
    for wrong in (0.0, 0.3, 1.0):
        for speed in (0.25, 1.0, 8.0):
            both = flown(PATHS, said(PATHS, wrong))
            found = replay(PATHS, steps, both, both, slots, speed)
            assert found.hits + found.misses == needs
            assert found.bytes >= bound.misses or not fits
            assert found.bytes >= found.misses - found.joined
    lru = replay(PATHS, steps, fresh("serve.lru"), None, slots)
    assert (lru.hits + lru.misses, lru.bytes) == (needs, lru.misses)


def test_the_truth_with_room_enough_never_waits_once_it_has_begun() -> None:
    both = flown(PATHS, said(PATHS))
    whole = sum(shape.experts for shape in LAYERS)
    warm, rest = steps_of(1)[:30], steps_of(1)[30:]
    first = replay(PATHS, warm + rest, both, both, whole, 100.0)
    assert first.misses <= sum(len(keys) for keys in keys_of(warm))
    assert first.bytes == len({key for keys in keys_of(warm + rest) for key in keys})
    both = flown(PATHS, said(PATHS))
    needs = sum(map(len, keys_of(steps_of(4))))
    few = replay(PATHS, steps_of(4), both, both, 13, 1000.0)
    lru = replay(PATHS, steps_of(4), fresh("serve.lru"), None, 13, 1000.0)
    assert few.misses < 0.05 * needs, "a fast disk and the truth leave next to nothing to wait for"
    assert few.misses < lru.misses


def test_a_better_forecast_hits_more() -> None:
    steps, hits = steps_of(4), []
    for wrong in (0.0, 0.5, 1.0):
        both = flown(PATHS, said(PATHS, wrong))
        hits.append(replay(PATHS, steps, both, both, 9, 2.0).hits)
    assert hits[0] > hits[1] > hits[2]


def test_steps_are_the_tokens_side_by_side() -> None:
    steps = decoding(PATHS, 4, 5, 2)
    assert len(steps) == 10
    assert steps[6].sequences.tolist() == [4, 5, 6, 7]
    assert steps[6].rows.tolist() == [121, 151, 181, 211]
    assert steps[6].positions.tolist() == [1] * 4
    layer, ids, experts = steps[6].needs[0]
    assert layer == 1
    assert sorted(set(ids.ravel().tolist())) == experts == np.flatnonzero(PATHS.used[steps[6].rows, :8].any(0)).tolist()
    assert mean_need(steps) == np.mean([len(experts) for step in steps for _, _, experts in step.needs])


def test_gates_are_asked_for_the_layer_behind() -> None:
    gate = np.arange(PATHS.used.size, dtype=np.float32).reshape(PATHS.used.shape)
    gates = Gates(gate, columns_of(PATHS))
    assert gates(np.array([3, 5]), 3).tolist() == gate[[3, 5], 8:].tolist()
    policy, forecast = study.player("next_gate", bench({"predictor": said(PATHS)}), "in", [])
    truth = Gates(said(PATHS), columns_of(PATHS))
    with_gate = replay(PATHS, steps_of(1), policy, forecast, 6, 50.0, truth)
    without = replay(PATHS, steps_of(1), fresh("serve.lru"), None, 6, 50.0)
    assert with_gate.misses < without.misses


def bench(forecasts: dict[str, Any]) -> Made:
    return Made(None, None, PATHS, {"in": PATHS}, {"in": forecasts}, {"in": said(PATHS)})  # type: ignore[arg-type]


def test_a_cover_is_a_permutation_that_touches_less_than_as_it_came() -> None:
    draw, plain, cover = np.random.default_rng(0), 0, 0
    for _ in range(20):
        paths = draw.random((16, 40)) < 0.1
        order = study.covered(paths)
        assert sorted(order.tolist()) == list(range(16))
        plain, cover = plain + touched(paths, np.arange(16)), cover + touched(paths, order)
    assert cover < plain


@pytest.mark.parametrize("arm", study.SPLITS)
def test_every_split_is_a_permutation(arm: str) -> None:
    order = study.grouped(arm, PATHS.used[:32], 3)
    assert sorted(order.tolist()) == list(range(32))


def test_the_truth_names_all_and_log_odds_keep_the_order() -> None:
    found = study.named("perfect", bench({"perfect": said(PATHS)}))
    assert found["recall_in"] == found["later_in"] == found["joined4_in"] == found["joined4_precision_in"] == 1
    rates = np.linspace(0, 1, 11, dtype=np.float32)
    assert (np.diff(log_odds(rates)) > 0).all()
    assert log_odds(np.array([0.5], np.float32))[0] == 0
