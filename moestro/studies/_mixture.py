"""A small trained mixture on the standard library's text: the bench that compression studies measure on.

Float32, trained inside the job and once a process for each seed; deterministic given its arguments.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.layer import mixture_layers
from moestro.data.dataset import DataConfig, Dataset, build_dataset, load_tokenizer
from moestro.models.swap import swap
from moestro.studies._framework import Budget
from moestro.studies._language import Scale, Text, batches, heldout, spread, text, train
from moestro.training.build import make_model


class Mixture(Scale):
    """Size of the mixture and of its training.

    Attributes:
        inner: width of one expert. experts: E. top_k: K. aux: weight of the balance loss; weak, so that some experts
            are used more than others. files: at most this many of each corpus, for short budgets.
        task: the built-in corpus of ``task_of``.
    """

    layers: int = 3
    dim: int = 96
    inner: int = 96
    heads: int = 4
    vocabulary: int = 1024
    length: int = 96
    batch: int = 8
    steps: int = 450
    lr: float = 3e-3
    heldout: int = 64
    experts: int = 8
    top_k: int = 2
    aux: float = 1e-3
    files: int | None = None
    task: str = "stdlib-docs"


SIZES: Mapping[str, Mapping[str, Any]] = {
    "ci": {"layers": 2, "dim": 16, "inner": 16, "heads": 2, "vocabulary": 300, "length": 24, "batch": 2, "steps": 3,
           "heldout": 4, "files": 4, "task": "german"},
    "micro": {"layers": 2, "dim": 48, "inner": 48, "heads": 2, "length": 64, "steps": 90, "heldout": 24, "files": 80},
    "full": {},
}  # fmt: skip


def size_of(budget: Budget, **shape: Any) -> Mixture:
    """The mixture of a budget, with fields of ``Mixture`` replaced."""
    return Mixture(**{**SIZES[budget.name], **shape})


def corpus_of(size: Mixture) -> Text:
    """The standard library's source files in rows."""
    return text(size.vocabulary, size.length, size.heldout, limit=size.files)


@functools.cache
def task_of(size: Mixture) -> Text:
    """Another corpus in rows, the standard library's documentation, by the tokenizer of its source files."""

    def part(source: str, split: str) -> DataConfig:
        settings = {"source": f"builtin:{source}", "split": split, "limit": size.files}
        return DataConfig.parse({**settings, "tokenizer": f"bpe:{size.vocabulary}", "sequence_length": size.length})

    tokenizer = load_tokenizer(part("stdlib-code", "train"))
    made, held = (build_dataset(part(size.task, split), tokenizer, "packed") for split in ("train", "heldout"))
    return Text(made, spread(held, size.heldout))


def fresh(size: Mixture, seed: int, *, renormalise: bool = True) -> nn.Module:
    """An untrained mixture: OLMoE's architecture with a balance loss for each layer.

    Args:
        renormalise: chosen weights sum to 1; a top-1 router must not, or it has no gradient.
    """
    torch.manual_seed(seed)
    model: nn.Module = make_model(
        {
            "model_type": "olmoe", "vocab_size": size.vocabulary, "hidden_size": size.dim,
            "intermediate_size": size.inner, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads, "max_position_embeddings": size.length, "num_experts": size.experts,
            "num_experts_per_tok": size.top_k, "norm_topk_prob": renormalise, "tie_word_embeddings": True,
            "use_cache": False, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
        },
        "causal",
        size.vocabulary,
    )  # fmt: skip
    for layer in mixture_layers(model).values():
        layer.losses.clear()  # the family's takes all layers as one, which layers of unequal counts cannot be
    swap(model, "train.balance_loss", {"scope": "batch"})
    return model


def tune(
    model: nn.Module,
    data: Dataset,
    size: Mixture,
    seed: int,
    steps: int,
    *,
    lr: float = 1.0,
    first: int = 0,
    after: Callable[[int], None] | None = None,
) -> None:
    """Train in place, ``lr`` times the size's peak, from the data's step ``first`` on; ``after`` as in ``train``."""
    (name,) = {name for layer in mixture_layers(model).values() for name in layer.losses}
    train(
        model,
        data,
        size.model_copy(update={"lr": size.lr * lr}),
        seed,
        steps=steps,
        first=first,
        losses={name: size.aux},
        after=after,
    )


@functools.lru_cache(maxsize=4)
def _trained(size: Mixture, seed: int, mixed: bool) -> nn.Module:
    model = fresh(size, seed)
    data = corpus_of(size).train
    if mixed:
        (code,), (docs,) = data.sources.values(), task_of(size).train.sources.values()
        rows = [texts[i] for i in range(min(len(code), len(docs))) for texts in (code, docs)]
        data = Dataset({"data": rows})
    tune(model, data, size, seed, size.steps)
    return model.eval()


def trained(size: Mixture, seed: int, *, mixed: bool = False) -> nn.Module:
    """A trained mixture; trained once a process, a copy at every call.

    Args:
        mixed: on source files and the task's corpus, row by row in turns, instead of on source files alone.
    """
    return copy.deepcopy(_trained(size, seed, mixed))


def trained_mixture(
    seed: int, budget: Budget, **shape: Any
) -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """A trained mixture with held-out batches and calibration batches from its training files.

    Args:
        shape: fields of ``Mixture`` that replace those of the budget.

    Returns:
        (model in evaluation mode, held-out batches, calibration batches): arguments of its forward, ``labels`` aside.
    """
    size = size_of(budget, **shape)
    data = corpus_of(size)
    return trained(size, seed), rows_of(data.heldout, size), rows_of(data.train, size, seed)


def rows_of(data: Dataset, size: Mixture, seed: int | None = None, limit: int | None = None) -> list[dict[str, Tensor]]:
    """Batches of token ids: ``limit`` rows (the size's ``heldout`` when None), in order or in the order of a seed."""
    (rows,) = data.sources.values()
    count = min(size.heldout if limit is None else limit, len(rows))
    take = batches(data, size, seed or 0)
    if seed is not None:
        return [forward_only(take(step)) for step in range(max(1, count // size.batch))]
    from moestro.training.objectives import Causal

    every = [rows[place] for place in range(count)]
    return [forward_only(Causal().collate(every[at : at + size.batch], [])) for at in range(0, count, size.batch)]


def forward_only(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the model's forward takes, without labels."""
    return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}


def loss_of(model: nn.Module, data: Dataset, size: Mixture) -> float:
    """Held-out loss in nats a token."""
    return heldout(model, data, size)
