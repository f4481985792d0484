"""Choices against their definitions, and text that keeps stop strings to itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.engine.sampler import LogitsError, Sampler, Sampling
from moestro.engine.text import TextStream
from tests.engine.running import Answer, run, words
from tests.engine.stub import StubForward


def logits_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32) * 2


def frequencies(logits: np.ndarray, draws: int, **settings: object) -> np.ndarray:
    sampler = Sampler(Sampling(seed=5, **settings))  # type: ignore[arg-type]
    return np.bincount([sampler.choose(logits).token for _ in range(draws)], minlength=len(logits)) / draws


def test_greedy_takes_the_first_of_equals() -> None:
    logits = np.array([1, 3, 3, 2], dtype=np.float32)
    assert Sampler(Sampling(temperature=0)).choose(logits).token == 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = logits_of(12)
    wanted = np.exp(logits / temperature - (logits / temperature).max())
    got = frequencies(logits, 20000, temperature=temperature)
    assert np.abs(got - wanted / wanted.sum()).max() < 0.015


@pytest.mark.parametrize("size", [9, 3000])
@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.5), (0, 0.999), (5, 0.6), (10**6, 0.9)])
def test_truncation_keeps_the_fewest_that_reach_the_share(size: int, top_k: int, top_p: float) -> None:
    logits = logits_of(size, seed=3)
    order = np.argsort(-logits, kind="stable")[: top_k or size]
    weights = np.exp(logits[order].astype(np.float64) - float(logits.max()))
    allowed = order[: int(np.searchsorted(np.cumsum(weights), top_p * weights.sum())) + 1]
    got = frequencies(logits, 4000, top_k=top_k, top_p=top_p)
    assert set(np.nonzero(got)[0]) <= set(allowed.tolist())
    kept = np.exp(logits[allowed].astype(np.float64))
    assert np.abs(got[allowed] - kept / kept.sum()).max() < 0.04


def test_extreme_settings_stay_finite() -> None:
    logits = np.array([1e30, -1e30, 3e38, -np.inf], dtype=np.float32)
    for temperature in (1e-300, 1e-6, 1e6, 1e300):
        assert Sampler(Sampling(temperature=temperature, seed=1)).choose(logits).token in (0, 1, 2)
    assert Sampler(Sampling(temperature=1e-12, top_p=1e-9, seed=1)).choose(logits_of(2000)).token == int(
        logits_of(2000).argmax()
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_logits_are_an_error(bad: float) -> None:
    logits = logits_of(5)
    logits[2] = bad
    with pytest.raises(LogitsError):
        Sampler(Sampling()).choose(logits)


def test_a_request_that_closes_every_token_is_an_error() -> None:
    sampler = Sampler(Sampling(temperature=0, min_tokens=1), ends=frozenset(range(3)))
    with pytest.raises(LogitsError, match="no token"):
        sampler.choose(np.zeros(3, dtype=np.float32))


def test_log_probabilities_are_of_the_raw_distribution() -> None:
    logits = logits_of(40)
    choice = Sampler(Sampling(temperature=0, logprobs=3, bias={7: 100.0})).choose(logits)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert choice.token == 7
    assert choice.logprob == pytest.approx(exact[7], abs=1e-9)
    assert [token for token, _ in choice.top] == np.argsort(-logits)[:3].tolist()
    assert choice.top[0][1] == pytest.approx(exact.max(), abs=1e-9)


def test_no_end_before_the_least_number_of_tokens() -> None:
    logits = np.array([9, 1, 0], dtype=np.float32)
    sampler = Sampler(Sampling(temperature=0, min_tokens=2), ends=frozenset([0]))
    assert [sampler.choose(logits).token for _ in range(3)] == [1, 1, 0]


def test_penalties_count_what_was_written() -> None:
    logits = np.array([3.0, 2.5, 2.1], dtype=np.float32)
    sampler = Sampler(Sampling(temperature=0, presence=0.4, frequency=0.3))
    assert [sampler.choose(logits).token for _ in range(4)] == [0, 1, 0, 2]


def test_a_seed_fixes_the_text_and_none_does_not() -> None:
    def texts(**settings: object) -> list[list[int]]:
        from moestro.engine.scheduler import Scheduler

        return run(Scheduler(StubForward()), *(Answer([3], 20, temperature=1.5, **settings) for _ in range(2)))  # type: ignore[arg-type]

    first, second = texts(seed=11)
    assert first == second
    assert texts()[0] != texts()[1]


@given(st.lists(st.integers(0, 49), max_size=20), st.lists(st.text("abc0123", min_size=1, max_size=4), max_size=3))
def test_stop_strings_end_the_text_wherever_tokens_cut_them(ids: list[int], stops: list[str]) -> None:
    stream = TextStream(words, stops)
    shown = ""
    for token in ids:
        shown += stream.push(token)
        if stream.stopped:
            break
    shown += stream.end()
    whole = words(ids)
    cuts = [at for stop in stops if (at := whole.find(stop)) >= 0]
    if not cuts:
        assert shown == whole
        assert not stream.stopped
        return
    # Text is shown as soon as it can no longer be part of a stop string: the stop that ends first decides.
    ends = min(whole.find(stop) + len(stop) for stop in stops if stop in whole)
    seen = whole[: -(-ends // 2) * 2]
    assert stream.stopped
    first = min(at for at in map(seen.find, stops) if at >= 0)
    assert shown == seen[:first]


def test_half_characters_wait_for_their_other_half() -> None:
    stream = TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    shown = [stream.push(byte) for byte in "aé€😀b".encode()]
    assert shown == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]
    cut = TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    assert [cut.push("é".encode()[0]), cut.end()] == ["", "\ufffd"]


def test_a_stop_across_tokens_ends_a_request() -> None:
    from moestro.engine.scheduler import Scheduler

    free = Answer([7], 20)
    run(Scheduler(StubForward()), free)
    stop = free.text[5:8]  # the second half of one token and all of the next
    stopped = Answer([7], 20, stops=["zzz", stop])
    run(Scheduler(StubForward()), stopped)
    assert stopped.finish == "stop"
    assert stopped.text == free.text[: free.text.find(stop)]
