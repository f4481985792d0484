"""A tiny model whose router reads token ids only, refactorised from a dense one, and packed."""

from pathlib import Path
from typing import Any

import torch

import moestro
from moestro.core.plan import MethodUse
from moestro.core.registry import method
from moestro.engine.pack import pack_model
from moestro.testing.tiny import tiny_model


EXPERTS_EACH, UNITS = 3, 48


def cut(storage: str = "shared_pool", keep: float = 0.5, layers: tuple[int, ...] = (0, 1)) -> Any:
    """A dense model refactorised at random, with a router whose choices differ from token to token."""
    model, draw = tiny_model("llama", head_dim=16), torch.Generator().manual_seed(1)
    convert, train = method("convert.read_me").module, method("train.read_me").module
    masks = {layer: convert.masks_of(torch.rand(EXPERTS_EACH, UNITS, generator=draw), keep) for layer in layers}
    router = MethodUse(method="train.read_me", config={"router_dim": 16, "router_heads": 2})
    convert.refactorize(model, masks, storage=storage, router=router)
    gate = train.gate_of(model)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.5, generator=draw)
    return model.eval()


def saved(model: Any, out: Path, bits: int = 32) -> Path:
    moestro.save(model, out / "model")
    pack_model(out / "model", out / "packed", bits=bits)
    return out / "packed"
