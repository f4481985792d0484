"""Properties of plans and surgery over random plans."""

import json
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro import surgery
from moestro.core.layer import mixture_layers
from moestro.core.plan import PLANS, ExpertPlan, ExpertSource, LayerExperts
from moestro.surgery import plans
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import layers_of, logits, mixture, moe_module


QUICK = settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
INNER = 48

sources = st.builds(
    ExpertSource,
    donor=st.sampled_from(["self", "b"]),
    layer=st.integers(0, 5),
    expert=st.none() | st.integers(0, 7),
    rows=st.none() | st.lists(st.integers(0, 20), max_size=6),
    permutation=st.none() | st.permutations(range(4)),
    redraw=st.floats(0, 1),
    mask=st.floats(0, 1),
    noise=st.floats(0, 10),
    scale_down=st.floats(-8, 8),
    scale_bias=st.floats(-8, 8),
    weight=st.floats(-2, 2),
)
entries = st.builds(
    LayerExperts,
    layer=st.just(0),
    experts=st.lists(st.lists(sources, min_size=1, max_size=3), min_size=1, max_size=4),
    router=st.sampled_from(["rows", "mean", "new", "zero", "remap"]),
    module=st.none() | st.builds(moe_module, st.integers(1, 9), st.integers(1, 4)),
    shared=st.none() | st.lists(sources, min_size=1, max_size=2),
)


@given(st.lists(entries, max_size=3), st.integers(0, 2**40), st.none() | st.text("0123456789abcdef", min_size=64))
def test_plans_survive_json(layers: list[LayerExperts], seed: int, model_hash: str | None) -> None:
    numbered = [entry.model_copy(update={"layer": index}) for index, entry in enumerate(layers)]
    plan = ExpertPlan(method="test", layers=numbered, seed=seed, model_hash=model_hash, notes={"a": [1, None]})
    body = json.loads(json.dumps(plan.model_dump(mode="json")))
    assert PLANS["experts"].parse(body) == plan


@given(st.permutations(range(4)), st.permutations(range(4)), st.permutations(range(INNER)))
@QUICK
def test_orders_of_experts_and_of_inner_units_are_free(first: Any, second: Any, units: Any) -> None:
    model = mixture()
    before = logits(model)
    entries = [
        LayerExperts(
            layer=layer,
            experts=[[ExpertSource(layer=layer, expert=e, permutation=list(units))] for e in order],
        )
        for layer, order in ((0, first), (1, second))
    ]
    surgery.apply(model, ExpertPlan(method="test", layers=entries))
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


@given(st.permutations(range(4)))
@QUICK
def test_a_permutation_and_its_inverse_are_bitwise_the_identity(order: Any) -> None:
    model = mixture()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shape = OpenModel(model).shape
    surgery.apply(model, plans.prune(shape, {0: list(order)}, method="test"))
    back = torch.tensor(order).argsort().tolist()
    surgery.apply(model, plans.prune(shape, {0: back}, method="test"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@given(st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 2**31), st.booleans())
@QUICK
def test_any_equal_partition_is_the_parent(count: int, seed: int, bert: bool) -> None:
    model = tiny_model("bert" if bert else "llama")
    before = logits(model)
    cut = torch.randperm(INNER, generator=torch.Generator().manual_seed(seed)).view(count, -1)
    experts = [[ExpertSource(layer=1, rows=rows, scale_down=float(count))] for rows in cut.tolist()]
    module = moe_module(count, count, expert_size=INNER // count)
    plan = ExpertPlan(method="test", layers=[LayerExperts(layer=1, experts=experts, router="zero", module=module)])
    surgery.apply(model, plan)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


@given(st.lists(st.integers(0, 2), min_size=4, max_size=4))
@QUICK
def test_duplicates_merged_by_any_map_change_nothing(places: list[int]) -> None:
    """Experts that are copies of a few can be merged back under remap, whatever the weights."""
    names = sorted(set(places))
    model = mixture(experts=3)
    spread = LayerExperts(
        layer=0,
        experts=[[ExpertSource(layer=0, expert=place)] for place in places],
        router="new",
        module=moe_module(4),
    )
    surgery.apply(model, ExpertPlan(method="test", layers=[spread]))
    with torch.no_grad():
        layers_of(model)[0].router.weight.normal_(generator=torch.Generator().manual_seed(sum(places)))
    before = logits(model)
    groups = [{e: 1.0 + e for e in range(4) if places[e] == name} for name in names]
    surgery.apply(model, plans.merge(OpenModel(model).shape, {0: groups}, method="test", router="remap"))
    assert layers_of(model)[0].bank.num_experts == len(names)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


@given(st.dictionaries(st.sampled_from([0, 1]), st.sets(st.integers(0, 3), min_size=2).map(sorted), min_size=1))
@QUICK
def test_the_receipt_accounts_for_every_expert(kept: dict[int, list[int]]) -> None:
    model = mixture()
    receipt = surgery.apply(model, plans.prune(OpenModel(model).shape, kept, method="test"))
    assert receipt["ledger"]["layers"] == sorted(kept)
    assert receipt["ledger"]["experts_per_layer"] == [len(kept[layer]) for layer in sorted(kept)]
    assert receipt["ledger"]["rows_touched"] == 4 * sum(map(len, kept.values()))
    for entry in receipt["layers"]:
        assert sorted(entry["unused"] + kept[entry["layer"]]) == [0, 1, 2, 3]
    counts = [kept.get(layer, range(4)) for layer in (0, 1)]
    assert [layer.bank.num_experts for layer in mixture_layers(model).values()] == [len(list(c)) for c in counts]
