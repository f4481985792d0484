"""MC-MoE: the programme against brute force and HiGHS, sensitivities against whole forwards, budgets."""

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moestro
from moestro import surgery
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import PlanInputs
from moestro.core.layer import mixture_layers
from moestro.core.packed import PackedFFN
from moestro.core.plan import BitPlan
from moestro.core.registry import method
from moestro.core.session import session
from moestro.methods.compress._parts.programme import allocate
from moestro.methods.compress._parts.sensitivity import rounded, sensitivity
from moestro.methods.planning import make_plan
from moestro.observe import calibrate
from moestro.observe.moments import GroupMoments
from moestro.ops.formats import packing
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_folder
from tests.surgery.helpers import assert_untouched, ids, layers_of, snapshot


USE = method("compress.mc_moe")
PACKINGS = [packing(spelled) for spelled in ("sign1:g16", "uint2:g16", "uint3:g16")]
BATCHES = [{"input_ids": ids(3, 11, seed)} for seed in range(2)]


def brute(cost: np.ndarray, size: list[int], budget: int, exact: bool, least: list[int]) -> float:
    """The cheapest of all assignments; infinity if none keeps the budget."""
    experts, widths = cost.shape
    best = np.inf
    for chosen in itertools.product(range(widths), repeat=experts):
        used = sum(size[j] for j in chosen)
        fits = used == budget if exact else used <= budget
        if fits and all(chosen.count(j) >= n for j, n in enumerate(least)):
            best = min(best, sum(cost[i, j] for i, j in enumerate(chosen)))
    return best


def solved_by_highs(cost: np.ndarray, size: list[int], budget: int, exact: bool, least: list[int]) -> float:
    from scipy.optimize import Bounds, LinearConstraint, milp

    experts, widths = cost.shape
    once = np.kron(np.eye(experts), np.ones(widths))
    total = np.tile(size, experts)
    counts = np.tile(np.eye(widths), experts)
    rules = [
        LinearConstraint(once, 1, 1),
        LinearConstraint(total, budget if exact else -np.inf, budget),
        LinearConstraint(counts, least, np.inf),
    ]
    options = {"mip_rel_gap": 0.0}
    found = milp(cost.ravel(), constraints=rules, integrality=1, bounds=Bounds(0, 1), options=options)
    assert found.status == 0, found.message
    return float(found.fun)


@given(
    experts=st.integers(2, 6), exact=st.booleans(), bytes_=st.booleans(), seed=st.integers(0, 10_000),
    least=st.sampled_from([[0, 0, 0], [0, 1, 1], [1, 0, 2]]),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_the_programme_is_solved_exactly(experts: int, exact: bool, bytes_: bool, seed: int, least: list[int]) -> None:
    draw = np.random.default_rng(seed)
    cost = draw.random((experts, 3)) if seed % 3 else np.sort(draw.random((experts, 3)))[:, ::-1].copy()
    size = [24, 40, 57] if bytes_ else [1, 2, 3]
    budget = int(draw.integers(experts * size[0] - 2, experts * size[-1] + 3))
    expected = brute(cost, size, budget, exact, least)
    if not np.isfinite(expected):
        with pytest.raises(PlanError):
            allocate(cost, size, budget, exact=exact, least_J=least)
        return
    chosen = allocate(cost, size, budget, exact=exact, least_J=least)
    used = sum(size[j] for j in chosen)
    assert used == budget if exact else used <= budget
    assert all(chosen.count(j) >= n for j, n in enumerate(least))
    assert sum(cost[i, j] for i, j in enumerate(chosen)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("experts", "exact"), [(16, True), (40, True), (40, False)])
def test_highs_finds_the_same_optimum(experts: int, exact: bool) -> None:
    draw = np.random.default_rng(experts)
    cost = draw.random((experts, 1)) ** 2 * draw.random((experts, 3)) * [9, 3, 1]
    size = [1, 2, 3] if exact else [24576, 41472, 58880]
    budget = int(experts * 2.2) if exact else experts * 37000
    chosen = allocate(cost, size, budget, exact=exact, least_J=[0, 1, 1])
    mine = sum(cost[i, j] for i, j in enumerate(chosen))
    assert mine == pytest.approx(solved_by_highs(cost, size, budget, exact, [0, 1, 1]), rel=1e-6)


def test_a_layer_of_256_experts_takes_less_than_a_second() -> None:
    cost = np.random.default_rng(0).random((256, 3))
    started = time.process_time()
    allocate(cost, [1, 2, 3], 600, exact=True, least_J=[0, 1, 1])
    allocate(cost, [24576, 41472, 58880], 256 * 40000, exact=False, least_J=[0, 1, 1])
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("experts", "budget", "change", "words"),
    [
        (4, 6, {}, "a budget of 6 for 4 experts cannot be kept; .* between 7 and 11"),
        (4, 12, {}, "between 7 and 11"),
        (1, 3, {}, "cannot be kept"),
        (4, 8, {"cost": -1.0}, "negative or not a number"),
        (4, 8, {"cost": float("nan")}, "negative or not a number"),
    ],
)
def test_budgets_that_cannot_be_kept(experts: int, budget: int, change: dict[str, float], words: str) -> None:
    cost = np.full((experts, 3), 1.0)
    cost[0, 0] = change.get("cost", 1.0)
    with pytest.raises(PlanError, match=words):
        allocate(cost, [1, 2, 3], budget, exact=True, least_J=[0, 1, 1])


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_sensitivity_is_that_of_whole_forwards_of_the_block(family: str, tmp_path: Path) -> None:
    """Only expert i changed, the layer's output against before, norms of batches added up."""
    tiny_folder(family, tmp_path / "in")
    model = moestro.load(tmp_path / "in")
    layers = [layer for layer, there in OpenModel(model).shape.layers.items() if there.num_experts is not None]
    before = snapshot(model)
    eps = sensitivity(model, BATCHES, layers, PACKINGS)
    assert_untouched(model, before)
    layer = OpenModel(model).place(layers[-1]).mixture
    outputs = run(model, layer.site)
    for expert in (0, 2):
        for place, used in enumerate(PACKINGS):
            old = {name: layer.bank.weight(expert, name).detach().clone() for name in layer.bank.projections}
            with torch.no_grad():
                for name, matrix in old.items():
                    layer.bank.weight(expert, name).copy_(rounded(matrix, used))
            moved = run(model, layer.site)
            expected = sum(float((a - b).norm()) for a, b in zip(moved, outputs, strict=True))
            assert float(eps[layers[-1]][expert, place]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
            with torch.no_grad():
                for name, matrix in old.items():
                    layer.bank.weight(expert, name).copy_(matrix)


def run(model: nn.Module, site: str) -> list[torch.Tensor]:
    """The layer's output for each batch."""
    with session(collect=True, keeps=["output"]) as opened, torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    return [ctx.kept[site, "output"] for ctx in opened.take()]


def test_a_softmax_over_the_choice_counts_by_probabilities_and_not_by_logits(tmp_path: Path) -> None:
    """Such a router hands over raw logits, which may be negative."""
    tiny_folder("gpt_oss", tmp_path / "in")
    model = moestro.load(tmp_path / "in")
    for layer in layers_of(model):
        with torch.no_grad():
            layer.router.bias.sub_(50.0)  # the same choices and weights, and every logit far below zero
    note = planned(model).notes["layers"][1]
    known = calibrate(model, BATCHES, allow_starved=True)[1]
    assert min(note["weight"]) >= 0
    assert note["weight"] == known.gate.total.tolist()
    assert note["tokens"] == known.count_E.tolist()


def test_frequency_and_weight_are_counted_by_hand(tmp_path: Path) -> None:
    tiny_folder("olmoe", tmp_path / "in")  # weights of the chosen do not sum to 1
    model = moestro.load(tmp_path / "in")
    plan = planned(model)
    note = plan.notes["layers"][1]
    count, weight = torch.zeros(6), torch.zeros(6)
    with session(collect=True) as opened, torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    for ctx in opened.take():
        routing = ctx.routings["model.layers.1.mlp"]
        probability = torch.softmax(routing.scores.logits_TC, -1)
        for token, expert in zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True):
            count[expert] += 1
            weight[expert] += probability[token, expert]
    assert plan.notes["calibration"]["tokens"] == 66
    assert note["tokens"] == count.tolist()
    torch.testing.assert_close(torch.tensor(note["weight"]), weight, atol=1e-4, rtol=1e-4)


def test_a_policy_adds_tokens_to_the_programme_and_to_gptq(model: Any) -> None:
    """Under `all` every expert counts every token, so that frequencies are equal and no sensitivity is 0."""
    natural, every = planned(model), planned(model, policy="all")
    for note, other in zip(natural.notes["layers"], every.notes["layers"], strict=True):
        assert other["tokens"] == [66] * 5
        assert sum(note["tokens"]) == 66 * 2
        assert np.min(other["sensitivity"]) > 0
        raised = planned(model, policy="raised", raise_to=3)
        assert sum(raised.notes["layers"][0]["tokens"]) == 66 * 3
    used = [USE.entry("rounding")(USE.configure({"policy": policy})) for policy in ("natural", "all")]
    site = layers_of(model)[0].site
    counts = [next(rounding.walk(model, BATCHES, {1: site}, None, None))[1].count_E for rounding in used]
    assert counts[0].tolist() == natural.notes["layers"][0]["tokens"]
    assert counts[1].tolist() == [66] * 5


def starve(model: Any) -> None:
    """Make the first mixture's router choose experts 0 and 1 of five for every token."""
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 5.0
        norm = model.model.layers[1].post_attention_layernorm.weight
        norm.copy_(torch.eye(len(norm))[0])  # the router sees the first channel only, and that is positive
        router = layers_of(model)[0].router.weight
        router.zero_()
        router[:2, 0] = torch.tensor([4.0, 3.0])


def test_data_that_starves_half_of_the_experts(model: Any) -> None:
    """Refused with numbers; asked for, every expert is packed, nothing is NaN, and the receipt lists the starved."""
    starve(model)
    before = snapshot(model)
    words = "gives 3 of 5 experts of model.layers.1.mlp fewer than 1 tokens.*policy=raised.*allow_starved=true"
    with pytest.raises(PlanError, match=words):
        planned(model)
    assert_untouched(model, before)
    assert planned(model, policy="all").notes["calibration"]["layers"][0]["starved"] == []
    plan = planned(model, allow_starved=True)
    note = plan.notes["layers"][0]
    assert note["tokens"] == [66, 66, 0, 0, 0]
    assert not np.any(note["sensitivity"][2:])
    receipt = surgery.apply(model, plan, calib=[batch["input_ids"] for batch in BATCHES])
    assert receipt["notes"]["calibration"]["layers"][0]["starved"] == [2, 3, 4]
    assert receipt["layers"][0]["starved"] == [2, 3, 4]
    rows = receipt["notes"]["calibration"]["layers"]
    unseen = [f"{row['layer']}/{expert}" for row in rows for expert in row["starved"]]
    assert unseen[:3] == ["1/2", "1/3", "1/4"]
    told = f"{len(unseen)} experts saw no calibration token and were rounded to the nearest: {', '.join(unseen)}"
    assert told in receipt["warnings"]
    assert receipt["ledger"]["rows_touched"] == receipt["ledger"]["rows_expected"] == 30
    assert all(isinstance(layer.bank, PackedFFN) for layer in layers_of(model))
    with torch.no_grad():
        assert model(**BATCHES[0]).logits.isfinite().all()


def planned(model: Any, seed: int = 0, **config: Any) -> BitPlan:
    found = make_plan(USE, model, {"group_size": 16, **config}, batches=BATCHES, seed=seed)
    assert isinstance(found, BitPlan)
    return found


@pytest.fixture
def model(tmp_path: Path) -> Any:
    tiny_folder("qwen3_moe", tmp_path / "in")
    return moestro.load(tmp_path / "in")


@pytest.mark.parametrize("avg_bits", [1.6, 2.0, 2.5])
def test_a_layer_uses_its_bits_up(model: Any, avg_bits: float) -> None:
    plan = planned(model, avg_bits=avg_bits)
    for note in plan.notes["layers"]:
        assert sum(note["bits"]) == note["budget"] == int(5 * avg_bits + 1e-9)
        assert note["bits"].count(3) >= 1
        assert note["bits"].count(2) >= 1
    receipt = surgery.apply(model, plan, calib=[batch["input_ids"] for batch in BATCHES])
    bank = sum(layer.bank.nbytes(e) for layer in mixture_layers(model).values() for e in range(5))
    assert bank == sum(note["bytes"] for note in plan.notes["layers"]) == receipt["bytes"]["experts"]["after"]
    assert receipt["ledger"]["rows_touched"] == 30
    assert receipt["notes"] == plan.notes


def test_a_budget_of_bytes_is_kept_and_used(model: Any) -> None:
    sizes = {
        bits: planned(model, allocation="uniform", avg_bits=bits).notes["layers"][0]["bytes"] // 5 for bits in (1, 2, 3)
    }
    budget = 2 * sizes[2] + 2 * sizes[3] + sizes[1] + 3
    for note in planned(model, layer_bytes=budget).notes["layers"]:
        assert note["bytes"] <= budget < note["bytes"] + sizes[2]  # one expert more would not fit a wider format
    with pytest.raises(PlanError, match=f"layer 1: a budget of {sizes[1]} for 5 experts cannot be kept"):
        planned(model, layer_bytes=sizes[1])


def test_allocations_differ_in_what_decides(model: Any) -> None:
    """A frequent expert wins by frequency, a heavy one by weight, a sensitive one by sensitivity."""
    from moestro.methods.compress.mc_moe import widths_of

    count, weight = [50, 10, 10, 10, 10], torch.tensor([1.0, 9, 1, 1, 1])
    seen = calibrate(model, BATCHES)[1]
    seen.weight, seen.gate = GroupMoments(5), GroupMoments(5)
    for expert, tokens in enumerate(count):
        for moments in (seen.weight, seen.gate):
            moments.add(torch.full((tokens,), expert), weight[expert].expand(tokens) / tokens)
    eps = torch.tensor([[4.0, 2, 1], [4, 2, 1], [40, 20, 10], [4, 2, 1], [4, 2, 1]]).double()
    there = OpenModel(model).shape.layers[1]
    for allocation, winner in (("frequency", 0), ("weight", 1), ("sensitivity", 2)):
        config = USE.configure({"avg_bits": 1.6, "allocation": allocation, "group_size": 16})
        widths, _, _ = widths_of(there, seen, eps, config, 0)
        assert widths[winner] == 3
        assert sum(widths) == 8
    pmq = widths_of(there, seen, eps, USE.configure({"avg_bits": 1.6, "group_size": 16}), 0)
    dealt = [
        widths_of(there, seen, eps, USE.configure({"avg_bits": 1.6, "allocation": "random", "group_size": 16}), s)
        for s in range(8)
    ]
    assert all(sorted(widths) == sorted(pmq[0]) and taken == pmq[2] for widths, _, taken in dealt)
    assert len({tuple(widths) for widths, _, _ in dealt}) > 2


def test_what_it_needs_is_asked_for(model: Any) -> None:
    config = USE.configure({"group_size": 16})
    with pytest.raises(PlanError, match="measures on data; give an open model and calibration data"):
        USE.plan(PlanInputs(subject=OpenModel(model)), config)
    with pytest.raises(PlanError, match=r"compress\.mc_moe measures experts on data .* give calibration data"):
        make_plan(USE, model)
    surgery.apply(model, planned(model), calib=[ids()])
    with pytest.raises(PlanError, match="packed ones are not packed again"):
        planned(model)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"choices": [3, 1]}, "must rise"),
        ({"choices": [1, 2]}, "require names 3 bits"),
        ({"allocation": "uniform", "avg_bits": 2.5}, "uniform needs avg_bits among"),
        ({"choices": [5]}, "choices"),
    ],
)
def test_settings_that_cannot_work(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        USE.configure(values)
