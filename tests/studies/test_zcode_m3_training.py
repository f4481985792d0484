"""The study of random token selection: equal data for all arms, and where drops are counted."""

from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moestro.studies._framework import BUDGETS
from moestro.studies._names import Characters, names
from moestro.studies.zcode_m3_training import Drops, batches, length, scale


ROWS = 96


def stream(arm: str, steps: int) -> list[list[dict[str, Any]]]:
    size, data = scale(BUDGETS["full"]), names(0)
    assert size.rows == ROWS
    return list(islice(batches(arm, data, size, Characters(data), 0), steps))


def bag(batch: list[dict[str, Any]]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    return {(tuple(row["input_ids"]), tuple(row["target_ids"])) for row in batch}


def test_every_arm_sees_the_same_translations_and_both_controls_are_equal_in_tokens() -> None:
    both, only, double = (stream(arm, 12) for arm in ("rts", "mt_only", "mt_double"))
    for one, two, three in zip(both, only, double, strict=True):
        assert len(one) == 2 * ROWS
        assert len(two) == ROWS
        assert bag(two) <= bag(one) & bag(three)
    assert stream("no_drop", 2) == both[:2], "ways of dropping share their data to the row"
    tokens = [sum(length(row) for batch in arm for row in batch) for arm in (both, only, double)]
    assert 0 <= tokens[2] - tokens[0] < 2 * 20 + 3, "to within one row"
    assert tokens[1] < 0.6 * tokens[0]


def seen(kept: list[bool], valid: list[bool], recorder: Drops, site: str = "a") -> None:
    routing: Any = SimpleNamespace(kept_N=torch.tensor(kept))
    ctx: Any = SimpleNamespace(tokens=SimpleNamespace(valid_T=torch.tensor(valid)))
    recorder.record(site, routing, ctx)


def test_drops_are_ranked_over_places_without_padding() -> None:
    """Rates 0, 0, 1/2, 1 at four places: ranks 1.5, 1.5, 3, 4 against 1 to 4."""
    recorder = Drops()
    seen([True, False, True, False, False], [True, False, True, True, True], recorder)
    seen([True, True, True, False, False], [True] * 5, recorder)
    assert recorder.rank_correlation() == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert recorder.share() == pytest.approx(4 / 9)


def test_without_drops_there_is_no_correlation() -> None:
    recorder = Drops()
    seen([True, True], [True, True], recorder)
    assert recorder.rank_correlation() is None
    seen([True, False], [True, True], recorder, site="b")
    assert recorder.rank_correlation() == pytest.approx(1.0)
