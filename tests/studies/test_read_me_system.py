"""The parts of the study of Read-ME's serving side: the stream before the cache, what is known, and batches."""

import numpy as np
import pytest

from moestro.core.batching import Pending
from moestro.studies._serving import EXPERT_S, FIXED_S, TOKEN_S, Request, interleaved, known, serve, take
from moestro.studies.read_me_system import EXPERTS, KEEP, margin, misses, sticky


ARMS = ("fifo", "decode_first", "prefill_first", "expert_aware", "expert_wait")


def requests(*texts: str, prompt: int = 2) -> list[Request]:
    return [Request(np.array([int(one) for one in text], np.int32), prompt) for text in texts]


def test_requests_take_turns_and_the_next_one_follows() -> None:
    many = requests("00", *["0"] * 15, "123")
    found = interleaved(many)
    assert found[:16] == [(one, 0) for one in range(16)]
    assert found[16:] == [(0, 1), (16, 0), (16, 1), (16, 2)]


def test_one_next_token_of_each_request_is_known_and_all_of_a_prompt() -> None:
    pair = requests("0123", "4567")
    order = interleaved(pair)
    assert known(pair, order, 0, prompts=False) == [[(0, 0)], [(0, 4)], *[[]] * 6]
    assert known(pair, order, 0, prompts=True) == [[(0, 0)], [(0, 4)], [(0, 1)], [(0, 5)], *[[]] * 4]
    assert known(pair, order, 3, prompts=False) == [[(0, 5)], [(0, 2)], [], [], []]


def test_a_batch_costs_what_it_reads_and_runs() -> None:
    out = serve("fifo", requests("0012", prompt=3), [0.5], rows=4, max_wait=9)
    assert out.tokens == [3, 1]
    one, two = FIXED_S + 2 * EXPERT_S + 3 * TOKEN_S, FIXED_S + EXPERT_S + TOKEN_S
    assert out.latencies == pytest.approx([one + two])
    assert out.waits == pytest.approx([one])
    assert out.unique == []  # no batch was full


def test_orders_by_hand() -> None:
    three = requests("01", "223", "10", prompt=1)
    for arm, first in (("fifo", [1, 1, 0]), ("expert_aware", [1, 1, 0])):
        assert serve(arm, three, [0.0] * 3, rows=2, max_wait=9).tokens[0] == sum(first)
    # One is written, one waits to be read: in a batch of one row, whoever the order prefers goes.
    two = requests("012", "345", prompt=1)
    finished = {arm: serve(arm, two, [0.0, 0.0], rows=1, max_wait=9).latencies for arm in ARMS}
    assert finished["fifo"] == finished["decode_first"]
    assert all(len(found) == 2 for found in finished.values())


def test_whom_each_order_takes_first() -> None:
    none = np.zeros(3, np.int32)
    reads, writes = Pending(3, False, experts=none), Pending(1, True, experts=none[:1])
    for arm, first_reads, first_writes in (
        ("fifo", [2, 0], [1, 1]),
        ("decode_first", [1, 1], [1, 1]),
        ("prefill_first", [2, 0], [0, 2]),
    ):
        assert take(arm, [reads, writes], 2, 9.0) == first_reads
        assert take(arm, [writes, reads], 2, 9.0) == first_writes


def test_made_up_tokens_keep_their_expert_as_often_as_said() -> None:
    many = [one.experts for one in sticky(0, "full")]
    stays = np.concatenate([one[1:] == one[:-1] for one in many]).mean()
    assert stays == pytest.approx(KEEP + (1 - KEEP) / EXPERTS, abs=0.02)
    share = np.bincount(np.concatenate(many), minlength=EXPERTS) / sum(map(len, many))
    assert share == pytest.approx([1 / EXPERTS] * EXPERTS, abs=0.03)
    assert {(len(one.experts), one.prompt) for one in sticky(0, "full")} == {(96, 64)}


@pytest.mark.parametrize("arm", ARMS)
def test_every_token_runs_once(arm: str) -> None:
    many = sticky(3, "ci")
    draw = np.random.default_rng(0)
    arrivals = np.cumsum(draw.exponential(2e-3, len(many))).tolist()
    for times in ([0.0] * len(many), arrivals):
        out = serve(arm, many, times, rows=8, max_wait=5e-3)
        assert sum(out.tokens) == sum(len(one.experts) for one in many)
        assert max(out.tokens) <= 8
        assert len(out.latencies) == len(many)
        if arm == "expert_wait":
            assert out.beyond == 0


def test_what_is_known_is_between_recency_and_the_bound() -> None:
    many = sticky(5, "ci")
    for size in (2, 4):
        belady, queue, lru = (misses(arm, many, size, 0)[0] for arm in ("belady", "queue", "lru"))
        assert belady <= queue < lru
    assert margin(0, "ci") >= 0
