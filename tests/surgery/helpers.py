"""What the surgery tests share: tiny models, tiny mixtures made of them, batches, comparisons."""

from typing import Any

import torch
from torch import Tensor, nn

from moestro import surgery
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, MethodUse
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import VOCAB, tiny_model


def ids(rows: int = 2, width: int = 7, seed: int = 3) -> Tensor:
    """Token ids without padding."""
    return torch.randint(3, VOCAB, (rows, width), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, batch: Tensor | None = None, **more: Any) -> Tensor:
    """Logits of a batch."""
    found: Tensor = model(input_ids=ids() if batch is None else batch, **more).logits
    return found


def moe_module(experts: int = 4, top_k: int = 2, **config: Any) -> MethodUse:
    """``train.moe`` with a renormalised softmax router."""
    router = {"method": "train.softmax_topk", "config": {"top_k": top_k}}
    return MethodUse(method="train.moe", config={"num_experts": experts, "router": router, **config})


def mixture(family: str = "llama", experts: int = 4, top_k: int = 2, seed: int = 0, **config: Any) -> Any:
    """A tiny model whose feed-forwards became mixtures of really different experts under a router that decides."""
    model = tiny_model(family, seed=seed)
    layers = [
        LayerExperts(
            layer=layer,
            experts=[[ExpertSource(layer=layer, noise=1.0)]] * experts,
            router="new",
            module=moe_module(experts, top_k, **config),
        )
        for layer in OpenModel(model).shape.layers
    ]
    surgery.apply(model, ExpertPlan(method="test", layers=layers, seed=seed))
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for layer in mixture_layers(model).values():
            for name, parameter in layer.router.named_parameters():
                parameter.normal_(0.0, 0.2 if name == "bias" else 1.0, generator=generator)
    return model


def layers_of(model: nn.Module) -> list[MoELayer]:
    """The mixture layers in order."""
    return list(mixture_layers(model).values())


def keep(layer: int, experts: list[int], **more: Any) -> LayerExperts:
    """A layer entry that keeps these experts."""
    return LayerExperts(layer=layer, experts=[[ExpertSource(layer=layer, expert=e)] for e in experts], **more)


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
    """All tensors, cloned, and the identity of every module."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, {name: id(module) for name, module in model.named_modules()}


def assert_untouched(model: nn.Module, before: tuple[dict[str, Tensor], dict[str, int]]) -> None:
    """Nothing moved: the same modules with the same bits."""
    tensors, modules = snapshot(model)
    assert modules == before[1]
    assert tensors.keys() == before[0].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[0][name]), name
