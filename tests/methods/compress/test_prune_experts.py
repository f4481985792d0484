"""Pruning: each criterion against sums written out, who stays, and what becomes of the model."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import moestro
from moestro import surgery
from moestro.core.errors import ConfigError, ContextError, PlanError, SaveError
from moestro.core.session import session
from moestro.methods.compress import prune_experts
from moestro.methods.planning import make_plan
from moestro.models.swap import swap
from moestro.observe import calibrate
from moestro.surgery.opened import OpenModel
from tests.methods.compress.helpers import applied, batches, layers_of, opened, planned, routings
from tests.surgery.helpers import logits, mixture


PRUNE = "compress.prune_experts"


def kept_of(plan: Any) -> dict[int, list[int]]:
    return {entry.layer: [sources[0].expert for sources in entry.experts] for entry in plan.layers}


def by_hand(model: nn.Module, layer: int) -> dict[str, torch.Tensor]:
    """The scores of a layer's experts, token by token."""
    mixed = layers_of(model)[layer]
    rows: list[torch.Tensor] = []
    handle = mixed.register_forward_pre_hook(lambda module, args: rows.append(args[0].reshape(-1, args[0].shape[-1])))
    for batch in batches():
        logits(model, batch)
    handle.remove()
    experts = mixed.bank.num_experts
    found = {name: torch.zeros(experts, dtype=torch.float64) for name in ("frequency", "router_weight", "norm", "reap")}
    with torch.no_grad():
        for x in torch.cat(rows):
            gate_E = (mixed.router.weight @ x).softmax(0)
            top = gate_E.topk(2).indices.tolist()
            for expert in top:
                gate, up = mixed.bank.weight(expert, "gate") @ x, mixed.bank.weight(expert, "up") @ x
                length = (mixed.bank.weight(expert, "down") @ (nn.functional.silu(gate) * up)).norm()
                found["frequency"][expert] += 1
                found["router_weight"][expert] += gate_E[expert]
                found["norm"][expert] += length
                found["reap"][expert] += length * gate_E[expert] / gate_E[top].sum()
    used = found["frequency"].clamp(min=1)
    return {**found, "output_norm": found["norm"] / used, "reap": found["reap"] / used}


@pytest.mark.parametrize("criterion", ["frequency", "router_weight", "output_norm", "reap"])
def test_scores_are_the_sums_written_out(criterion: str) -> None:
    model = mixture("llama", experts=6, top_k=2)
    plan = planned(PRUNE, model, criterion=criterion, keep=4, allow_starved=True)
    for layer, kept in kept_of(plan).items():
        want = by_hand(model, layer)[criterion]
        found = torch.tensor(plan.notes["scores"][str(layer)], dtype=torch.float64)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
        assert kept == sorted(want.argsort(descending=True)[:4].tolist())


def test_gates_of_a_softmax_over_the_choice_are_those_of_one_over_all(tmp_path: Path) -> None:
    """Its raw logits are no gates: with low ones the experts used most would go first."""
    model = opened("gpt_oss", tmp_path)
    for layer in layers_of(model):
        with torch.no_grad():
            layer.router.bias -= 3.0
    plan = planned(PRUNE, model, criterion="router_weight", keep=4, allow_starved=True)
    want_E, experts = torch.zeros(5, dtype=torch.float64), layers_of(model)[0].router.num_experts
    for batch in batches():
        routing = routings(model, batch)[0]
        gate_TE = routing.scores.logits_TC.double().softmax(-1)
        want_E += torch.zeros(experts, dtype=torch.float64).index_add(
            0, routing.expert_N, gate_TE[routing.token_N, routing.expert_N]
        )
    torch.testing.assert_close(torch.tensor(plan.notes["scores"]["0"], dtype=torch.float64), want_E)
    assert kept_of(plan)[0] == sorted(want_E.topk(4).indices.tolist())


def test_router_norm_needs_no_data_and_is_the_length_of_a_row() -> None:
    model = mixture("llama", experts=6)
    plan = make_plan(PRUNE, model, {"criterion": "router_norm", "keep": 3})
    for layer, mixed in enumerate(layers_of(model)):
        length_E = mixed.router.weight.detach().square().sum(1).sqrt()
        assert plan.notes["scores"][str(layer)] == pytest.approx(length_E.tolist())
        assert kept_of(plan)[layer] == sorted(length_E.topk(3).indices.tolist())


def test_a_broken_expert_is_named_and_not_kept_as_the_best() -> None:
    model = mixture("llama", experts=5, top_k=2)
    with torch.no_grad():
        whole = layers_of(model)[-1].bank.down_proj.clone()
        layers_of(model)[-1].bank.down_proj[3] = torch.nan
    for criterion in ("random", "reap"):
        with pytest.raises(
            PlanError, match=r"down_proj: \d+ of \d+ weights are NaN or infinite; repair the checkpoint"
        ):
            planned(PRUNE, model, criterion=criterion, keep=4, allow_starved=True)
    measured = calibrate(model, batches(), outputs=True, sample=16, allow_starved=True)
    with torch.no_grad():
        layers_of(model)[-1].bank.down_proj.copy_(whole)
    for criterion in ("output_norm", "reap", "reconstruction"):
        with pytest.raises(PlanError, match=rf"layer 1: the {criterion} of \d of 5 experts is NaN"):
            make_plan(PRUNE, model, {"criterion": criterion, "keep": 4}, statistics={"experts": measured})
    found = make_plan(PRUNE, model, {"criterion": "frequency", "keep": 4}, statistics={"experts": measured})
    assert found.notes["removed"] == 2


def test_reconstruction_refuses_a_router_that_chooses_groups_first(tmp_path: Path) -> None:
    """Which groups it would keep with fewer experts is not in its scores."""
    model = opened("deepseek_v3", tmp_path, n_routed_experts=16)
    with pytest.raises(PlanError, match=r"layer 1: its router first chooses among 4 groups, .* use criterion=reap"):
        planned(PRUNE, model, criterion="reconstruction", keep=8, allow_starved=True)
    sample = calibrate(model, batches(), sample=20, allow_starved=True)[1].sample
    with pytest.raises(PlanError, match="a SigmoidBias that closes groups of choices"):
        sample.error_of(torch.ones(16, dtype=torch.bool))


def test_reconstruction_removes_whom_the_block_misses_least() -> None:
    model = mixture("llama", experts=5, top_k=2)
    sample = calibrate(model, batches(), sample=500)[0].sample
    score_E = prune_experts.reconstruction(sample, 2)

    def error(gone: tuple[int, ...]) -> float:
        return sample.error_of(torch.tensor([expert not in gone for expert in range(5)]))

    first = int(score_E.argmin())
    assert error((first,)) == min(error((e,)) for e in range(5))
    energy = float(torch.einsum("te,tef,tf->", sample.weight_TE, sample.gram_TEE, sample.weight_TE))
    assert float(score_E[first]) == pytest.approx(error((first,)) / energy)
    pair = tuple(score_E.argsort()[:2].tolist())
    assert error(pair) == min(error((first, e)) for e in range(5) if e != first)
    least, most = (pick(error(p) for p in itertools.combinations(range(5), 2)) for pick in (min, max))
    assert least <= error(pair) < 0.5 * (least + most)
    assert torch.isinf(score_E).sum() == 2


def test_an_expert_that_nobody_chooses_goes_first_and_changes_nothing() -> None:
    for criterion in ("frequency", "router_weight", "reap", "output_norm", "reconstruction"):
        model = mixture("llama", experts=5, top_k=2)
        with torch.no_grad():
            for layer in layers_of(model):
                layer.router.weight[3] = -10.0 * sum(layer.router.weight[e] for e in (0, 1, 2, 4))
        seen = calibrate(model, batches(), allow_starved=True)
        never = [layer for layer, stats in seen.items() if stats.count_E[3] == 0]
        before = [r.expert_TK for r in routings(model, batches()[0])]
        plan = planned(PRUNE, model, criterion=criterion, keep=4, allow_starved=True)
        for layer in never:
            assert kept_of(plan)[layer] == [0, 1, 2, 4], criterion
        surgery.apply(model, plan)
        if 0 in never:  # renormalised weights of the same choices: the first layer answers as before
            new_to_old = torch.tensor([0, 1, 2, 4])
            assert torch.equal(new_to_old[routings(model, batches()[0])[0].expert_TK], before[0])


@pytest.mark.parametrize("criterion", ["random", "reap", "reconstruction"])
def test_keeping_all_changes_no_bit(criterion: str) -> None:
    model = mixture("llama", experts=4)
    before = logits(model)
    receipt = applied(PRUNE, model, criterion=criterion, keep=1.0)
    assert torch.equal(logits(model), before)
    assert receipt["notes"]["keeps"] == "as_routed"
    assert receipt["notes"]["removed"] == 0


def test_routing_is_the_old_one_wherever_the_old_choices_survived() -> None:
    model = mixture("llama", experts=6, top_k=2)
    before = routings(model, batches()[0])[0]
    plan = planned(PRUNE, model, keep=4, allow_starved=True)
    surgery.apply(model, plan)
    after = routings(model, batches()[0])[0]
    kept = torch.tensor(kept_of(plan)[0])
    survived_T = torch.isin(before.expert_TK, kept).all(1)
    assert 0 < survived_T.sum() < len(survived_T)
    assert torch.equal(kept[after.expert_TK][survived_T], before.expert_TK[survived_T])
    torch.testing.assert_close(after.weight_TK[survived_T], before.weight_TK[survived_T])
    best_T = torch.isin(before.expert_TK[:, 0], kept)
    assert torch.equal(kept[after.expert_TK[:, 0]][best_T], before.expert_TK[:, 0][best_T])


def test_random_choices_follow_the_seed_and_need_no_data() -> None:
    model = mixture("llama", experts=8)
    plans = [make_plan(PRUNE, model, {"criterion": "random", "keep": 4}, seed=seed) for seed in (0, 0, 1)]
    assert kept_of(plans[0]) == kept_of(plans[1]) != kept_of(plans[2])
    with pytest.raises(PlanError, match="measures experts on data with these settings; give calibration data"):
        make_plan(PRUNE, model, {"criterion": "frequency"})


def test_one_budget_for_all_layers_keeps_the_best_of_all() -> None:
    model = mixture("llama", experts=6, top_k=2)
    settings: dict[str, Any] = {"criterion": "frequency", "keep": 4, "budget": "global", "allow_starved": True}
    plan = planned(PRUNE, model, **settings)
    counts = {layer: len(kept) for layer, kept in kept_of(plan).items()}
    assert sum(counts.values()) == 8
    assert min(counts.values()) >= 2
    scores = {layer: torch.tensor(plan.notes["scores"][str(layer)]) for layer in counts}
    kept, gone = [], []
    for layer, score_E in scores.items():
        ranked = score_E.sort(descending=True).values / score_E.sum()
        kept += ranked[2 : counts[layer]].tolist()  # the floor of two stays whatever its score
        gone += ranked[counts[layer] :].tolist()
    assert min(kept) >= max(gone)
    assert prune_experts.global_counts(
        {0: torch.tensor([9.0, 8, 7, 6]), 1: torch.tensor([5.0, 4, 3, 2])}, 5, {0: 1, 1: 1}, share=False
    ) == {0: 4, 1: 1}
    assert prune_experts.global_counts(
        {0: torch.tensor([9.0, 1, 0, 0]), 1: torch.tensor([0.5, 0.4, 0.3, 0.2])}, 5, {0: 1, 1: 1}, share=True
    ) == {0: 1, 1: 4}
    everyone = planned(PRUNE, model, **{**settings, "floor": 4})
    assert [len(kept) for kept in kept_of(everyone).values()] == [4, 4]


def test_counts_that_differ_by_layer_save_reload_and_generate(tmp_path: Path) -> None:
    model = opened("qwen3_moe", tmp_path)
    plan = planned(PRUNE, model, keep=3, budget="global", allow_starved=True, compare="raw", criterion="reap")
    if len({len(kept) for kept in kept_of(plan).values()}) == 1:
        plan = plan.model_copy(update={"layers": [plan.layers[0]]})
    surgery.apply(model, plan)
    counts = [layer.bank.num_experts for layer in layers_of(model)]
    assert len(set(counts)) > 1
    moestro.save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [layer.bank.num_experts for layer in layers_of(again)] == counts
    assert torch.equal(logits(again), logits(model))
    out = again.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 7)
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    note = json.dumps(receipt)
    assert '"natural_tokens"' in note
    assert '"kept"' in note
    with pytest.raises(SaveError, match=r"has no bias beside it that could switch off filler experts"):
        moestro.export(model, tmp_path / "stock-again")


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_stock_models_reopen_and_export_with_the_same_logits(tmp_path: Path, family: str) -> None:
    grouped = {"n_routed_experts": 16} if family == "deepseek_v3" else {}
    keep = 8 if grouped else 4
    model = opened(family, tmp_path, **grouped)
    shared = {name: p.clone() for name, p in model.named_parameters() if ".shared." in name}
    receipt = applied(PRUNE, model, keep=keep, allow_starved=True)
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in shared.items())
    assert bool(shared) == (family == "deepseek_v3")
    moestro.save(model, tmp_path / "ours")
    assert torch.equal(logits(moestro.load(tmp_path / "ours")), logits(model))
    moestro.export(model, tmp_path / "theirs")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", experts_implementation="eager")
    assert not getattr(stock, "is_moestro", False)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)
    assert receipt["layers"][0]["experts_after"] == keep


def test_a_selection_bias_moves_with_its_row(tmp_path: Path) -> None:
    model = opened("deepseek_v3", tmp_path, n_routed_experts=16)
    before = [layer.router.selection_bias.clone() for layer in layers_of(model)]
    plan = planned(PRUNE, model, keep=8, allow_starved=True)
    surgery.apply(model, plan)
    for layer, bias, kept in zip(layers_of(model), before, kept_of(plan).values(), strict=True):
        assert torch.equal(layer.router.selection_bias, bias[kept])
        assert [sum(4 * g <= expert < 4 * g + 4 for expert in kept) for g in range(4)] == [2, 2, 2, 2]


def test_pruning_what_was_pruned() -> None:
    model, other = mixture("llama", experts=6), mixture("llama", experts=6)
    first = planned(PRUNE, model, criterion="frequency", keep=4, allow_starved=True)
    surgery.apply(model, first)
    second = planned(PRUNE, model, criterion="frequency", keep=3, allow_starved=True)
    surgery.apply(model, second)
    both = {layer: [kept_of(first)[layer][e] for e in kept] for layer, kept in kept_of(second).items()}
    surgery.apply(other, surgery.plans.prune(OpenModel(other).shape, both, method="test"))
    assert torch.equal(logits(model), logits(other))


def test_losses_count_over_the_experts_that_are_left() -> None:
    model = mixture("llama", experts=6)
    swap(model, "train.balance_loss", {"scope": "batch"})
    with torch.no_grad():
        for layer in layers_of(model):
            layer.router.weight.zero_()
    applied(PRUNE, model, criterion="random", keep=3)
    with session(collect=True) as seen:
        logits(model)
    losses = seen.take()[0].losses
    assert len(losses) == 2
    assert all(float(term.total) == pytest.approx(1.0) for term in losses.values()), "1 for a uniform router of any E"


def test_too_few_is_refused_with_numbers(tmp_path: Path) -> None:
    model = mixture("llama", experts=6, top_k=3)
    grouped = opened("deepseek_v3", tmp_path, n_routed_experts=16)
    for subject, config, message in (
        (model, {"keep": 2}, r"keep=2 leaves 2 of 6 experts, but each token chooses 3; keep at least 3"),
        (model, {"keep": 0.2}, r"keep=0.2 leaves 1 of 6"),
        (model, {"keep": 7}, r"keep=7, but it has 6 experts"),
        (model, {"keep": 4, "budget": "global", "floor": 2}, r"floor=2, but layer 0 needs 3"),
        (
            model,
            {"keep": 4, "budget": "global", "floor": 5},
            r"8 experts in 2 layers, but the floors \(\[5\] a layer\)",
        ),
        (grouped, {"keep": 9}, r"9 experts cannot be 4 groups of equal size; keep 8 or 12"),
        (grouped, {"keep": 4}, r"leaves 4 of 16 experts, but each token chooses 3; keep at least 8"),
        (grouped, {"keep": 8, "budget": "global"}, r"has 4 groups of equal size; use budget=layer"),
    ):
        with pytest.raises(PlanError, match=message):
            make_plan(PRUNE, subject, {"criterion": "random", **config})
    for keep in (0, 1.5, -1, 0.0):
        with pytest.raises(ConfigError, match=r"keep=.*must be a whole number of experts"):
            make_plan(PRUNE, model, {"keep": keep})


def test_starved_experts_make_no_nan() -> None:
    model = mixture("llama", experts=8, top_k=2)
    one = [torch.tensor([[5]])]
    for config in ({"criterion": "reap"}, {"criterion": "reconstruction"}, {"criterion": "output_norm"}):
        with pytest.raises(PlanError, match=r"6 of 8 experts .* allow_starved=true"):
            make_plan(PRUNE, model, config, batches=one)
        plan = make_plan(PRUNE, model, {**config, "allow_starved": True, "keep": 4}, batches=one)
        scores = [s for values in plan.notes["scores"].values() for s in values if s is not None]
        assert all(s == s and s >= 0 for s in scores)
        assert plan.notes["calibration"]["layers"][0]["starved"]
    raised = make_plan(PRUNE, model, {"policy": "all", "keep": 4}, batches=one)
    assert raised.notes["calibration"]["layers"][0]["starved"] == []


def test_a_balance_loss_over_all_layers_names_its_way_out(tmp_path: Path) -> None:
    """Transformers' loss takes all layers as one, which unequal counts cannot be."""
    model = opened("olmoe", tmp_path)
    plan = planned(PRUNE, model, criterion="random", keep=4)
    surgery.apply(model, plan.model_copy(update={"layers": plan.layers[:1]}))
    with session(collect=True), pytest.raises(ContextError, match="use layers='each'"):
        logits(model)
    logits(model)
