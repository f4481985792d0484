"""A plan that does not fit is refused with numbers, and the model is left as it was."""

from typing import Any

import pytest
import torch

from moestro import surgery
from moestro.core.errors import ConfigError, PlanError
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, MethodUse
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import assert_untouched, keep, mixture, moe_module, snapshot


def sourced(layer: int = 0, expert: int | None = 0, **fields: Any) -> ExpertSource:
    return ExpertSource(layer=layer, expert=expert, **fields)


def entry(*experts: list[ExpertSource], layer: int = 0, **fields: Any) -> LayerExperts:
    return LayerExperts(layer=layer, experts=list(experts), **fields)


DENSE = sourced(expert=None)

MIXTURE_CASES = {
    "no such layer": (entry([sourced()], layer=7), r"no feed-forward site in layer 7; it has them in layers 0-1"),
    "no such layer of a source": (entry([sourced(layer=5)]), r"no feed-forward site in layer 5"),
    "no such expert": (entry([sourced()], [sourced(expert=4)]), r"layer 0 has no expert 4; it has 0 to 3"),
    "expert left out": (entry([DENSE]), r"layer 0 is a mixture of 4; say which `expert`"),
    "row out of range": (entry([sourced(rows=[0, 48])]), r"expert 0 takes inner unit 48 .* has 48 \(0 to 47\)"),
    "no rows": (entry([sourced(rows=[])]), r"takes no inner unit"),
    "negative row": (entry([sourced(rows=[-1])]), r"inner unit -1"),
    "not a permutation": (entry([sourced(permutation=[0] * 48)]), r"48 places and is none of 48 units"),
    "permutation of another length": (entry([sourced(rows=[1, 2], permutation=[0])]), r"1 places .* of 2 units"),
    "unequal experts": (
        entry([sourced(rows=[0, 1])], [sourced(rows=[0])]),
        r"expert 1 has 1 inner units, expert 0 has 2",
    ),
    "unequal sources": (entry([sourced(rows=[0]), sourced(rows=[0, 1])]), r"sums sources of 1 and 2 inner units"),
    "top_k above experts": (keep(0, [1]), r"layer 0: .*top_k=2"),
    "unknown donor": (entry([sourced(donor="b")]), r"wants the donor 'b'; given are self"),
    "module of another count": (
        keep(0, [0, 1], module=moe_module(3, 1)),
        r"lists 2 experts, its module train.moe is set to 3",
    ),
    "module of another width": (
        keep(0, [0, 1], module=moe_module(2, 1, expert_size=20)),
        r"expert_size=48, .* is set to 20",
    ),
    "module with another form": (keep(0, [0, 1], module=moe_module(2, 1, gated=False)), r"gated=True, .* to False"),
    "module without shared sources": (
        keep(0, [0, 1], module=moe_module(2, 1, shared=8)),
        r"has a shared expert; the plan gives it no sources",
    ),
    "shared sources without a module": (keep(0, [0, 1], shared=[sourced()]), r"fills a shared expert"),
    "shared of another width": (
        keep(0, [0, 1], module=moe_module(2, 1, shared=8), shared=[sourced()]),
        r"shared expert has 48 inner units, .* set to 8",
    ),
    "unknown method": (keep(0, [0, 1], module=MethodUse(method="train.mo")), r"no method 'train.mo'; did you mean"),
    "unknown setting": (keep(0, [0, 1], module=moe_module(2, 1, expert_width=3)), r"unknown key 'expert_width'"),
    "a router is no mixture": (
        keep(0, [0, 1], module=MethodUse(method="train.softmax_topk", config={"num_experts": 2})),
        r"train.softmax_topk builds no mixture",
    ),
    "remap misses an expert": (
        entry([sourced(expert=0)], [sourced(expert=1), sourced(expert=2)], router="remap"),
        r"expert 3 is a source of none \(1 of 4",
    ),
    "remap leads two ways": (
        entry([sourced(), sourced(expert=1)], [sourced(), sourced(expert=2), sourced(expert=3)], router="remap"),
        r"cannot lead expert 0 to both 0 and 1",
    ),
    "remap with a module": (keep(0, [0, 1, 2, 3], router="remap", module=moe_module()), r"leave `module` out"),
    "weights that cancel": (
        entry([sourced(weight=1.0), sourced(expert=1, weight=-1.0)], [sourced()], router="mean"),
        r"weights sum to 0",
    ),
}


@pytest.mark.parametrize("case", MIXTURE_CASES)
def test_a_mixture_refuses(case: str) -> None:
    wrong, message = MIXTURE_CASES[case]
    model = mixture()
    before = snapshot(model)
    # a good layer beside the bad one: it must not be changed either
    plan = ExpertPlan(method="test", layers=[keep(1, [0, 1]), wrong])
    with pytest.raises(PlanError, match=message):
        surgery.apply(model, plan, calib=[torch.tensor([[1, 2, 3]])])
    assert_untouched(model, before)


DENSE_CASES = {
    "no module": (entry([DENSE], router="new"), r"layer 0 is dense; the plan must name the `module`"),
    "an expert of a dense layer": (entry([sourced()]), r"layer 0 is dense, it has no expert 0"),
    "router rows of a dense layer": (entry([DENSE], [DENSE], module=moe_module(2, 1)), r"is dense; use router=new"),
    "top_k above experts": (entry([DENSE], router="new", module=moe_module(1, 2)), r"top_k=2"),
}


@pytest.mark.parametrize("case", DENSE_CASES)
def test_a_dense_model_refuses(case: str) -> None:
    wrong, message = DENSE_CASES[case]
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(PlanError, match=message):
        surgery.apply(model, ExpertPlan(method="test", layers=[wrong]))
    assert_untouched(model, before)
    assert not hasattr(model, "is_moestro")


def test_donors_must_have_the_same_form() -> None:
    model, other = mixture(), mixture("bert")
    plan = ExpertPlan(method="test", layers=[entry([sourced()], [sourced(donor="b")])])
    with pytest.raises(PlanError, match=r"takes from layer 0, whose gated is False; here it is True"):
        surgery.apply(model, plan, donors={"b": other})
    plan = ExpertPlan(method="test", layers=[keep(0, [0, 1])], rest="mean")
    with pytest.raises(PlanError, match=r"rest='mean': model.embed_tokens.weight has shape \[97, 32\], donor 'b' has"):
        surgery.apply(model, plan, donors={"b": other})
    with pytest.raises(PlanError, match=r"rest='mean', but the donors are none"):
        surgery.apply(model, plan)
    with pytest.raises(PlanError, match=r"cannot be called 'self'"):
        surgery.apply(model, plan, donors={"self": other})


def test_a_plan_for_another_model_is_refused() -> None:
    model = mixture()
    mine = OpenModel(model).fingerprint()
    surgery.apply(model, ExpertPlan(method="test", layers=[keep(0, [0, 1, 2])], model_hash=mine))
    assert OpenModel(model).fingerprint() != mine
    with pytest.raises(PlanError, match=r"made by test for a model of hash [0-9a-f]{12}, .* make a new plan"):
        surgery.apply(model, ExpertPlan(method="test", layers=[keep(0, [0, 1])], model_hash=mine))


def test_the_fingerprint_knows_trained_models_apart() -> None:
    first, second = OpenModel(tiny_model("llama")), OpenModel(tiny_model("llama"))
    assert first.fingerprint() == second.fingerprint()
    with torch.no_grad():
        second.model.model.norm.weight[0] += 1e-3
    assert first.fingerprint() != second.fingerprint()


def test_a_layer_without_a_known_feed_forward_is_named() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = torch.nn.Identity()
    plan = ExpertPlan(method="test", layers=[entry([sourced(layer=1, expert=None)], layer=1, module=moe_module(1, 1))])
    with pytest.raises(PlanError, match=r"layer 1 holds a Identity, neither a dense feed-forward nor"):
        surgery.apply(model, plan)


def test_plans_with_wrong_numbers_are_not_even_built() -> None:
    for wrong in ({"redraw": 1.5}, {"mask": -0.1}, {"noise": -1.0}, {"layer": -1}, {"expert": -2}):
        with pytest.raises(ConfigError):
            ExpertSource(**{"layer": 0, **wrong})
    with pytest.raises(ConfigError, match="planned twice"):
        ExpertPlan(method="test", layers=[keep(0, [0]), keep(0, [1])])
