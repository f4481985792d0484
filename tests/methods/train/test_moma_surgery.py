"""MoMa's experts in other hands: reordered with all that belongs to them, and upcycled from one for each modality."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moestro
from moestro import surgery
from moestro.core.errors import ContextError
from moestro.core.layer import mixture_layers
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, MethodUse
from moestro.models.load import adopt
from moestro.models.swap import swap
from moestro.testing.tiny import tiny_model


IDS = torch.randperm(94, generator=torch.Generator().manual_seed(1))[:18].view(2, 9) + 3  # equal ones would tie
ORDER = [1, 0, 3, 4, 2]  # two text experts, three image experts


def settings(text: int, image: int, **more: object) -> dict[str, object]:
    return {"groups": {"text": text, "image": image}, "modality": {"image": [(50, 96)]}, **more}


def model_of(text: int, image: int) -> nn.Module:
    model = adopt(tiny_model("llama"))
    swap(model, "train.moma", settings(text, image))
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            nn.init.normal_(parameter, std=0.5, generator=draw)
    for layer in mixture_layers(model).values():
        layer.router.auxiliary.threshold.copy_(torch.linspace(-0.2, 0.2, text + image))
    return model


def plan(sources: list[int], module: dict[str, object], router: str) -> ExpertPlan:
    layers = [
        LayerExperts(
            layer=layer,
            experts=[[ExpertSource(layer=layer, expert=expert)] for expert in sources],
            router=router,
            module=MethodUse(method="train.moma", config=module),
        )
        for layer in range(2)
    ]
    return ExpertPlan(method="test", layers=layers)


def logits(model: nn.Module, by_batch: bool = False) -> Tensor:
    with torch.no_grad(), moestro.session(values={"batch_selection": float(by_batch)}):
        return model(IDS, use_cache=False).logits


def test_reordered_experts_take_router_auxiliary_router_and_threshold_along(tmp_path: Path) -> None:
    model = model_of(2, 3)
    expected = [logits(model, by_batch) for by_batch in (False, True)]
    moestro.save(model, tmp_path / "before")
    old = {site: layer.router.state_dict() for site, layer in mixture_layers(model).items()}
    steps = plan(ORDER, settings(2, 3), "rows")
    surgery.apply(model, steps)
    surgery.apply(tmp_path / "before", steps, out=tmp_path / "after")
    for found in (model, moestro.load(tmp_path / "after")):
        for by_batch, wanted in zip((False, True), expected, strict=True):
            torch.testing.assert_close(logits(found, by_batch), wanted, atol=1e-5, rtol=0)
        for site, layer in mixture_layers(found).items():
            for name in layer.router.choice_rows:
                assert torch.equal(layer.router.tensor(name), old[site][name][ORDER]), name


def test_one_expert_a_modality_upcycled_is_the_same_model_with_routers_still_to_train() -> None:
    """Copies under any scores are the expert times a number, which the norm that was kept takes out again."""
    model = model_of(1, 1)
    for layer in mixture_layers(model).values():
        layer.router.auxiliary.threshold.fill_(-1e9)
    expected = logits(model)
    surgery.apply(model, plan([0, 0, 1, 1], settings(2, 2, capacity_factor=1.0, noise="gumbel_sigmoid"), "new"))
    torch.testing.assert_close(logits(model), expected, atol=1e-3, rtol=0)
    for layer in mixture_layers(model).values():
        assert torch.equal(layer.bank.down_proj[0], layer.bank.down_proj[1])
        assert not torch.equal(layer.bank.down_proj[0], layer.bank.down_proj[2])
        assert not torch.equal(layer.router.weight[0], layer.router.weight[1]), "routers are new"
    with pytest.raises(ContextError, match="not trained"):
        model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
