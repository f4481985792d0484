"""Layers with different numbers of experts in a format that has one number: fillers that no token can choose.

A layer with fewer experts than the largest gets filler experts of zeros, and its router a row of zeros with the lowest
number there is as the bias of each. That takes a bias that decides the choice: on the logits (gpt-oss) or for the
selection only (DeepSeek-V3). A router without one cannot switch an expert off, whatever its weights.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.bank import StackedFFN
from moestro.core.errors import SaveError
from moestro.core.layer import MoELayer
from moestro.core.router import Router


SWITCHES = ("selection_bias", "bias")


@contextmanager
def uniform(model: nn.Module) -> Iterator[None]:
    """Inside, all mixtures of equal experts have as many experts as the largest; nothing if they agree anyway.

    Raises:
        SaveError: a layer would need fillers and its router cannot switch them off; the message names the tensor.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, MoELayer)}
    if any(type(layer.bank) is not StackedFFN for layer in layers.values()):
        layers = {}  # whoever looks for a stock architecture says so better
    largest = max(layers.values(), key=lambda layer: layer.bank.num_experts, default=None)
    most = 0 if largest is None else largest.bank.num_experts
    short = {path: layer for path, layer in layers.items() if layer.bank.num_experts < most}
    filled = {path: _filled(layer, largest) for path, layer in short.items() if largest is not None}
    if filled:
        logging.getLogger("moestro").info("%d layers filled up to %d experts", len(filled), most)
    try:
        for path, layer in filled.items():
            _put(model, path, layer)
        yield
    finally:
        for path, layer in short.items():
            _put(model, path, layer)


def _put(model: nn.Module, path: str, layer: MoELayer) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = layer


def _filled(layer: MoELayer, largest: MoELayer) -> MoELayer:
    bank, router, count = layer.bank, layer.router, largest.bank.num_experts
    assert isinstance(bank, StackedFFN)
    switch = next((name for name in SWITCHES if isinstance(getattr(router, name, None), Tensor)), None)
    have = f"{layer.site} has num_experts {bank.num_experts}, {largest.site} has {count}"
    if switch is None or switch not in router.choice_rows:
        raise SaveError(
            f"{have}; stock architectures have one number for all layers, and {layer.site}.router.weight has no bias "
            "beside it that could switch off filler experts; keep as many in every layer, or use moestro.save"
        )
    if getattr(getattr(router, "config", None), "num_groups", 1) > 1:
        raise SaveError(f"{have}; fillers would change the groups its router chooses among; use moestro.save")
    found = copy.copy(layer)
    found._modules = {
        **layer._modules,
        "bank": _wider_bank(bank, count),
        "router": _wider_router(router, count, switch),
    }
    return found


@torch.no_grad()
def _wider_bank(bank: StackedFFN, count: int) -> StackedFFN:
    wider = copy.copy(bank)
    wider.num_experts = count
    wider._parameters = {name: _grown(tensor, count) for name, tensor in bank._parameters.items()}
    return wider


@torch.no_grad()
def _wider_router(router: Router, count: int, switch: str) -> Router:
    wider: Any = copy.copy(router)
    wider.num_experts = count
    wider.config = wider.config.model_copy(update={"num_experts": count})
    for table in ("_parameters", "_buffers"):
        old: dict[str, Any] = getattr(router, table)
        setattr(wider, table, {n: _grown(t, count) if n in router.choice_rows else t for n, t in old.items()})
    bias: Tensor = getattr(wider, switch)
    bias[router.num_experts :] = torch.finfo(bias.dtype).min
    return wider


def _grown(tensor: Tensor | None, count: int) -> Any:
    """A tensor with rows of zeros added."""
    if tensor is None:
        return None
    more = tensor.new_zeros(count - len(tensor), *tensor.shape[1:])
    grown = torch.cat([tensor.detach(), more])
    return nn.Parameter(grown, requires_grad=False) if isinstance(tensor, nn.Parameter) else grown
