"""Routers of every kind under surgery: rows, noise, biases, tables of ids, nulls, encoder-decoder stacks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moestro import surgery
from moestro.core.bank import StackedFFN
from moestro.core.errors import PlanError
from moestro.core.layer import MoELayer
from moestro.core.plan import ExpertPlan
from moestro.core.router import LinearRouter
from moestro.models.load import adopt
from moestro.surgery import fill as filling
from moestro.surgery import plans
from moestro.surgery.opened import OpenModel, itself
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import ids, keep, layers_of, logits, mixture


ORDER = [2, 0, 3, 1]
ROUTERS: dict[str, dict[str, Any]] = {
    "train.softmax_topk": {"top_k": 2, "bias": True},
    "train.sigmoid_bias": {"top_k": 2},
    "train.switch": {"bias": True},
    "train.noisy_topk": {"top_k": 2},
    "train.hash_router": {"top_k": 2},
}


@pytest.mark.parametrize("router", ROUTERS)
def test_reordered_experts_take_all_of_their_router_along(router: str) -> None:
    model = mixture(router={"method": router, "config": ROUTERS[router]})
    old = layers_of(model)[0].router
    if hasattr(old, "selection_bias"):
        old.selection_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    before = logits(model)
    surgery.apply(model, plans.prune(OpenModel(model).shape, {0: ORDER, 1: ORDER}, method="test"))
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    new = layers_of(model)[0].router
    assert new is not old
    for name in old.choice_rows:
        if getattr(old, name) is not None:
            assert torch.equal(getattr(new, name), getattr(old, name)[ORDER]), name
    if router == "train.hash_router":
        assert torch.equal(new.table_VK, torch.tensor(ORDER).argsort()[old.table_VK])


def test_a_router_that_stores_ids_cannot_lose_an_expert() -> None:
    model = mixture(router={"method": "train.hash_router", "config": {"top_k": 2}})
    plan = plans.prune(OpenModel(model).shape, {0: [0, 1, 3]}, method="test")
    with pytest.raises(PlanError, match="expert 2 becomes 0 experts; such a router can only be reordered"):
        surgery.apply(model, plan)
    entry = keep(0, [0, 1, 3], router="new")
    surgery.apply(model, ExpertPlan(method="test", layers=[entry]))
    assert int(layers_of(model)[0].router.table_VK.max()) == 2


@pytest.mark.parametrize("router", ["train.random_router", "train.expert_choice"])
def test_other_routers_are_built_anew_and_run(router: str) -> None:
    model = mixture(router={"method": router, "config": {}})
    surgery.apply(model, plans.prune(OpenModel(model).shape, {0: [0, 1, 3]}, method="test"))
    assert layers_of(model)[0].router.num_experts == 3
    assert logits(model).isfinite().all()


def test_a_router_of_another_kind_takes_the_rows_it_can() -> None:
    model = mixture()
    rows = layers_of(model)[0].router.weight.clone()
    use = {"method": "train.sigmoid_bias", "config": {"top_k": 2}}
    module = {"num_experts": 4, "router": use}
    there = OpenModel(model).shape.layers[0].module
    assert there is not None
    entry = keep(0, ORDER, module=there.model_copy(update={"config": module}))
    surgery.apply(model, ExpertPlan(method="test", layers=[entry]))
    new = layers_of(model)[0].router
    assert torch.equal(new.weight, rows[ORDER])
    assert new.selection_bias.tolist() == [0.0] * 4


def test_a_router_that_is_not_known_must_be_named() -> None:
    model = mixture()
    del layers_of(model)[0].router.made_by
    with pytest.raises(PlanError, match="nothing says how its router was made; name the `module`"):
        surgery.apply(model, ExpertPlan(method="test", layers=[keep(0, ORDER)]))


class Nulls(LinearRouter):
    """Two null choices after the experts; it is never run."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(8, num_experts, top_k=2, num_null=2)

    def score(self, x_TD: Any, bank: Any, ctx: Any) -> Any:
        raise NotImplementedError

    def choose(self, scores: Any, ctx: Any) -> Any:
        raise NotImplementedError


@torch.no_grad()
def test_rows_of_null_experts_stay_behind_those_of_the_experts() -> None:
    old, new = Nulls(4), Nulls(3)
    place = SimpleNamespace(mixture=MoELayer(old, StackedFFN(4, 8, 3), site="a"))
    layer = MoELayer(new, StackedFFN(3, 8, 3), site="a")
    filling._copy_nulls(layer, place, itself, itself)  # type: ignore[arg-type]
    assert torch.equal(new.weight[3:], old.weight[4:])
    assert not torch.equal(new.weight[:3], old.weight[:3])


def test_an_encoder_decoder_counts_its_layers_on() -> None:
    model = adopt(tiny_model("switch_transformers"))
    shape = OpenModel(model).shape
    count = model.config.num_layers
    mixtures = [layer for layer, there in shape.layers.items() if there.num_experts is not None]
    assert shape.num_layers == count + model.config.num_decoder_layers
    assert min(mixtures) < count <= max(mixtures)
    assert shape.layers[mixtures[0]].site.startswith("encoder.")
    assert shape.layers[mixtures[-1]].site.startswith("decoder.")
    call = {"decoder_input_ids": ids(seed=9)}
    before = logits(model, **call)
    order = [4, 2, 0, 1, 3]
    surgery.apply(
        model, plans.prune(shape, dict.fromkeys(mixtures, order), method="test"), calib=[{"input_ids": ids(), **call}]
    )
    torch.testing.assert_close(logits(model, **call), before, atol=1e-5, rtol=0)
    pruned = plans.prune(OpenModel(model).shape, {mixtures[-1]: [0, 1]}, method="test")
    surgery.apply(model, pruned)
    assert [layer.bank.num_experts for layer in layers_of(model)] == [5] * (len(mixtures) - 1) + [2]


def test_a_tuple_block_still_returns_a_tuple() -> None:
    model = adopt(tiny_model("gpt_oss"))
    before = logits(model)
    order = [4, 2, 0, 1, 3]
    surgery.apply(model, plans.prune(OpenModel(model).shape, {0: order, 1: order}, method="test"))
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


def test_a_plain_mixture_of_transformers_must_be_opened_first() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(PlanError, match=r"holds a MixtralSparseMoeBlock, .* must be opened with moestro.load"):
        surgery.apply(model, ExpertPlan(method="test", layers=[keep(0, [0, 1])]))
