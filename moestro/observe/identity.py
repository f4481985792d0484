"""A fingerprint of a model, so that a trace or a plan is not used with another one by mistake."""

import hashlib
import json
from typing import Any, Final

import torch
from torch import nn


_SAMPLE: Final = 4096


def model_hash(model: nn.Module) -> str:
    """SHA-256 over the config and, for each parameter and saved buffer, name, shape, type and up to 4096 values.

    The values are spread evenly over the tensor: a changed training step or another checkpoint changes them, while
    a model of many gigabytes is hashed in moments. It tells models apart; it is no protection against forgery.
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        facts = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        if flat.numel() and not flat.is_meta:
            step = max(1, flat.numel() // _SAMPLE)
            sample = flat[::step].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
