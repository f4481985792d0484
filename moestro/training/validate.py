"""Held-out loss while training: the objective's own losses over examples that are never trained on."""

from collections.abc import Mapping

import torch
from torch import nn

from moestro.core.session import session
from moestro.data.dataset import Dataset
from moestro.data.sampling import Draw, example_rng
from moestro.training.objectives import Objective, Teachers, check_packing


def heldout_loss(
    model: nn.Module,
    objective: Objective,
    dataset: Dataset,
    *,
    limit: int,
    rows: int,
    seed: int = 0,
    teachers: Teachers | None = None,
    values: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Each of the objective's losses over the first ``limit`` examples of every source, divided by its units.

    The model runs in evaluation mode and is put back into its mode; random numbers of the run are not touched; no
    router counts these tokens.

    Args:
        rows: examples of one forward. Every rank runs all of them, so that all see the same result.
    """
    draws = [Draw(name, 0, place) for name, size in sorted(dataset.sizes.items()) for place in range(min(size, limit))]
    chunks = [draws[at : at + rows] for at in range(0, len(draws), rows)]
    names: list[str] = []
    sums = torch.zeros(0, 2, dtype=torch.float64)
    training = model.training
    state = torch.get_rng_state()
    model.eval()
    try:
        for chunk in chunks:
            examples = [dataset.sources[draw.source][draw.place] for draw in chunk]
            batch = objective.collate(examples, [example_rng(seed, draw) for draw in chunk])
            check_packing(model, batch)
            with torch.no_grad(), session(values=values, collect=False):
                terms = objective(model, batch, teachers or {})
            units = {"token": objective.targets(batch), "sequence": objective.rows(batch), "batch": 1}
            if not names:
                names = list(terms)
                sums = torch.zeros(len(names), 2, dtype=torch.float64)
            for place, name in enumerate(names):
                sums[place, 0] += float(terms[name].total)
                sums[place, 1] += units[terms[name].unit]
    finally:
        model.train(training)
        torch.set_rng_state(state)
    return {name: float(total / count) for name, (total, count) in zip(names, sums, strict=True)}
