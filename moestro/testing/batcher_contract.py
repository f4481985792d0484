"""Checks of policies that batch: each chooses among made-up sequences until all have run."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moestro.core.batching import Pending
from moestro.core.registry import Method
from moestro.testing.contracts import example_config
from moestro.testing.contracts import settings_round_trip as settings_round_trip


EXPERTS = 5


def fresh(method: Method) -> Any:
    """A batcher by the example settings."""
    return method.entry("policy")(example_config(method))


def waiting(seed: int, *, known: bool = True) -> list[Pending]:
    """A few sequences, some with a prompt; the same for a seed."""
    draw = np.random.Generator(np.random.PCG64(seed))
    found = []
    for _ in range(int(draw.integers(1, 9))):
        count = int(draw.integers(1, 30)) if draw.random() < 0.5 else 1
        experts = draw.integers(0, EXPERTS, count).astype(np.int32) if known else None
        found.append(Pending(count, count == 1, float(draw.random()), experts))
    return found


def after(pending: Sequence[Pending], taken: Sequence[int]) -> list[Pending]:
    """What waits after a batch."""
    return [
        Pending(
            item.count - count,
            item.writing,
            0.0 if count else item.waited + 0.1,
            None if item.experts is None else item.experts[count:],
        )
        for item, count in zip(pending, taken, strict=True)
        if item.count > count
    ]


def cases() -> Iterator[tuple[list[Pending], int]]:
    """Sequences and rows."""
    for seed in range(30):
        yield waiting(seed, known=seed % 7 > 0), (1, 2, 7, 64, 1000)[seed % 5]


def takes_what_is_there(method: Method) -> None:
    """See the contract."""
    for pending, rows in cases():
        taken = fresh(method).take(pending, rows)
        assert len(taken) == len(pending), f"{len(taken)} numbers for {len(pending)} sequences"
        for count, item in zip(taken, pending, strict=True):
            assert 0 <= count <= item.count, f"{count} tokens of {item.count}"
        assert 1 <= sum(taken) <= rows, f"{sum(taken)} tokens in {rows} rows"


def everything_runs(method: Method) -> None:
    """See the contract."""
    for pending, rows in cases():
        batcher, total, ran = fresh(method), sum(item.count for item in pending), 0
        for _ in range(total):
            taken = batcher.take(pending, rows)
            ran += sum(taken)
            pending = after(pending, taken)
            if not pending:
                break
        assert ran == total, f"{ran} of {total} tokens ran"


def choices_are_repeatable(method: Method) -> None:
    """See the contract."""
    used = fresh(method)
    for pending, rows in cases():
        assert used.take(pending, rows) == fresh(method).take(pending, rows), "what was chosen before changes a choice"


def it_is_named(method: Method) -> None:
    """See the contract."""
    assert fresh(method).name == method.id, f"{method.id} calls itself {fresh(method).name}"
