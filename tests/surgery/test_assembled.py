"""Sites put together from tensors of several models: plans that do not fit change nothing."""

import copy
from pathlib import Path

import pytest
import torch

from moestro import surgery
from moestro.core.errors import ConfigError, PlanError
from moestro.core.plan import ExpertPlan, MethodUse, SiteParts, TensorSource
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import assert_untouched, snapshot


PATHS = {"query": "q_proj.weight", "key": "k_proj.weight", "value": "v_proj.weight", "output": "o_proj.weight"}


def entry(layer: int = 0, **changes: list[list[TensorSource]]) -> SiteParts:
    """Two copies of the attention that stands in a layer."""
    source = {name: [[TensorSource(layer=layer, name=path)]] * 2 for name, path in PATHS.items()}
    tensors = {f"{name}_proj": rows for name, rows in source.items()}
    module = MethodUse(method="train.mixture_of_attention", config={"num_experts": 2})
    return SiteParts(layer=layer, module=module, tensors={**tensors, **changes})


def plan(*sites: SiteParts) -> ExpertPlan:
    return ExpertPlan(method="test", layers=[], sites=list(sites), seed=3)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([[TensorSource(layer=0, name="o_proj.weight")]], "lists 1 rows of output_proj, the module has 2"),
        ([[TensorSource(layer=0, name="w")]] * 2, "has no 'w' there, only q_proj.weight, k_proj.weight"),
        ([[TensorSource(layer=5, name="w")]] * 2, "no attention site in layer 5; it has them in 0-1"),
        ([[TensorSource(donor="b", layer=0, name="w")]] * 2, "wants the donor 'b'; given are self"),
        ([[TensorSource(layer=0, name="k_proj.weight")]] * 2, r"shape \[16, 32\], a row of output_proj has \[32, 32\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    tmp_path: Path, rows: list[list[TensorSource]], told: str
) -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError, match=told):
        surgery.apply(model, plan(entry(1), entry(0, output_proj=rows)))
    assert_untouched(model, before)
    with pytest.raises(PlanError, match=told):
        surgery.apply(tmp_path / "model", plan(entry(0, output_proj=rows)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_and_doubles() -> None:
    model = tiny_model("llama")
    with pytest.raises(PlanError, match="has no tensor 'nothing'; it has query_proj"):
        surgery.apply(model, plan(entry(0, nothing=[[TensorSource(layer=0, name="q_proj.weight")]])))
    with pytest.raises(ConfigError, match="a site is planned twice"):
        plan(entry(0), entry(0))
    with pytest.raises(ConfigError, match="output_proj needs rows and every row a source"):
        entry(0, output_proj=[])


def test_rows_are_weighted_sums_and_read_what_stood_there_before() -> None:
    """Layers may swap their tensors: a source is what the model held when the plan was applied."""
    model = tiny_model("llama")
    old = [copy.deepcopy(layer.self_attn) for layer in model.model.layers]
    half = [TensorSource(layer=layer, name="o_proj.weight", weight=weight) for layer, weight in ((0, 0.25), (1, 0.5))]
    sites = [entry(0, output_proj=[half, half[1:]]), entry(1, output_proj=[[half[0]], half])]
    receipt = surgery.apply(model, plan(*sites))
    first, second = (old[layer].o_proj.weight for layer in (0, 1))
    found = [layer.self_attn.output_proj for layer in model.model.layers]
    torch.testing.assert_close(found[0], torch.stack([first / 4 + second / 2, second / 2]), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1], torch.stack([first / 4, first / 4 + second / 2]), atol=1e-6, rtol=0)
    assert receipt["ledger"]["rows_touched"] == 16
    routers = [layer.self_attn.router.detach().clone() for layer in model.model.layers]
    assert not torch.equal(*routers), "two layers drew the same router"
    again = tiny_model("llama")
    surgery.apply(again, plan(*sites))
    assert all(torch.equal(a.self_attn.router, b) for a, b in zip(again.model.layers, routers, strict=True))


def test_what_was_frozen_stays_frozen_and_a_narrow_model_narrow() -> None:
    model = tiny_model("llama").to(torch.bfloat16).train()
    model.model.layers[0].self_attn.requires_grad_(False)
    part = [TensorSource(layer=layer, name="o_proj.weight", weight=0.3) for layer in (0, 1)]
    terms = [model.model.layers[layer].self_attn.o_proj.weight.detach().float() for layer in (0, 1)]
    surgery.apply(model, plan(entry(0, output_proj=[part, part]), entry(1)))
    first, second = (layer.self_attn for layer in model.model.layers)
    assert {p.dtype for module in (first, second) for p in module.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in (first.query_proj, first.output_proj, first.router)] == [False, False, True]
    assert all(p.requires_grad for p in second.parameters())
    assert first.training
    assert second.training
    assert torch.equal(first.output_proj[0], (terms[0] * 0.3 + terms[1] * 0.3).to(torch.bfloat16))  # rounded once
