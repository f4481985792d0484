"""Requests and their answers in tests of the scheduler."""

from collections.abc import Sequence
from typing import Any

from moestro.core.decoding import PLAIN, Decoder
from moestro.engine.requests import Piece, Request
from moestro.engine.sampler import Sampling
from moestro.engine.scheduler import Scheduler
from moestro.engine.text import TextStream


def words(ids: list[int]) -> str:
    """Text of token ids: ``a1 b2 ...``-like words of two letters, so that stop strings can be cut by tokens."""
    return "".join(chr(97 + i // 10 % 26) + chr(48 + i % 10) for i in ids)


class Answer:
    """A request, and what it was told."""

    def __init__(
        self,
        prompt: Sequence[int],
        max_tokens: int = 8,
        *,
        stops: Sequence[str] = (),
        decoder: Decoder = PLAIN,
        ends: frozenset[int] = frozenset(),
        after: "Answer | None" = None,
        **sampling: Any,
    ) -> None:
        self.pieces: list[Piece] = []
        self.request = Request(
            list(prompt),
            max_tokens,
            Sampling(**{"temperature": 0.0, **sampling}),
            TextStream(words, stops),
            self.pieces.append,
            ends,
            decoder,
            None if after is None else after.request,
        )

    @property
    def tokens(self) -> list[int]:
        return self.request.tokens[len(self.request.prompt) :]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self) -> str | None:
        return self.pieces[-1].finish if self.pieces else None

    @property
    def error(self) -> Exception | None:
        return self.pieces[-1].error if self.pieces else None


def run(scheduler: Scheduler, *answers: Answer) -> list[list[int]]:
    """Submit all, run to the end, and look for leaks."""
    scheduler.submit(*(answer.request for answer in answers))
    while scheduler.step():
        pass
    check_empty(scheduler)
    return [answer.tokens for answer in answers]


def check_empty(scheduler: Scheduler) -> None:
    """No page is held, promised or lost, and nothing runs."""
    assert scheduler.running == []
    assert list(scheduler.waiting) == []
    assert scheduler.pages.used == 0
    assert scheduler.pages.room == scheduler.pages.count
