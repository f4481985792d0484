"""Move an optimiser along when parameters are exchanged: its groups, and what it remembers of each weight."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moestro.core.bank import StackedFFN
from moestro.core.layer import MoELayer
from moestro.core.ledger import Ledger
from moestro.surgery.check import Work, shared_bank
from moestro.surgery.fill import fill
from moestro.surgery.opened import OpenModel, bank_slot


def move_moments(optimizer: Optimizer, layer: MoELayer, work: Work, donors: Mapping[str, OpenModel]) -> None:
    """Enter a new layer's parameters where those they replace stand, with state made of the state of their sources.

    Moments (state of the shape of its parameter) follow the weights: they are taken, reordered and averaged with them;
    those of new draws, masked weights, new router rows, and of whatever the optimiser never met, are zero. Scalar state
    (the step) is that of the parameter that is replaced.

    Args:
        layer: filled. work: what it was made by. donors: by name; only ``self`` has state.
    """
    groups = _members(optimizer)
    lead = work.place.slot(None if work.place.dense is not None else 0, "up")[0]
    if id(lead) not in groups:
        return  # what is replaced was not trained
    before = _counterparts(layer, work)
    keys: list[str] = []
    for parameter in layer.parameters():
        if id(parameter) in groups:
            continue
        old = before.get(id(parameter), lead)
        old = old if id(old) in groups else lead
        optimizer.param_groups[groups[id(old)]]["params"].append(parameter)
        state = optimizer.state.get(old, {})
        moments = [key for key, value in state.items() if _is_moment(value, old)]
        keys += [key for key in moments if key not in keys]
        if state:
            optimizer.state[parameter] = {
                key: torch.zeros_like(parameter) if key in moments else _copied(value) for key, value in state.items()
            }
    for key in keys:

        def read(parameter: Tensor, key: str = key) -> Tensor:
            value = optimizer.state.get(parameter, {}).get(key)
            return torch.zeros_like(parameter) if value is None else value

        def into(parameter: Tensor, key: str = key) -> Tensor:
            value = optimizer.state.get(parameter, {}).get(key)
            return torch.empty_like(parameter) if value is None else value

        fill(layer, work, donors, into=into, ledger=Ledger("moments"), reads=dict.fromkeys(donors, read))


def _counterparts(layer: MoELayer, work: Work) -> dict[int, Tensor]:
    """Id of a new parameter -> the parameter it replaces, where there is one."""
    assert isinstance(layer.bank, StackedFFN)
    shared = shared_bank(layer)
    found: dict[int, Tensor] = {}
    for bank in (layer.bank, *([] if shared is None else [shared])):
        for name in work.place.shape.names:
            old, _ = work.place.slot(None if work.place.dense is not None else 0, name)
            found[id(bank_slot(bank, 0, name)[0])] = old
    if work.place.dense is None:
        old_router = dict(work.place.mixture.router.named_parameters())
        for name, parameter in layer.router.named_parameters():
            inner = name.removeprefix("inner.")
            found.update({id(parameter): old_router[n] for n in (inner, f"inner.{inner}") if n in old_router})
    return found


def forget(optimizer: Optimizer, model: nn.Module) -> None:
    """Drop what is no longer in the model, and put each group into the model's order."""
    order = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    for group in optimizer.param_groups:
        gone = [parameter for parameter in group["params"] if id(parameter) not in order]
        for parameter in gone:
            optimizer.state.pop(parameter, None)
        kept = [parameter for parameter in group["params"] if id(parameter) in order]
        group["params"] = sorted(kept, key=lambda parameter: order[id(parameter)])


def _members(optimizer: Optimizer) -> dict[int, int]:
    """Id of a parameter -> number of its group."""
    return {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}


def _is_moment(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _copied(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value
