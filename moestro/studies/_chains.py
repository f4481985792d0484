"""Chains of sums with visible steps, a mixture that learns them half, and texts that several passes write together."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.core.decoding import Route
from moestro.core.session import session
from moestro.data.dataset import Dataset
from moestro.engine.reference import ReferenceForward
from moestro.studies._framework import BUDGETS, Budget
from moestro.studies._mixture import Mixture, fresh, tune


SIGNS = "0123456789+-= ."
PAD = len(SIGNS)
STOP = SIGNS.index(".")
MOST = 49
LOOK, EVERY, HALF = 100, 25, 0.55  # problems of a look in training, steps between looks, accuracy that ends it
SMALL = {"layers": 1, "dim": 64, "inner": 128, "heads": 2}
Combine = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Problems:
    """Chains of sums: what is asked, as far as "=", and the steps that answer it."""

    asked: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, ...], ...]


def problem(rng: np.random.Generator, terms: int) -> tuple[str, str]:
    """("12+7-5=", "19 14."): a number below 50 and up to ``terms`` - 1 of one digit; partial sums are from 0 to 49."""
    total = int(rng.integers(0, MOST + 1))
    asked, steps = str(total), []
    for _ in range(int(rng.integers(1, terms))):
        plus = bool(rng.integers(2)) if 0 < total < MOST else total == 0
        number = int(rng.integers(1, min(MOST - total if plus else total, 9) + 1))
        total += number if plus else -number
        asked += f"{'+' if plus else '-'}{number}"
        steps.append(str(total))
    return asked + "=", " ".join(steps) + "."


def ids(text: str) -> tuple[int, ...]:
    """A token each sign."""
    return tuple(SIGNS.index(sign) for sign in text)


@functools.cache
def problems(size: Mixture, seed: int, dev: int, test: int, terms: int) -> tuple[Dataset, Problems, Problems]:
    """(rows to learn from, problems to tune on, problems to test on); no problem is in two of them."""
    rng = np.random.default_rng([7, seed])
    seen: set[str] = set()
    parts = []
    for count in (dev, test):
        drawn: list[tuple[str, str]] = []
        while len(drawn) < count:
            one = problem(rng, terms)
            if one[0] not in seen:
                seen.add(one[0])
                drawn.append(one)
        parts.append(Problems(tuple(ids(a) for a, _ in drawn), tuple(ids(b) for _, b in drawn)))
    rows = []
    for _ in range(size.steps * size.batch):
        row, starts = np.full(size.length, STOP), np.zeros(size.length, dtype=bool)
        at = 0
        while at < size.length:
            one = problem(rng, terms)
            if one[0] in seen:
                continue
            whole = ids("".join(one))[: size.length - at]
            row[at : at + len(whole)], starts[at] = whole, True
            at += len(whole)
        rows.append({"input_ids": row, "starts": starts})
    return Dataset({"data": rows}), parts[0], parts[1]


def size_of(budget: Budget) -> tuple[Mixture, dict[str, int]]:
    """Size of the mixture and of its training, and numbers of problems."""
    shape = {"vocabulary": PAD + 1, "length": 96, "experts": 8, "top_k": 2, "aux": 0.01}
    size: Mixture = budget.pick(
        ci=Mixture(**{**shape, "layers": 2, "dim": 16, "inner": 16, "heads": 2, "batch": 2, "steps": 3, "length": 48}),
        micro=Mixture(**{**shape, "layers": 2, "dim": 64, "inner": 128, "batch": 16, "steps": 100}),
        full=Mixture(**{**shape, "layers": 3, "dim": 128, "inner": 256, "batch": 16, "steps": 900, "lr": 2e-3}),
    )
    return size, budget.pick(
        ci={"dev": 4, "test": 6, "terms": 3},
        micro={"dev": 40, "test": 80, "terms": 3},
        full={"dev": 300, "test": 1000, "terms": 5},
    )


class _Enough(Exception):
    """Training may end."""


@functools.cache
def learned(seed: int, name: str, small: bool = False) -> Any:
    """The mixture of a seed, half way to competence, or the smaller one beside it; made once a process."""
    size, counts = size_of(BUDGETS[name])
    data, dev, _ = problems(size, seed, **counts)
    size = size.model_copy(update=SMALL if small else {})
    model = fresh(size, seed)
    asked = Problems(dev.asked[:LOOK], dev.steps[:LOOK])

    def look(done: int) -> None:
        if done % EVERY == 0 and not small:
            model.eval()
            found = write([Pass(model, None, asked.asked)], only, 1 + max(map(len, asked.steps)))
            if right(found, asked).mean() >= HALF:
                raise _Enough

    with contextlib.suppress(_Enough):
        tune(model, data, size, seed, size.steps, after=look)
    return model.eval()


class Pass:
    """One pass over a batch of texts, with keys and values of its own."""

    def __init__(self, model: nn.Module, route: Route | None, prompts: Sequence[Sequence[int]]) -> None:
        from transformers import DynamicCache

        self.model, self.cache = model, DynamicCache()
        self.edits = [] if route is None else [ReferenceForward(model, pages=1).override(route)]
        width = max(map(len, prompts))
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        self.next = torch.tensor([[PAD] * (width - len(p)) + list(p) for p in prompts])

    def logits(self) -> Any:
        """Of the next token, float32 [B, V]."""
        places = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -self.next.shape[1] :]
        with torch.inference_mode(), session(edits=self.edits):
            found = self.model(
                input_ids=self.next, attention_mask=self.mask, position_ids=places, past_key_values=self.cache,
                use_cache=True,
            ).logits[:, -1]  # fmt: skip
        return found.float().numpy()

    def push(self, tokens: Tensor) -> None:
        """The next token of every text, int64 [B]."""
        self.next = tokens[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.next)], dim=-1)


def write(passes: Sequence[Pass], combine: Combine, most: int, rng: np.random.Generator | None = None) -> list[Any]:
    """The texts that follow, greedy, or drawn from softmax with ``rng``: tuples as far as the stop."""
    rows: list[list[int]] = [[] for _ in range(len(passes[0].mask))]
    going = np.ones(len(rows), dtype=bool)
    for _ in range(most):
        logits = combine([one.logits() for one in passes])
        if rng is not None:
            logits = logits + rng.gumbel(size=logits.shape)
        tokens = logits.argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            if going[row]:
                rows[row].append(token)
        going &= tokens != STOP
        if not going.any():
            break
        for one in passes:
            one.push(torch.from_numpy(tokens))
    return [tuple(row) for row in rows]


def only(logits: Sequence[Any]) -> Any:
    """The only pass."""
    return logits[0]


def right(found: Sequence[Any], asked: Problems) -> np.ndarray:
    """Whether the last number is right, by problem; the steps before it may be wrong."""
    return np.array([last_number(a) == last_number(b) for a, b in zip(found, asked.steps, strict=True)])


def last_number(text: Sequence[int]) -> str | None:
    """The number before the stop; None without one."""
    if not text or text[-1] != STOP:
        return None
    return "".join(SIGNS[i] if i < PAD else "?" for i in text[:-1]).rsplit(" ", 1)[-1]
