"""Serving requests whose tokens' experts are known ahead: the stream that a cache sees, and batches over a clock."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moestro.core.batching import Pending, in_order
from moestro.core.expert_cache import CachePolicy, Key
from moestro.core.registry import method


Ints = npt.NDArray[np.int32]

SLOTS = 16
"""Requests whose tokens are interleaved before the cache."""

WINDOW = 64
"""Steps of the queue that are looked at."""

FIXED_S, EXPERT_S, TOKEN_S = 3e-4, 1e-4, 1e-5
"""Seconds of a batch: as such, for each expert that it reads, for each token."""


@dataclass(frozen=True)
class Request:
    """A text: experts of its tokens, the first ``prompt`` of which are known when it comes."""

    experts: Ints
    prompt: int


# -- the cache --------------------------------------------------------------------------------------------------------


def interleaved(requests: Sequence[Request]) -> list[tuple[int, int]]:
    """(request, place of its token) in the order of serving: SLOTS at a time in turn, the next one where one ends."""
    open_, waiting, done = list(range(min(SLOTS, len(requests)))), SLOTS, [0] * len(requests)
    found = []
    while open_:
        still = []
        for request in open_:
            found.append((request, done[request]))
            done[request] += 1
            if done[request] < len(requests[request].experts):
                still.append(request)
            elif waiting < len(requests):
                still.append(waiting)
                waiting += 1
        open_ = still
    return found


def known(requests: Sequence[Request], order: list[tuple[int, int]], at: int, *, prompts: bool) -> list[list[Key]]:
    """What is known at a step of those from it on: one next token of each request, and with ``prompts`` all theirs."""
    seen: set[int] = set()
    steps: list[list[Key]] = []
    for request, place in order[at : at + WINDOW]:
        tells = request not in seen or (prompts and place < requests[request].prompt)
        steps.append([(0, int(requests[request].experts[place]))] if tells else [])
        seen.add(request)
    return steps


class Random(CachePolicy):
    """Anybody goes."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def on_access(self, key: Key, time: int) -> None:
        """See CachePolicy."""

    def on_insert(self, key: Key, time: int) -> None:
        """See CachePolicy."""

    def victim(self, candidates: Collection[Key]) -> Key:
        """See CachePolicy."""
        return self.draw.choice(sorted(candidates))


# -- batches ----------------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """What came out of serving requests.

    Attributes:
        unique: experts of each full batch. tokens, experts: of each batch. latencies: seconds from coming to the end.
        waits: the longest that each request waited for some of it to run, in seconds. beyond: batches that ran while a
            request had waited for too long already, the most of all. seconds: until all was done.
    """

    unique: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    beyond: int = 0
    seconds: float = 0.0


def take(arm: str, pending: list[Pending], rows: int, max_wait: float) -> list[int]:
    """Tokens of each request in the next batch."""
    if arm == "fifo":
        return in_order(pending, rows, writing_first=False)
    if arm == "decode_first":
        return in_order(pending, rows)
    if arm == "prefill_first":
        turned = [Pending(item.count, not item.writing) for item in pending]
        return in_order(turned, rows)
    found = method("serve.read_me_batching")
    settings = {"max_wait": max_wait} if arm == "expert_wait" else {}
    taken: list[int] = found.entry("policy")(found.configure(settings)).take(pending, rows)
    return taken


def serve(arm: str, requests: Sequence[Request], arrivals: Sequence[float], rows: int, max_wait: float) -> Served:
    """Play requests; as many run at once as a batch has rows, admitted as they come."""
    out, now, coming = Served(), 0.0, 0
    running: list[int] = []
    done, ran, late = [0] * len(requests), list(arrivals), [0] * len(requests)
    out.waits = [0.0] * len(requests)
    while running or coming < len(requests):
        if not running:
            now = max(now, arrivals[coming])
        while coming < len(requests) and arrivals[coming] <= now and len(running) < rows:
            running.append(coming)
            ran[coming] = now  # waiting for a place is no matter of batches
            coming += 1
        pending = []
        for one in running:
            end = max(requests[one].prompt, done[one] + 1)
            experts = requests[one].experts[done[one] : end]
            pending.append(Pending(len(experts), done[one] >= requests[one].prompt, now - ran[one], experts))
            late[one] += now - ran[one] >= max_wait
        taken = take(arm, pending, rows, max_wait)
        parts = [item.experts[:count] for item, count in zip(pending, taken, strict=True) if item.experts is not None]
        unique, total = len(np.unique(np.concatenate(parts))), sum(taken)
        now += FIXED_S + EXPERT_S * unique + TOKEN_S * total
        out.tokens.append(total)
        out.experts.append(unique)
        if total == rows:
            out.unique.append(unique)
        for one, count in zip(running, taken, strict=True):
            out.waits[one] = max(out.waits[one], now - ran[one])
            if count:
                out.beyond = max(out.beyond, late[one] - 1)
                done[one], ran[one], late[one] = done[one] + count, now, 0
        out.latencies += [now - arrivals[one] for one in running if done[one] == len(requests[one].experts)]
        running = [one for one in running if done[one] < len(requests[one].experts)]
    out.seconds = now
    return out
