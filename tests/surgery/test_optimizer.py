"""The optimiser moves along: groups, moments, steps; the next step is the one a fresh optimiser could not take."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro import surgery
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts
from moestro.surgery.opened import OpenModel
from moestro.surgery.plans import merge, prune
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import ids, keep, layers_of, mixture, moe_module


def trained(model: Any, steps: int = 2, **more: Any) -> torch.optim.AdamW:
    """An optimiser with two groups that has taken some steps."""
    model.train()
    vectors = [p for p in model.parameters() if p.dim() == 1]
    others = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2, **more
    )
    for seed in range(steps):
        step(model, optimizer, seed)
    return optimizer


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    batch = ids(seed=seed)
    optimizer.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()


def moment(optimizer: torch.optim.Optimizer, parameter: Tensor, key: str = "exp_avg") -> Tensor:
    found: Tensor = optimizer.state[parameter][key]
    return found


def assert_covers(optimizer: torch.optim.Optimizer, model: Any) -> None:
    """Every parameter stands in one group, in the model's order; nothing else does; states fit."""
    inside = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(inside) == len({id(p) for p in inside})
    assert {id(p) for p in inside} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}
    order = {id(p): place for place, p in enumerate(model.parameters())}
    for group in optimizer.param_groups:
        places = [order[id(p)] for p in group["params"]]
        assert places == sorted(places)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape


def test_pruning_takes_the_moments_of_what_stays() -> None:
    model = mixture()
    optimizer = trained(model)
    old = layers_of(model)[0]
    kept = {
        key: [moment(optimizer, p, key)[[3, 1]].clone() for p in (old.bank.gate_up_proj, old.router.weight)]
        for key in ("exp_avg", "exp_avg_sq")
    }
    surgery.apply(model, prune(OpenModel(model).shape, {0: [3, 1]}, method="test"), optimizer=optimizer)
    new = layers_of(model)[0]
    for key, (bank, router) in kept.items():
        assert bank.abs().sum() > 0
        assert torch.equal(moment(optimizer, new.bank.gate_up_proj, key), bank)
        assert torch.equal(moment(optimizer, new.router.weight, key), router)
    assert moment(optimizer, new.bank.down_proj, "step").item() == 2
    assert_covers(optimizer, model)


def test_an_identity_plan_does_not_change_training() -> None:
    runs = []
    for change in (False, True):
        model = mixture()
        optimizer = trained(model)
        if change:
            plan = ExpertPlan(method="test", layers=[keep(0, [0, 1, 2, 3]), keep(1, [0, 1, 2, 3])])
            surgery.apply(model, plan, optimizer=optimizer)
        for seed in (10, 11):
            step(model, optimizer, seed)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_spawned_copies_take_the_dense_moments_masked_like_the_weights() -> None:
    model = tiny_model("llama")
    optimizer = trained(model)
    mlp = model.model.layers[1].mlp
    up, down = moment(optimizer, mlp.up_proj.weight).clone(), moment(optimizer, mlp.down_proj.weight).clone()
    copies = [[ExpertSource(layer=1)], [ExpertSource(layer=1, mask=0.3)], [ExpertSource(layer=1, redraw=0.5)]]
    spawn = LayerExperts(layer=1, experts=copies, router="new", module=moe_module(3))
    surgery.apply(model, ExpertPlan(method="test", layers=[spawn]), optimizer=optimizer)
    layer = layers_of(model)[0]
    inner = layer.bank.inner
    ups = moment(optimizer, layer.bank.gate_up_proj)[:, inner:]
    downs = moment(optimizer, layer.bank.down_proj)
    assert torch.equal(ups[0], up)
    assert torch.equal(downs[0], down)
    masked = layer.bank.weight(1, "up") == 0
    assert 0.2 < masked.float().mean() < 0.4
    assert torch.equal(ups[1], up.masked_fill(masked, 0.0))
    redrawn = (ups[2] == 0).all(1)
    assert int(redrawn.sum()) == inner // 2
    assert torch.equal(downs[2], down.masked_fill(redrawn, 0.0))
    assert moment(optimizer, layer.router.weight).abs().sum() == 0
    assert moment(optimizer, layer.router.weight, "step").item() == 2
    groups = [
        group["weight_decay"] for group in optimizer.param_groups for p in group["params"] if p is layer.router.weight
    ]
    assert groups == [0.1]
    assert_covers(optimizer, model)
    step(model, optimizer, 5)


def test_merged_experts_average_their_moments() -> None:
    model = mixture()
    optimizer = trained(model)
    old = moment(optimizer, layers_of(model)[0].bank.down_proj, "exp_avg_sq").clone()
    groups = {0: [{0: 1.0, 1: 3.0}, {2: 1.0, 3: 1.0}]}
    surgery.apply(model, merge(OpenModel(model).shape, groups, method="test"), optimizer=optimizer)
    new = moment(optimizer, layers_of(model)[0].bank.down_proj, "exp_avg_sq")
    torch.testing.assert_close(new[0], 0.25 * old[0] + 0.75 * old[1])
    torch.testing.assert_close(new[1], 0.5 * old[2] + 0.5 * old[3])


def test_donors_bring_no_moments() -> None:
    model, other = mixture(seed=0), mixture(seed=1)
    optimizer = trained(model)
    mine = moment(optimizer, layers_of(model)[0].bank.down_proj).clone()
    both = [[ExpertSource(layer=0, expert=1)], [ExpertSource(donor="b", layer=0, expert=0)]]
    plan = ExpertPlan(method="test", layers=[LayerExperts(layer=0, experts=both)])
    surgery.apply(model, plan, donors={"b": other}, optimizer=optimizer)
    new = moment(optimizer, layers_of(model)[0].bank.down_proj)
    assert torch.equal(new[0], mine[1])
    assert new[1].abs().sum() == 0
    assert_covers(optimizer, model)


@pytest.mark.parametrize("steps", [0, 2])
def test_an_optimiser_of_other_parameters_is_left_alone(steps: int) -> None:
    model = mixture()
    rest = [p for name, p in model.named_parameters() if "mlp" not in name]
    optimizer = torch.optim.SGD(rest, lr=0.1, momentum=0.9)
    for seed in range(steps):
        step(model, optimizer, seed)
    surgery.apply(model, ExpertPlan(method="test", layers=[keep(0, [0, 1])]), optimizer=optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in rest]
    step(model, optimizer, 4)


def test_before_the_first_step_there_is_nothing_but_groups_to_move() -> None:
    model = mixture()
    optimizer = trained(model, steps=0)
    surgery.apply(model, ExpertPlan(method="test", layers=[keep(0, [0, 1])]), optimizer=optimizer)
    assert_covers(optimizer, model)
    assert not optimizer.state
    step(model, optimizer, 0)
    assert_covers(optimizer, model)


def test_biases_stay_among_what_is_not_decayed() -> None:
    model = tiny_model("bert")
    optimizer = trained(model)
    bias = moment(optimizer, model.bert.encoder.layer[0].output.dense.bias).clone()
    spawn = LayerExperts(layer=0, experts=[[ExpertSource(layer=0)]] * 3, router="new", module=moe_module(3))
    surgery.apply(model, ExpertPlan(method="test", layers=[spawn]), optimizer=optimizer)
    layer = layers_of(model)[0]
    free = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert {id(layer.bank.up_proj_bias), id(layer.bank.down_proj_bias)} <= free
    assert not {id(layer.bank.up_proj), id(layer.bank.down_proj), id(layer.router.weight)} & free
    assert torch.equal(moment(optimizer, layer.bank.down_proj_bias), bias.expand(3, -1))
    assert_covers(optimizer, model)


def test_remap_keeps_the_routers_moments() -> None:
    model = mixture()
    optimizer = trained(model)
    before = moment(optimizer, layers_of(model)[0].router.weight).clone()
    for groups in ([{0: 1.0, 1: 1.0}, {2: 1.0}, {3: 1.0}], [{0: 1.0, 2: 1.0}, {1: 1.0}]):
        plan = merge(OpenModel(model).shape, {0: groups}, method="test", router="remap")
        surgery.apply(model, plan, optimizer=optimizer)
        assert torch.equal(moment(optimizer, layers_of(model)[0].router.inner.weight), before)
        assert_covers(optimizer, model)
