"""A small language model on the standard library's text: the bench most studies measure on.

Everything is deterministic given a seed: data order, initial weights, training.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.core.config import Config
from moestro.core.context import open_stack
from moestro.core.session import session
from moestro.data.dataset import DataConfig, Dataset, build_dataset, load_tokenizer
from moestro.training.objectives import Batch, Causal, Objective
from moestro.training.optimizer import make_optimizer, set_lr
from moestro.training.recipe import OptimizerConfig
from moestro.training.schedule import ScheduleConfig
from moestro.training.step import Stepper
from moestro.training.validate import heldout_loss


class Scale(Config):
    """Size of the model and of a run.

    Attributes:
        layers, dim, inner, heads: of a Llama model. vocabulary, length, batch: BPE size, tokens a row, rows a step.
        steps: optimiser steps. lr: peak. heldout: rows of the held-out loss.
    """

    layers: int = 4
    dim: int = 128
    inner: int = 512
    heads: int = 4
    vocabulary: int = 2048
    length: int = 128
    batch: int = 8
    steps: int = 300
    lr: float = 2e-3
    heldout: int = 64


@dataclass(frozen=True)
class Text:
    """Packed rows of the standard library's source files, split by file; held-out rows come from all over."""

    train: Dataset
    heldout: Dataset


@functools.cache
def text(vocabulary: int, length: int, rows: int, limit: int | None = None) -> Text:
    """The corpus cut into rows, tokenised by a BPE learned from its training part; read once a process.

    Args:
        rows: held-out rows, taken at even distances, so that they stand for many files.
        limit: at most this many files, for short budgets.
    """

    def part(split: str) -> DataConfig:
        source = {"source": "builtin:stdlib-code", "split": split, "limit": limit}
        return DataConfig.parse({**source, "tokenizer": f"bpe:{vocabulary}", "sequence_length": length})

    tokenizer = load_tokenizer(part("train"))
    train, heldout = (build_dataset(part(split), tokenizer, "packed") for split in ("train", "heldout"))
    return Text(train, spread(heldout, rows))


def spread(data: Dataset, rows: int) -> Dataset:
    """So many rows (all, if there are fewer) at even distances, the first and the last among them."""
    (every,) = data.sources.values()
    places = np.linspace(0, len(every) - 1, min(rows, len(every))).astype(int)
    return Dataset({"data": [every[int(place)] for place in places]})


def llama(scale: Scale, seed: int, *, watch: bool = True) -> Any:
    """A Llama model with random weights; with ``watch`` its forwards open a routing context."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=scale.vocabulary,
        hidden_size=scale.dim,
        intermediate_size=scale.inner,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.heads,
        max_position_embeddings=scale.length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if watch:
        open_stack(model.model, "model")
    return model


def batches(data: Dataset, scale: Scale, seed: int) -> Callable[[int], Batch]:
    """Batch of a step: rows in an order fixed by the seed, none twice before all were seen."""
    (rows,) = data.sources.values()
    order = np.random.default_rng(seed).permutation(len(rows))
    objective = Causal()

    def batch(step: int) -> Batch:
        places = [order[(step * scale.batch + row) % len(order)] for row in range(scale.batch)]
        return objective.collate([rows[int(place)] for place in places], [])

    return batch


def train(
    model: nn.Module,
    data: Dataset,
    scale: Scale,
    seed: int,
    *,
    steps: int | None = None,
    first: int = 0,
    losses: Mapping[str, float] | None = None,
    weight_decay: float = 0.1,
    warmup: int | None = None,
    objective: Objective | None = None,
    teachers: Mapping[str, nn.Module] | None = None,
    values: Callable[[int], Mapping[str, float]] | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """Train in place with AdamW and a cosine schedule.

    Args:
        steps: instead of the scale's. first: place in the data to start at, in steps. losses: weight of each router
            loss. warmup: steps until the peak, a tenth of the run when None.
        objective: another than the causal one, whose losses weigh 1 too. teachers: its frozen models.
        values: of a step, from 0, for methods that read them. after: called with the number of steps done.
    """
    total = scale.steps if steps is None else steps
    optimizer = make_optimizer(model, OptimizerConfig(lr=scale.lr, weight_decay=weight_decay))
    stepper = Stepper(model, objective or Causal(), optimizer, dict(teachers or {}))
    schedule = ScheduleConfig(kind="cosine", warmup=max(1, total // 10) if warmup is None else warmup)
    batch = batches(data, scale, seed)
    for step in range(total):
        model.train()
        set_lr(optimizer, schedule.factor(step, total))
        told = {} if values is None else values(step)
        stepper.run(step, [batch(first + step)], weights={"causal": 1.0, **(losses or {})}, values=told)
        if after is not None:
            after(step + 1)


def heldout(model: nn.Module, data: Dataset, scale: Scale) -> float:
    """Mean held-out loss in nats a token."""
    found = heldout_loss(model, Causal(), data, limit=scale.heldout, rows=scale.batch)
    return found["causal"]


def updates_until(
    model: nn.Module, goal: float, data: Text, scale: Scale, seed: int, *, first: int, most: int
) -> tuple[int, float]:
    """Train in place until a held-out loss is reached. Returns the updates that took, at most ``most``, and the loss.

    It is looked at before the first update and four times after; the learning rate is constant.

    Args:
        first: place in the data to start at, in steps.
    """
    stepper = Stepper(model, Causal(), make_optimizer(model, OptimizerConfig(lr=scale.lr)))
    batch = batches(data.train, scale, seed)
    every, done = -(-most // 4), 0
    loss = heldout(model, data.heldout, scale)
    while loss > goal and done < most:
        model.train()
        for step in range(done, min(most, done + every)):
            stepper.run(step, [batch(first + step)], weights={"causal": 1.0})
        done = min(most, done + every)
        loss = heldout(model, data.heldout, scale)
    return done, loss


def loads(model: nn.Module, data: Dataset, scale: Scale) -> dict[str, Tensor]:
    """Assignments of held-out tokens to each expert, int64 [C] by site."""
    (rows,) = data.sources.values()
    objective = Causal()
    total: dict[str, Tensor] = {}
    model.eval()
    count = min(scale.heldout, len(rows))
    for at in range(0, count, scale.batch):
        examples = [rows[i] for i in range(at, min(at + scale.batch, count))]
        with torch.no_grad(), session(collect=True) as opened:
            objective(model, objective.collate(examples, []), {})
        for ctx in opened.take():
            for site, routing in ctx.routings.items():
                assert routing is not None
                assert ctx.tokens is not None
                counts_C = routing.counts_C(ctx.tokens.valid_T)
                total[site] = total[site] + counts_C if site in total else counts_C
    return total


def worst_load(load: Mapping[str, Tensor]) -> float:
    """Largest load over mean load, averaged over layers; 1 is perfect balance, E / k total collapse."""
    return float(np.mean([float(counts.max() / counts.double().mean()) for counts in load.values()]))
