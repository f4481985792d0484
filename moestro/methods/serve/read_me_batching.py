"""Batching by expert: tokens that take the same experts run together, so that a batch reads few of them.

A router of token ids says which expert every waiting token takes. Expert e has the queue of tokens that could run now
if e and the experts already chosen ran: of each sequence the first few that these experts serve, since a token runs
after those before it, or beside them. Greedily, from no experts,

    repeat: take the expert with the longest queue; its tokens run, or the part of them that fits into ``rows``

until ``rows`` tokens run or none is left; equal queues go by the lower id. Where every sequence has one token this is
the published rule. Rare experts starve under it, so whoever has waited ``max_wait`` seconds gives its first token
first, the longest wait before others: with n sequences waiting and B rows a batch, nobody waits for more than
ceil(n / B) batches beyond ``max_wait``. None is the published rule, without a bound.

Source: Read-ME (2410.19123, section 4 and its batching algorithm, where the loop's queue index must be the argmax).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from moestro.core.batching import Batcher, Ints, Pending, in_order
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig


class Config(BaseConfig):
    """Settings.

    Attributes:
        max_wait: seconds after which a sequence goes first; None: never.
    """

    max_wait: float | None = Field(default=None, ge=0)


def reach(experts: Ints, start: int, chosen: set[int]) -> int:
    """Where the first token from ``start`` on stands whose expert is not among the chosen."""
    end = start
    while end < len(experts) and int(experts[end]) in chosen:
        end += 1
    return end


def by_expert(queues: Sequence[Ints], rows: int, first: Sequence[int] = ()) -> list[int]:
    """How many tokens of each sequence run.

    Args:
        queues: experts of each sequence's next tokens, in order, int32 [n]. rows: tokens at most.
        first: sequences whose first token goes before all others.
    """
    taken = [0] * len(queues)
    chosen: set[int] = set()
    for index in first[:rows]:
        taken[index] = 1
        chosen.add(int(queues[index][0]))
    left = rows - sum(taken)
    left = _serve(queues, taken, chosen, left)
    while left:
        length: dict[int, int] = {}
        for index, queue in enumerate(queues):
            if taken[index] < len(queue):
                expert = int(queue[taken[index]])
                gain = reach(queue, taken[index], chosen | {expert}) - taken[index]
                length[expert] = length.get(expert, 0) + gain
        if not length:
            break
        chosen.add(min(length, key=lambda expert: (-length[expert], expert)))
        left = _serve(queues, taken, chosen, left)
    return taken


def _serve(queues: Sequence[Ints], taken: list[int], chosen: set[int], left: int) -> int:
    """Let all run that the chosen experts serve, in order, as far as rows are left; the rows that stay."""
    for index, queue in enumerate(queues):
        more = min(reach(queue, taken[index], chosen) - taken[index], left) if left else 0
        taken[index] += more
        left -= more
    return left


class ByExpert:
    """See Batcher."""

    name = "serve.read_me_batching"
    needs_experts = True

    def __init__(self, max_wait: float | None) -> None:
        self.max_wait = max_wait

    def take(self, pending: Sequence[Pending], rows: int) -> list[int]:
        """See Batcher. Without experts: next tokens, then prompts in order."""
        if any(item.experts is None for item in pending):
            return in_order(pending, rows)
        queues = [np.asarray(item.experts)[: item.count] for item in pending]
        late = [i for i, item in enumerate(pending) if self.max_wait is not None and item.waited >= self.max_wait]
        late.sort(key=lambda index: -pending[index].waited)
        return by_expert(queues, rows, late)


def policy(config: Config, plan: Any = None) -> Batcher:
    """The batcher."""
    return ByExpert(config.max_wait)


CARD = MethodCard(
    title="Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
    year=2024,
    arxiv="2410.19123",
    paper="read-me",
    summary="Tokens of the same experts run together: the expert with the longest queue first.",
    taxonomy="inference/system/batching",
    deviations=(
        "a prompt's tokens run in order: the queue of an expert holds what could run, not all that waits",
        "whoever has waited for max_wait goes first",
    ),
)
