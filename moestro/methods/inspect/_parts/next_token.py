"""The loss of a causal model on batches that may be padded on either side."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


Batch = Mapping[str, Any]


def valid_tokens(batch: Batch) -> Tensor:
    """Which tokens are no padding, bool [B, S]."""
    return torch.as_tensor(batch.get("attention_mask", torch.ones_like(batch["input_ids"]))) != 0


def loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean next-token loss in nats over all targets that are no padding."""
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1].float()
        valid = valid_tokens(batch)
        wanted = batch["input_ids"][:, 1:].masked_fill(~(valid[:, 1:] & valid[:, :-1]), -100)
        total += float(nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="sum"))
        count += int((wanted != -100).sum())
    return total / max(count, 1)
