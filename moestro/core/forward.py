"""Calling a model with a batch: what its forward names, and never the answers."""

import inspect
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn


LABEL_KEYS: Final = frozenset({"labels", "label", "target_ids", "start_positions", "end_positions"})


def outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """What the model returns. Only inputs that its ``forward`` names are passed; labels never are."""
    parameters = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key not in LABEL_KEYS}
    named = {key: value for key, value in inputs.items() if key in parameters}
    if named or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        inputs = named  # else a wrapper that passes everything on
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return model(**inputs)


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's logits [..., V]."""
    output = outputs(model, batch)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits
