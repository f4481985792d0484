"""Checks of the entry `objective`: each asks the method for the losses of a small batch, with a teacher at hand."""

from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.context import LossTerm
from moestro.core.registry import Method
from moestro.data.packing import IGNORE
from moestro.testing.contracts import example_config
from moestro.testing.contracts import settings_round_trip as settings_round_trip
from moestro.testing.training import VOCAB, TinyMixture
from moestro.training.objectives import Causal, MethodObjective


Losses = dict[str, LossTerm]


def batch(rows: int = 3, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Token ids and labels [rows, length]; the row before the last ends early."""
    ids_BS = torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels_BS = ids_BS.clone()
    labels_BS[-2, length // 2 :] = IGNORE
    return {"input_ids": ids_BS, "labels": labels_BS}


def pupil() -> nn.Module:
    """The model that learns."""
    return TinyMixture(seed=1)


def teachers() -> dict[str, nn.Module]:
    """One frozen teacher, another model of the same vocabulary."""
    teacher = TinyMixture(seed=2, layers=2)
    teacher.eval().requires_grad_(False)
    return {"teacher": teacher}


def losses(method: Method, model: nn.Module, given: dict[str, Tensor], taught: dict[str, Any]) -> Losses:
    """The method's losses of a batch, as sums."""
    objective = MethodObjective(Causal(), method.entry("objective"), example_config(method))
    return objective(model, given, taught)


def finite(method: Method) -> None:
    """See the contract."""
    found = losses(method, pupil(), batch(), teachers())
    assert found, "no loss at all"
    assert all(bool(torch.isfinite(loss.total)) for loss in found.values())


def gradients_arrive(method: Method) -> None:
    """See the contract."""
    model = pupil()
    torch.stack([loss.total for loss in losses(method, model, batch(), teachers()).values()]).sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}"
    assert any(bool(parameter.grad.abs().sum() > 0) for parameter in model.parameters() if parameter.grad is not None)


def teachers_stand_still(method: Method) -> None:
    """See the contract."""
    taught = teachers()
    before = {name: tensor.clone() for name, tensor in taught["teacher"].state_dict().items()}
    for parameter in taught["teacher"].parameters():
        parameter.requires_grad_(True)  # an objective must not rely on its caller
    torch.stack([loss.total for loss in losses(method, pupil(), batch(), taught).values()]).sum().backward()
    assert all(torch.equal(taught["teacher"].state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in taught["teacher"].parameters()), "a teacher got gradients"


def sums_over_rows(method: Method) -> None:
    """See the contract."""
    model, taught, whole = pupil(), teachers(), batch()
    together = losses(method, model, whole, taught)
    apart = [losses(method, model, {key: value[i : i + 1] for key, value in whole.items()}, taught) for i in range(3)]
    for name, loss in together.items():
        if loss.unit != "batch":
            total = torch.stack([part[name].total for part in apart]).sum()
            torch.testing.assert_close(total, loss.total, atol=1e-4, rtol=1e-5)


def repeatable(method: Method) -> None:
    """See the contract."""
    first, second = (losses(method, pupil(), batch(), teachers()) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name].total, loss.total) for name, loss in first.items())
