"""What the tests of the stage share."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moestro
from moestro import surgery
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.plan import ExpertPlan
from moestro.core.routing import Routing
from moestro.core.session import session
from moestro.methods.planning import make_plan
from moestro.testing.tiny import VOCAB, tiny_folder


def batches(count: int = 3, rows: int = 2, width: int = 11) -> list[Tensor]:
    """Token ids."""
    draw = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCAB, (rows, width), generator=draw) for _ in range(count)]


def planned(method: str, model: nn.Module, seed: int = 0, **config: Any) -> ExpertPlan:
    """The plan of a method for an open model, calibrated on ``batches``."""
    plan = make_plan(method, model, config, batches=batches(), seed=seed)
    assert isinstance(plan, ExpertPlan)
    return plan


def applied(method: str, model: nn.Module, seed: int = 0, **config: Any) -> dict[str, Any]:
    """The receipt of that plan, applied."""
    return surgery.apply(model, planned(method, model, seed, **config))


def opened(family: str, folder: Path, **options: Any) -> Any:
    """A tiny stock checkpoint, opened by Moestro."""
    tiny_folder(family, folder / f"stock-{family}", **options)
    return moestro.load(folder / f"stock-{family}")


@torch.no_grad()
def routings(model: nn.Module, ids: Tensor) -> list[Routing]:
    """The routing of each mixture layer."""
    seen: list[Routing] = []

    class Taker:
        def record(self, site: str, routing: Routing, ctx: Any) -> None:
            seen.append(routing)

    with session(recorder=Taker()):
        model(input_ids=ids)
    return seen


def layers_of(model: nn.Module) -> list[MoELayer]:
    """The mixture layers in order."""
    return list(mixture_layers(model).values())
