"""Mixtures whose gates read an earlier block, tuned side by side with the conventional one they come from."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro import surgery
from moestro.core.layer import mixture_layers
from moestro.core.session import session
from moestro.methods.planning import make_plan
from moestro.studies._framework import BUDGETS, Budget
from moestro.studies._mixture import Mixture, corpus_of, fresh, rows_of, size_of, task_of, tune


TUNED: Mapping[str, Mapping[str, Any] | None] = {
    "conventional": None,
    "ahead_1": {"distance": 1},
    "ahead_2": {"distance": 2},
    "ahead_3": {"distance": 3},
    "ahead_1_random": {"distance": 1, "init": "random"},
    "ahead_1_unfolded": {"distance": 1, "fold": False},
    "blind": {"distance": 1, "init": "random"},
    "conventional_top2": None,
    "ahead_1_top2": {"distance": 1},
}
"""Quality arms that are tuned: settings of the conversion."""


def choices_of(arm: str) -> int:
    """Experts a token of an arm's mixture chooses."""
    return 2 if arm.endswith("_top2") else 1


def shape_of(budget: Budget, top_k: int = 1) -> Mixture:
    """The mixture of a budget, weighed by probabilities that are not renormalised: top-1 as in Switch."""
    few = {"layers": 4, "dim": 32, "heads": 2, "inner": 16}
    return budget.pick(
        ci=size_of(budget, **few, top_k=top_k, experts=4),
        micro=size_of(budget, layers=5, dim=48, heads=3, inner=48, top_k=top_k, steps=40, heldout=16),
        full=size_of(budget, layers=6, dim=64, heads=4, inner=64, top_k=top_k, steps=300, aux=1e-2),
    )


def parent(seed: int, name: str, top_k: int = 1) -> nn.Module:
    """The pretrained mixture, the same object at every call."""
    return _pretrained(seed, name, top_k)


@functools.lru_cache(maxsize=2)
def _pretrained(seed: int, name: str, top_k: int) -> nn.Module:
    size = shape_of(BUDGETS[name], top_k)
    model = fresh(size, seed, renormalise=False)
    tune(model, corpus_of(size).train, size, seed, size.steps)
    return model.eval()


def converted(arm: str, seed: int, name: str) -> nn.Module:
    """The arm's model before it is tuned."""
    model = copy.deepcopy(parent(seed, name, choices_of(arm)))
    settings = TUNED[arm]
    if settings is not None:
        surgery.apply(model, make_plan("convert.pre_gated", model, settings, seed=seed))
    if arm == "blind":
        for layer in mixture_layers(model).values():
            layer.router.requires_grad_(False)
    return model


@functools.lru_cache(maxsize=len(TUNED))
def tuned(arm: str, seed: int, name: str) -> nn.Module:
    """The arm's model after it was tuned."""
    size = shape_of(BUDGETS[name], choices_of(arm))
    model = converted(arm, seed, name)
    steps = BUDGETS[name].pick(ci=2, micro=20, full=100)
    tune(model, task_of(size).train, size, seed, steps, lr=0.5)
    return model.eval()


def agreement(seed: int, name: str) -> list[float]:
    """How often the converted, untrained gate of each mixture but the first picks, on the parent's own stream, what
    the parent's gate picks one block later; by mixture.
    """
    model, early = parent(seed, name), converted("ahead_1", seed, name)
    gates = [layer.router.tensor("weight") for layer in mixture_layers(early).values()]
    own = [layer.router.tensor("weight") for layer in mixture_layers(model).values()]
    hits, total = np.zeros(len(own) - 1), 0
    size = shape_of(BUDGETS[name])
    for batch in rows_of(task_of(size).heldout, size, limit=8):
        with torch.no_grad(), session(collect=True, keeps=["input"]) as opened:
            model(**batch)
        (ctx,) = opened.take()
        inputs = [ctx.kept[site, "input"] for site in mixture_layers(model)]
        for at in range(1, len(own)):
            one, other = inputs[at - 1] @ _matrix(gates[at]).T, inputs[at] @ _matrix(own[at]).T
            hits[at - 1] += float((one.argmax(-1) == other.argmax(-1)).sum())
        total += len(inputs[0])
    return [float(hit) / total for hit in hits]


def _matrix(found: Tensor | None) -> Tensor:
    assert found is not None
    return found
