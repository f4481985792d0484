"""The same tokens alone and together, chunked or not, with shared pages or not; faults, cancelling, fairness."""

import random

import pytest

from moestro.core.decoding import Route
from moestro.core.errors import ConfigError
from moestro.engine.requests import BusyError, Limits, Request
from moestro.engine.scheduler import Scheduler
from tests.engine.running import Answer, check_empty, run
from tests.engine.stub import StubForward


def prompts(count: int, longest: int = 70) -> list[list[int]]:
    """Prompts of all lengths, half of them beginning alike."""
    draw = random.Random(1)
    common = [draw.randrange(50) for _ in range(longest)]
    found = []
    for number in range(count):
        own = [draw.randrange(50) for _ in range(draw.randrange(1, longest))]
        cut = draw.randrange(len(common)) if number % 2 else 0
        found.append((common[:cut] + own)[:longest])
    return found


def alone(prompt: list[int], **settings: object) -> list[int]:
    answer = Answer(prompt, 12, **settings)  # type: ignore[arg-type]
    run(Scheduler(StubForward(), share=False), answer)
    return answer.tokens


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
@pytest.mark.parametrize("count", [2, 5, 32])
def test_a_text_does_not_depend_on_who_runs_beside_it(count: int, chunk: int, share: bool) -> None:
    asked = prompts(count)
    scheduler = Scheduler(StubForward(80), Limits(running=min(count, 16), chunk=chunk, mixed=chunk), share=share)
    for _ in range(2):  # the second time from pages that the first left
        answers = [Answer(prompt, 12, seed=n, temperature=n % 2) for n, prompt in enumerate(asked)]
        got = run(scheduler, *answers)
        assert got == [alone(prompt, seed=n, temperature=n % 2) for n, prompt in enumerate(asked)]
    assert (scheduler.pages.hit_tokens > 0) == share


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 48])
def test_a_whole_prompt_from_shared_pages(length: int) -> None:
    prompt = prompts(1, 60)[0] + list(range(48))
    scheduler = Scheduler(StubForward())
    first, second, third = (Answer(prompt[:length], 20) for _ in range(3))
    run(scheduler, first)
    run(scheduler, second, third)  # both at once: neither may write what the other reads
    assert first.tokens == second.tokens == third.tokens == twenty_alone(prompt[:length])
    assert second.request.cached == min(length // 16 * 16, length - 1)


def twenty_alone(prompt: list[int]) -> list[int]:
    answer = Answer(prompt, 20)
    run(Scheduler(StubForward(), share=False), answer)
    return answer.tokens


def test_pages_are_forgotten_under_pressure_and_outputs_stay() -> None:
    scheduler = Scheduler(StubForward(pages=12))
    for number in range(40):
        prompt = [(number * 7 + at) % 50 for at in range(30 + number % 5)]
        answer = Answer(prompt, 12)
        run(scheduler, answer)
        assert answer.tokens == alone(prompt)


def test_choices_after_the_first_wait_for_its_pages() -> None:
    forward = StubForward()
    scheduler = Scheduler(forward)
    prompt = prompts(1)[0][:1] * 40
    first = Answer(prompt, 6)
    others = [Answer(prompt, 6, after=first, temperature=1, seed=n) for n in range(3)]
    run(scheduler, first, *others)
    assert [answer.request.cached for answer in others] == [32, 32, 32]
    assert [answer.tokens for answer in others] == [
        run(Scheduler(StubForward(), share=False), Answer(prompt, 6, temperature=1, seed=n))[0] for n in range(3)
    ]


def test_passes_with_another_routing_share_nothing_with_the_plain_one() -> None:
    class Twice:
        name, exact = "twice", False
        routes = (None, Route(kind="rank", k=2))

        def combine(self, logits):  # type: ignore[no-untyped-def]
            assert logits.shape == (2, 50)
            return logits[1]

    prompt = list(range(40))
    scheduler = Scheduler(StubForward(), Limits(chunk=9))
    plain, weak, again = Answer(prompt), Answer(prompt, decoder=Twice()), Answer(prompt)
    run(scheduler, plain)
    run(scheduler, weak, again)
    assert weak.request.cached == 32
    assert again.tokens == plain.tokens != weak.tokens
    assert run(Scheduler(StubForward(), share=False), Answer(prompt, decoder=Twice())) == [weak.tokens]


def test_the_queue_is_bounded_by_requests_and_by_tokens() -> None:
    scheduler = Scheduler(StubForward(), Limits(waiting=3, waiting_tokens=100))
    for _ in range(3):
        scheduler.submit(Answer([1], 8).request)
    with pytest.raises(BusyError) as caught:
        scheduler.submit(Answer([1], 8).request)
    assert 1 <= caught.value.retry_after <= 60
    while scheduler.step():
        pass
    scheduler.submit(Answer([1] * 60, 20).request)
    with pytest.raises(BusyError):
        scheduler.submit(Answer([1] * 10, 20).request)
    assert scheduler.stats.refused == 2


@pytest.mark.parametrize(
    ("prompt", "max_tokens"), [([], 5), ([50], 5), ([-1], 5), ([1], 0), ([1] * 500, 600), ([1], 10**9)]
)
def test_what_can_never_run_is_refused_at_once(prompt: list[int], max_tokens: int) -> None:
    with pytest.raises(ConfigError):
        Scheduler(StubForward()).submit(Answer(prompt, max_tokens).request)


def test_cancelled_ones_are_gone_before_the_next_step() -> None:
    forward = StubForward()
    scheduler = Scheduler(forward, Limits(running=2))
    answers = [Answer([n, n + 1], 30) for n in range(4)]
    scheduler.submit(*(answer.request for answer in answers))
    for _ in range(3):
        scheduler.step()
    scheduler.cancel(answers[0].request)
    scheduler.cancel(answers[3].request)  # still in the queue
    before = len(forward.steps)
    scheduler.step()
    assert answers[0].finish == answers[3].finish == "cancelled"
    assert len(forward.steps) == before + 1
    assert len(answers[0].tokens) == 3
    assert answers[2].request in scheduler.running
    while scheduler.step():
        pass
    check_empty(scheduler)
    assert answers[1].tokens == run(Scheduler(StubForward()), Answer([1, 2], 30))[0]
    assert len(forward.forgotten) == 3


def test_a_fault_ends_the_guilty_request_only() -> None:
    forward = StubForward()
    forward.broken = {49}
    scheduler = Scheduler(forward)
    good, bad, late = Answer([1, 2, 3], 10, bias={49: -100.0}), Answer([4, 49], 10), Answer([5], 10, bias={49: -100.0})
    run(scheduler, good, bad, late)
    assert isinstance(bad.error, OSError)
    assert good.finish == late.finish == "length"
    forward.broken = set()
    assert run(scheduler, Answer([1, 2, 3], 10, bias={49: -100.0})) == [good.tokens]
    assert scheduler.stats.requests["failed"] == 1


def test_a_long_prompt_does_not_hold_up_short_ones() -> None:
    forward = StubForward(pages=200)
    scheduler = Scheduler(forward, Limits(chunk=32, mixed=16))
    long, short = Answer([1] * 1600, 2), Answer([2, 3], 4)
    scheduler.submit(long.request)
    scheduler.step()
    scheduler.submit(short.request)
    for _ in range(5):
        scheduler.step()
    assert short.finish == "length"
    assert not long.request.writing
    rows = [len(batch.tokens) for batch in forward.steps]
    assert max(rows) <= 32
    while scheduler.step():
        pass
    assert len(long.tokens) == 2


def test_whoever_is_passed_over_comes_up_in_time() -> None:
    now = [0.0]
    # Prefers the same two for ever.
    scheduler = Scheduler(
        StubForward(),
        Limits(width=2, max_wait=5.0),
        order=lambda ready: sorted(ready, key=lambda request: request.prompt[0]),
        clock=lambda: now[0],
    )
    answers = [Answer([n], 50) for n in range(4)]
    scheduler.submit(*(answer.request for answer in answers))
    gaps = dict.fromkeys(range(4), 0)
    last = dict.fromkeys(range(4), (1, 0.0))
    for _ in range(80):
        now[0] += 1.0
        scheduler.step()
        for n, answer in enumerate(answers):
            if len(answer.request.tokens) > last[n][0]:
                gaps[n] = max(gaps[n], round(now[0] - last[n][1]))
                last[n] = (len(answer.request.tokens), now[0])
    assert len(answers[0].tokens) > len(answers[3].tokens) > 8
    assert max(gaps.values()) <= 8


def test_an_order_is_shown_the_longest_waiting_first_and_nobody_is_written_twice() -> None:
    now, shown = [0.0], []
    forward = StubForward()

    def newest(ready: list[Request]) -> list[Request]:
        shown.append([request.served for request in ready])
        assert all(request.served > now[0] - 4.0 for request in ready), "who waited too long is not up for choice"
        return ready[::-1]

    limits = Limits(width=2, max_wait=4.0)
    scheduler = Scheduler(forward, limits, order=newest, clock=lambda: now[0], share=False)
    answers = [Answer([n], 20) for n in range(5)]
    scheduler.submit(*(answer.request for answer in answers))
    while scheduler.step():
        now[0] += 1.0
    assert any(len(set(times)) > 1 for times in shown)
    assert all(times == sorted(times) for times in shown)
    assert all(len(batch.sequences) == len(set(batch.sequences)) for batch in forward.steps)
    assert [answer.tokens for answer in answers] == [
        run(Scheduler(StubForward()), Answer([n], 20))[0] for n in range(5)
    ]


def test_draining_fails_what_waits_and_finishes_what_runs() -> None:
    scheduler = Scheduler(StubForward(), Limits(running=1))
    first, second = Answer([1], 5), Answer([2], 5)
    scheduler.submit(first.request, second.request)
    scheduler.step()
    scheduler.drop_waiting(BusyError("going down", 1))
    while scheduler.step():
        pass
    assert first.finish == "length"
    assert isinstance(second.error, BusyError)
    check_empty(scheduler)
