"""Held-out loss row by row, and whether one model is better than another beyond the choice of rows."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn


Losses = np.ndarray


@torch.no_grad()
def row_losses(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Losses:
    """Mean loss in nats of the next token for each row of the batches, [rows]."""
    model.eval()
    found = []
    for batch in batches:
        ids = batch["input_ids"]
        logits = model(**batch).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        mask = batch.get("attention_mask", torch.ones_like(ids))[:, 1:].float()
        found.append((losses * mask).sum(1) / mask.sum(1).clamp(min=1))
    result: Losses = torch.cat(found).double().numpy()
    return result


def bootstrap(gap: Losses, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of paired gaps over rows drawn with replacement."""
    chosen = np.random.default_rng(seed).integers(len(gap), size=(draws, len(gap)))
    low, high = np.quantile(gap[chosen].mean(1), [0.025, 0.975])
    return float(low), float(high)
