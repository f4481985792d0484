"""Plans applied to open models: what moves, what stays, what the receipt says."""

from pathlib import Path
from typing import Any

import pytest
import torch

import moestro
from moestro import surgery
from moestro.core.errors import PlanError
from moestro.core.inputs import ModelShape
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts
from moestro.core.remap import RemapRouter
from moestro.core.session import session
from moestro.models.swap import state_of
from moestro.surgery import plans
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import ids, keep, layers_of, logits, mixture, moe_module


def shape(model: Any) -> ModelShape:
    return OpenModel(model).shape


def plan_of(*layers: LayerExperts, **fields: Any) -> ExpertPlan:
    return ExpertPlan(method="test", layers=list(layers), **fields)


def test_the_identity_is_bitwise_the_identity() -> None:
    model = mixture()
    before, tensors = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    receipt = surgery.apply(model, plan_of(keep(0, [0, 1, 2, 3]), keep(1, [0, 1, 2, 3])), calib=[ids()])
    assert torch.equal(logits(model), before)
    after = model.state_dict()
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert receipt["parity"]["as_routed"]["max_abs_diff"] == 0.0
    assert receipt["parity"]["as_routed"]["rows"] == 14
    # gate, up, down and the router's row of 4 experts in 2 layers
    assert receipt["ledger"]["rows_touched"] == 2 * 4 * 4
    assert receipt["parameters"]["before"] == receipt["parameters"]["after"]


def test_a_permutation_of_experts_keeps_the_logits() -> None:
    model = mixture()
    before = logits(model)
    old = layers_of(model)[1]
    surgery.apply(model, plans.prune(shape(model), {1: [2, 0, 3, 1]}, method="test"))
    new = layers_of(model)[1]
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    assert torch.equal(new.router.weight, old.router.weight[[2, 0, 3, 1]])
    assert torch.equal(new.bank.gate_up_proj, old.bank.gate_up_proj[[2, 0, 3, 1]])


def test_pruning_keeps_the_rows_of_what_stays_and_only_those() -> None:
    model = mixture()
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    receipt = surgery.apply(model, plans.prune(shape(model), {0: [1, 3]}, method="test"))
    first, second = layers_of(model)
    assert (first.router.num_experts, first.bank.num_experts) == (2, 2)
    site = "model.layers.0.mlp"
    for name in ("router.weight", "bank.gate_up_proj", "bank.down_proj"):
        assert torch.equal(model.state_dict()[f"{site}.{name}"], tensors[f"{site}.{name}"][[1, 3]])
    others = [name for name in tensors if not name.startswith(site)]
    assert all(torch.equal(model.state_dict()[name], tensors[name]) for name in others)
    assert second.bank.num_experts == 4
    entry = receipt["layers"][0]
    assert (entry["experts_before"], entry["experts_after"], entry["unused"]) == (4, 2, [0, 2])


def test_pruned_routing_is_the_full_routing_wherever_its_choice_survives() -> None:
    model = mixture(top_k=1)
    layer = layers_of(model)[0]
    x = torch.randn(200, 32)
    full = (x @ layer.router.weight.T).argmax(1)
    surgery.apply(model, plans.prune(shape(model), {0: [1, 3]}, method="test"))
    pruned = (x @ layers_of(model)[0].router.weight.T).argmax(1)
    for new, old in enumerate((1, 3)):
        assert (full == old).any()
        assert (pruned[full == old] == new).all()


def test_a_merge_is_the_weighted_mean_of_experts_and_rows() -> None:
    model = mixture()
    old = layers_of(model)[0]
    up, down, row = old.bank.gate_up_proj.clone(), old.bank.down_proj.clone(), old.router.weight.clone()
    groups = {0: [{0: 3.0, 2: 1.0}, {1: 1.0}, {3: 5.0}]}
    surgery.apply(model, plans.merge(shape(model), groups, method="test"))
    new = layers_of(model)[0]
    torch.testing.assert_close(new.bank.gate_up_proj[0], 0.75 * up[0] + 0.25 * up[2])
    torch.testing.assert_close(new.bank.down_proj[0], 0.75 * down[0] + 0.25 * down[2])
    torch.testing.assert_close(new.router.weight[0], 0.75 * row[0] + 0.25 * row[2])
    assert torch.equal(new.bank.gate_up_proj[1:], up[[1, 3]])
    assert torch.equal(new.router.weight[1:], row[[1, 3]])


def test_merging_a_permuted_copy_back_with_remap_keeps_the_logits() -> None:
    model = mixture()
    inner = shape(model).layers[0].inner
    order = torch.randperm(inner).tolist()
    # expert 3 becomes a copy of expert 1 with its inner units in another order
    twin = LayerExperts(
        layer=0,
        experts=[[ExpertSource(layer=0, expert=e)] for e in range(3)]
        + [[ExpertSource(layer=0, expert=1, permutation=order)]],
        module=shape(model).layers[0].module,
        router="new",
    )
    surgery.apply(model, plan_of(twin))
    with torch.no_grad():
        layers_of(model)[0].router.weight.normal_()
    before = logits(model)
    back = torch.tensor(order).argsort().tolist()
    groups = {0: [{0: 1.0}, {1: 1.0, 3: 1.0}, {2: 1.0}]}
    aligned = plans.merge(shape(model), groups, method="test", router="remap", permutations={0: {3: back}})
    surgery.apply(model, aligned)
    layer = layers_of(model)[0]
    assert isinstance(layer.router, RemapRouter)
    assert layer.router.mapping == [0, 1, 2, 1]
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


def test_a_remapped_layer_can_be_merged_again() -> None:
    model = mixture()
    surgery.apply(
        model, plans.merge(shape(model), {0: [{0: 1.0, 3: 1.0}, {1: 1.0}, {2: 1.0}]}, method="test", router="remap")
    )
    rows = layers_of(model)[0].router.inner.weight.clone()
    surgery.apply(model, plans.merge(shape(model), {0: [{1: 1.0}, {0: 1.0, 2: 1.0}]}, method="test", router="remap"))
    router = layers_of(model)[0].router
    assert router.mapping == [1, 0, 1, 1]
    assert torch.equal(router.inner.weight, rows)


def test_a_remapped_layer_can_be_pruned() -> None:
    """The choices that lead to an expert go with it; the others choose as a router of the rows that are left."""
    model = mixture()
    groups = {0: [{0: 1.0, 3: 1.0}, {1: 1.0}, {2: 1.0}]}
    surgery.apply(model, plans.merge(shape(model), groups, method="test", router="remap"))
    before = layers_of(model)[0]
    rows, experts = before.router.inner.weight.clone(), before.bank.gate_up_proj.clone()
    receipt = surgery.apply(model, plans.prune(shape(model), {0: [2, 0]}, method="test"))
    layer = layers_of(model)[0]
    assert layer.router.mapping == [1, 0, 1]
    assert torch.equal(layer.router.inner.weight, rows[[0, 2, 3]])
    assert torch.equal(layer.bank.gate_up_proj, experts[[2, 0]])
    # Three matrices and a router row of each expert.
    assert receipt["ledger"]["rows_touched"] == receipt["ledger"]["rows_expected"] == 8
    with session(collect=True) as opened, torch.no_grad():
        logits(model)
    (ctx,) = opened.take()
    routing = ctx.routings[layer.site]
    weight_TC = torch.softmax(inner_logits(model, layer), -1)
    top_TK, id_TK = weight_TC.topk(2)
    want_TE = torch.zeros(len(top_TK), 2).index_put(
        (torch.arange(len(top_TK))[:, None].expand(-1, 2), torch.tensor([1, 0, 1])[id_TK]),
        top_TK / top_TK.sum(-1, keepdim=True),
        accumulate=True,
    )
    found_TE = torch.zeros_like(want_TE).index_put((routing.token_N, routing.expert_N), routing.weight_N)
    torch.testing.assert_close(found_TE, want_TE)


def inner_logits(model: Any, layer: Any) -> torch.Tensor:
    """Raw logits [T, 3] of the choices of a layer's inner router, from the layer's input."""
    with session(collect=True, keeps=["input"]) as opened, torch.no_grad():
        logits(model)
    (ctx,) = opened.take()
    found: torch.Tensor = ctx.kept[layer.site, "input"] @ layer.router.inner.weight.T
    return found.detach()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"router": "mean"}, "router=mean has no meaning; use router=rows or router=remap"),
        ({"experts": [[ExpertSource(layer=0, expert=1)]] * 2}, "which no other takes; use router=new"),
        ({"experts": [[ExpertSource(layer=1, expert=1)]]}, "which no other takes; use router=new"),
        ({"experts": [[ExpertSource(layer=0, expert=1)]]}, "top_k=2 but 1 groups of 1 hold only 1 experts"),
    ],
)
def test_what_a_remapped_router_cannot_become(change: dict[str, Any], words: str) -> None:
    model = mixture()
    groups = {0: [{0: 1.0, 3: 1.0}, {1: 1.0}, {2: 1.0}]}
    surgery.apply(model, plans.merge(shape(model), groups, method="test", router="remap"))
    entry = LayerExperts(**({"layer": 0, "experts": [[ExpertSource(layer=0, expert=e)] for e in (0, 1)]} | change))
    with pytest.raises(PlanError, match=words):
        surgery.apply(model, ExpertPlan(method="test", layers=[entry]))
    anew = entry.model_copy(update={"router": "new", "experts": [[ExpertSource(layer=0, expert=e)] for e in (0, 1)]})
    surgery.apply(model, ExpertPlan(method="test", layers=[anew]))
    assert not isinstance(layers_of(model)[0].router, RemapRouter)


def test_experts_may_come_from_other_layers_even_changed_ones() -> None:
    model = mixture()
    first, second = (layer.bank.gate_up_proj.clone() for layer in layers_of(model))
    crossed = [
        LayerExperts(layer=0, experts=[[ExpertSource(layer=1, expert=e)] for e in (0, 1)]),
        LayerExperts(layer=1, experts=[[ExpertSource(layer=0, expert=e)] for e in (2, 3)]),
    ]
    surgery.apply(model, plan_of(*crossed))
    assert torch.equal(layers_of(model)[0].bank.gate_up_proj, second[:2])
    assert torch.equal(layers_of(model)[1].bank.gate_up_proj, first[2:])


def test_aggregation_puts_donors_side_by_side() -> None:
    model, other = mixture(seed=0), mixture(seed=1)
    alone = logits(model)
    mine, theirs = layers_of(model)[0].router.weight.clone(), layers_of(other)[0].router.weight.clone()
    shapes = {"self": shape(model), "b": shape(other)}
    plan = plans.aggregate(shapes, [0, 1], method="test")
    receipt = surgery.apply(model, plan, donors={"b": other})
    assert torch.equal(layers_of(model)[0].router.weight, torch.cat([mine, theirs]))
    assert torch.equal(layers_of(model)[1].bank.down_proj[4:], layers_of(other)[1].bank.down_proj)
    assert receipt["layers"][0]["donors"] == ["b"]

    class OnlyMine(moestro.Edit):
        def on_scores(self, site: str, scores: Any, ctx: Any) -> Any:
            closed = scores.logits_TC.clone()
            closed[:, 4:] = float("-inf")
            return scores.replace(select_TC=closed.softmax(-1), gate_TC=closed.softmax(-1))

    with moestro.session(edits=[OnlyMine()]):
        torch.testing.assert_close(logits(model), alone, atol=1e-5, rtol=0)


def test_the_rest_can_be_averaged_or_taken_from_a_donor() -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    for rest in ("keep", "mean", "b"):
        model, other = mixture(seed=0), mixture(seed=1)
        mine, theirs = model.state_dict()[name].clone(), other.state_dict()[name].clone()
        bank = layers_of(model)[0].bank.down_proj.clone()
        surgery.apply(model, plan_of(keep(0, [0, 1, 2, 3]), keep(1, [0, 1]), rest=rest), donors={"b": other})
        expected = {"keep": mine, "mean": (mine + theirs) / 2, "b": theirs}[rest]
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=0, atol=1e-7)
        assert torch.equal(layers_of(model)[0].bank.down_proj, bank)
        assert torch.equal(other.state_dict()[name], theirs)


def test_tied_embeddings_stay_tied_after_averaging() -> None:
    models = [tiny_model("llama", seed=seed, tie_word_embeddings=True) for seed in (0, 1)]
    dense = LayerExperts(layer=0, experts=[[ExpertSource(layer=0)]] * 2, router="new", module=moe_module(2, 1))
    mean = (models[0].lm_head.weight + models[1].lm_head.weight) / 2
    surgery.apply(models[0], plan_of(dense, rest="mean"), donors={"b": models[1]})
    assert models[0].lm_head.weight is models[0].model.embed_tokens.weight
    torch.testing.assert_close(models[0].lm_head.weight, mean)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_changed_model_saves_and_reopens(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    surgery.apply(model, plans.prune(shape(model), {0: [0, 2, 3]}, method="test"))
    surgery.apply(
        model, plans.merge(shape(model), {1: [{0: 1.0, 1: 2.0}, {2: 1.0, 3: 1.0}]}, method="test", router="remap")
    )
    before = logits(model)
    moestro.save(model, tmp_path / "out")
    again = moestro.load(tmp_path / "out")
    assert torch.equal(logits(again), before)
    assert [layer.bank.num_experts for layer in layers_of(again)] == [3, 2]


def test_layers_that_differ_are_one_entry_with_lists() -> None:
    model = mixture()
    surgery.apply(model, plan_of(keep(0, [0, 1, 2]), keep(1, [1, 2])))
    entry = state_of(model).swaps[-1]
    assert entry.sites == ["decoder:layers.0.mlp", "decoder:layers.1.mlp"]
    assert entry.config["num_experts"] == {"per_layer": [3, 2]}
    assert entry.config["router"]["method"] == "train.softmax_topk"
    assert entry.config["router"]["config"]["top_k"] == 2
    assert "num_experts" not in entry.config["router"]["config"]


def test_bfloat16_models_stay_bfloat16_and_copies_exact() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight.clone()
    dense = LayerExperts(
        layer=0,
        experts=[[ExpertSource(layer=0)], [ExpertSource(layer=0, noise=0.5)]],
        router="new",
        module=moe_module(2, 1),
    )
    surgery.apply(model, plan_of(dense))
    layer = layers_of(model)[0]
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert torch.equal(layer.bank.weight(0, "up"), weight)
    assert not torch.equal(layer.bank.weight(1, "up"), weight)
    assert torch.get_default_dtype() == torch.float32


def test_the_router_starts_from_the_plans_seed_not_from_the_callers() -> None:
    rows = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = torch.random.get_rng_state()
        model = tiny_model("llama")
        dense = LayerExperts(layer=1, experts=[[ExpertSource(layer=1)]] * 3, router="new", module=moe_module(3))
        torch.random.set_rng_state(state)
        surgery.apply(model, plan_of(dense, seed=7))
        assert torch.equal(torch.random.get_rng_state(), state)
        rows.append(layers_of(model)[0].router.weight)
    assert torch.equal(*rows)
    assert rows[0].abs().sum() > 0


def test_training_and_frozen_flags_carry_over() -> None:
    model = mixture().train()
    layer = layers_of(model)[0]
    layer.bank.requires_grad_(False)
    surgery.apply(model, plan_of(keep(0, [0, 1])))
    new = layers_of(model)[0]
    assert new.training
    assert not any(p.requires_grad for p in new.bank.parameters())
    assert all(p.requires_grad for p in new.router.parameters())


def test_what_surrounds_the_experts_stays() -> None:
    model = mixture()
    layer = layers_of(model)[0]
    layer.shared, layer.noise = torch.nn.Linear(32, 32), torch.nn.Identity()
    layer.losses["kept"] = loss = moestro.method("train.balance_loss").module.BalanceLoss(
        moestro.method("train.balance_loss").configure()
    )
    before = logits(model)
    surgery.apply(model, plan_of(keep(0, [0, 1, 2, 3])))
    new = layers_of(model)[0]
    assert (new.shared, new.noise, new.losses["kept"]) == (layer.shared, layer.noise, loss)
    assert new is not layer
    assert torch.equal(logits(model), before)
