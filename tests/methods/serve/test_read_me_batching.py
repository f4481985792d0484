"""Batches by expert: the published choice by hand, prompts in order, everything runs once, waiting is bounded."""

import itertools
import math
import random

import numpy as np
import pytest

from moestro.core.batching import Pending
from moestro.core.errors import ConfigError
from moestro.core.registry import method


METHOD = method("serve.read_me_batching")
by_expert = METHOD.module.by_expert


def queues(*texts: str) -> list[np.ndarray]:
    """One sequence each, its experts as digits."""
    return [np.array([int(one) for one in text], np.int32) for text in texts]


def test_one_token_each_is_the_published_rule() -> None:
    assert by_expert(queues("1", "0", "1", "2", "1", "0"), 3) == [1, 0, 1, 0, 1, 0]  # the longest queue fits
    assert by_expert(queues("1", "0", "1", "2", "1", "0"), 4) == [1, 1, 1, 0, 1, 0]  # a part of the second
    assert by_expert(queues("1", "0", "1", "2", "1", "0"), 2) == [1, 0, 1, 0, 0, 0]  # a part of the first
    assert by_expert(queues("1", "0"), 1) == [0, 1]  # equal queues: the lower id
    assert by_expert(queues("1", "0"), 9) == [1, 1]


def test_a_prompt_runs_as_far_as_the_chosen_experts_serve_it() -> None:
    assert by_expert(queues("0001", "11"), 3) == [3, 0]
    assert by_expert(queues("0001", "11"), 6) == [4, 2]
    # Tokens are counted, not sequences.
    assert by_expert(queues("111", "0", "0"), 2) == [2, 0, 0]
    # Expert 0 has four tokens, but three stand behind one of expert 1: two of expert 1 can run, one of expert 0.
    assert by_expert(queues("1000", "1", "0"), 2) == [1, 1, 0]
    # With 1 chosen, 0 serves the rest of the first and the third.
    assert by_expert(queues("1000", "1", "0"), 6) == [4, 1, 1]


def test_greedy_finds_the_fewest_experts_where_it_can_be_tried() -> None:
    draw = random.Random(0)
    for _ in range(200):
        each = queues(*(str(draw.randrange(4)) for _ in range(8)))
        rows = draw.randrange(1, 8)
        taken = by_expert(each, rows)
        assert sum(taken) == rows
        used = {int(queue[0]) for queue, count in zip(each, taken, strict=True) if count}
        fewest = next(
            size
            for size in range(1, 5)
            for chosen in itertools.combinations(range(4), size)
            if sum(int(queue[0]) in chosen for queue in each) >= rows
        )
        assert len(used) == fewest


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("max_wait", [None, 0, 5])
def test_every_token_runs_once_and_in_order(rows: int, max_wait: int | None) -> None:
    draw = random.Random(rows)
    for _ in range(10):
        texts = [[draw.randrange(5) for _ in range(draw.randrange(1, 20))] for _ in range(draw.randrange(1, 9))]
        done, last, now = [0] * len(texts), [0] * len(texts), 0
        batcher = METHOD.module.ByExpert(max_wait)
        while any(at < len(text) for at, text in zip(done, texts, strict=True)):
            open_ = [index for index, text in enumerate(texts) if done[index] < len(text)]
            pending = [
                Pending(len(texts[i]) - done[i], False, now - last[i], np.array(texts[i][done[i] :], np.int32))
                for i in open_
            ]
            taken = batcher.take(pending, rows)
            assert sum(taken) == min(rows, sum(item.count for item in pending))
            for index, count in zip(open_, taken, strict=True):
                done[index] += count
                last[index] = now if count else last[index]
            now += 1
        assert done == [len(text) for text in texts]


def longest_wait(max_wait: int | None, rows: int, sequences: int, steps: int = 400) -> int:
    """Batches that somebody waited for, when one sequence takes a rare expert and all go on for ever."""
    draw = random.Random(1)
    last, longest = [0] * sequences, 0
    batcher = METHOD.module.ByExpert(max_wait)
    experts = [9, *(draw.randrange(3) for _ in range(sequences - 1))]
    for now in range(1, steps):
        pending = [Pending(1, True, now - last[i], np.array([experts[i]], np.int32)) for i in range(sequences)]
        for index, count in enumerate(batcher.take(pending, rows)):
            if count:
                longest = max(longest, now - last[index])
                last[index] = now
                experts[index] = 9 if index == 0 else draw.randrange(3)
    return max(longest, steps - min(last))


@pytest.mark.parametrize(("rows", "sequences"), [(1, 6), (4, 16), (8, 40)])
def test_max_wait_bounds_waiting_and_without_it_rare_experts_starve(rows: int, sequences: int) -> None:
    for max_wait in (0, 3, 12):
        assert longest_wait(max_wait, rows, sequences) <= max_wait + math.ceil(sequences / rows)
    assert longest_wait(None, rows, sequences) == 400


def test_whoever_waited_longest_goes_first() -> None:
    batcher = METHOD.module.ByExpert(1.0)
    waited = [0.0, 3.0, 2.0, 0.5]
    pending = [Pending(2, False, wait, np.array([0, 0], np.int32) + i) for i, wait in enumerate(waited)]
    assert batcher.take(pending, 1) == [0, 1, 0, 0]
    assert batcher.take(pending, 2) == [0, 1, 1, 0]
    assert batcher.take(pending, 5) == [1, 2, 2, 0]
    exactly = [Pending(1, False, wait, np.array([number], np.int32)) for number, wait in enumerate((0.9, 1.0))]
    assert batcher.take(exactly, 1) == [0, 1]


def test_negative_waits_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_wait"):
        METHOD.configure({"max_wait": -1})
