"""Fine-grained experts out of coarse ones: the same function until training tells the slices apart."""

from typing import Any

import pytest
import torch

from moestro import surgery
from moestro.core.errors import PlanError
from moestro.core.inputs import PlanInputs
from moestro.core.registry import method
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import layers_of, logits, mixture


SEGMENT = method("convert.segment")


def segmented(model: Any, **config: Any) -> dict[str, Any]:
    plan = SEGMENT.plan(PlanInputs(subject=OpenModel(model)), SEGMENT.configure(config))
    return surgery.apply(model, plan)


def with_router(router: str, **settings: Any) -> Any:
    return mixture(router={"method": router, "config": settings})


@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_segments_keep_the_logits(family: str, segments: int) -> None:
    model = mixture(family)
    before = logits(model)
    segmented(model, segments=segments)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    for layer in layers_of(model):
        assert (layer.bank.num_experts, layer.bank.inner) == (4 * segments, 48 // segments)
        assert layer.router.top_k == 2 * segments


@pytest.mark.parametrize(
    ("router", "settings", "weights"),
    [
        ("train.softmax_topk", {"top_k": 2, "renormalise": False}, "shared_sum"),
        ("train.softmax_topk", {"top_k": 2, "softmax": "chosen"}, "shared_sum"),
        ("train.sigmoid_bias", {"top_k": 2, "renormalise": True}, "shared_sum"),
        ("train.sigmoid_bias", {"top_k": 2, "renormalise": False}, "independent"),
        ("train.noisy_topk", {"top_k": 2}, "shared_sum"),
    ],
)
def test_the_factor_fits_the_routers_weights(router: str, settings: dict[str, Any], weights: str) -> None:
    model = with_router(router, **settings)
    before = logits(model)
    segmented(model, segments=2, weights=weights)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


def test_slices_and_rows_by_hand() -> None:
    model = mixture()
    old = layers_of(model)[0]
    up, down, row = old.bank.stacked("up").clone(), old.bank.down_proj.clone(), old.router.weight.clone()
    segmented(model, segments=2, layers=[0])
    new = layers_of(model)[0]
    for expert in range(4):
        for half in range(2):
            units = slice(24 * half, 24 * half + 24)
            assert torch.equal(new.bank.weight(2 * expert + half, "up"), up[expert, units])
            torch.testing.assert_close(new.bank.weight(2 * expert + half, "down"), 2 * down[expert][:, units])
            assert torch.equal(new.router.weight[2 * expert + half], row[expert])
    assert layers_of(model)[1].bank.num_experts == 4


def test_the_selection_bias_goes_with_its_expert() -> None:
    model = with_router("train.sigmoid_bias", top_k=2)
    for layer in layers_of(model):
        layer.router.selection_bias.copy_(torch.tensor([0.5, -0.25, 0.0, 0.125]))
    before = logits(model)
    segmented(model, segments=2)
    assert layers_of(model)[0].router.selection_bias.tolist() == [0.5, 0.5, -0.25, -0.25, 0.0, 0.0, 0.125, 0.125]
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


def test_what_cannot_be_segmented_is_refused() -> None:
    with pytest.raises(PlanError, match="5 segments do not divide 48 inner units"):
        segmented(mixture(), segments=5)
    with pytest.raises(PlanError, match=r"means no layer; .* has 0 mixture layers"):
        segmented(tiny_model("llama"))
    with pytest.raises(PlanError, match="chooses no fixed number"):
        segmented(with_router("train.switch"))
