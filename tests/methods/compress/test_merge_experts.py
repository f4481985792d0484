"""Merging: weighted means of aligned experts, routers remapped, averaged or represented."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moestro
from moestro import surgery
from moestro.core.errors import ConfigError, PlanError
from moestro.core.remap import RemapRouter
from moestro.core.session import session
from moestro.methods.planning import make_plan
from moestro.models.swap import swap
from moestro.observe import calibrate
from tests.methods.compress.helpers import applied, batches, layers_of, opened, planned, routings
from tests.surgery.helpers import logits, mixture


MERGE = "compress.merge_experts"


def merged_groups(plan: Any) -> dict[int, list[list[int]]]:
    return {entry.layer: [[s.expert for s in sources] for sources in entry.experts] for entry in plan.layers}


@pytest.mark.parametrize("similarity", ["router_logits", "router_weight", "expert_output"])
@pytest.mark.parametrize("grouping", ["spectral", "agglomerative", "dominant"])
def test_weights_sum_to_one_and_follow_use(similarity: str, grouping: str) -> None:
    model = mixture("llama", experts=6)
    plan = planned(MERGE, model, keep=3, similarity=similarity, grouping=grouping, allow_starved=True)
    seen = calibrate(model, batches(), allow_starved=True)
    for entry in plan.layers:
        count_E = seen[entry.layer].count_E
        for sources in entry.experts:
            assert sum(source.weight for source in sources) == pytest.approx(1.0)
            members = [source.expert for source in sources]
            total = float(count_E[members].sum())
            if total:
                assert [s.weight for s in sources] == pytest.approx([float(count_E[e]) / total for e in members])
            assert count_E[members[0]] == count_E[members].max(), "the most used leads"
            assert sources[0].permutation is None
        assert sorted(e for sources in entry.experts for e in [s.expert for s in sources]) == list(range(6))
    surgery.apply(model, plan)
    assert torch.isfinite(logits(model)).all()


def test_the_merged_expert_is_the_mean_of_aligned_ones() -> None:
    model = mixture("llama", experts=4)
    plan = planned(MERGE, model, keep=2, weighting="equal")
    old = layers_of(model)[0].bank
    before = [{name: old.weight(e, name).clone() for name in old.projections} for e in range(4)]
    surgery.apply(model, plan)
    new = layers_of(model)[0].bank
    for index, sources in enumerate(plan.layers[0].experts):
        for name in old.projections:
            total = torch.zeros_like(new.weight(index, name))
            for source in sources:
                part, order = before[source.expert or 0][name], source.permutation
                if order is not None:
                    part = part[:, order] if name == "down" else part[order]
                total += part / len(sources)
            torch.testing.assert_close(new.weight(index, name), total, rtol=1e-5, atol=1e-6)


def test_remap_keeps_every_choice_under_its_new_name() -> None:
    model = mixture("llama", experts=6, top_k=2)
    before = routings(model, batches()[0])[0]
    plan = planned(MERGE, model, keep=3, allow_starved=True)
    new_of = {old: index for index, members in enumerate(merged_groups(plan)[0]) for old in members}
    surgery.apply(model, plan)
    assert isinstance(layers_of(model)[0].router, RemapRouter)
    after = routings(model, batches()[0])[0]
    for token in range(before.num_tokens):
        want: dict[int, float] = {}
        for expert, weight in zip(before.expert_TK[token].tolist(), before.weight_TK[token].tolist(), strict=True):
            want[new_of[expert]] = want.get(new_of[expert], 0.0) + weight
        mine = after.token_N == token
        found = dict(zip(after.expert_N[mine].tolist(), after.weight_N[mine].tolist(), strict=True))
        assert found == pytest.approx(want), "two choices that meet run once, with the sum of their weights"


@pytest.mark.parametrize("rule", ["mean", "rows"])
def test_one_router_row_a_group(rule: str) -> None:
    model = mixture("llama", experts=6, top_k=2)
    old = layers_of(model)[0].router.weight.detach().clone()
    plan = planned(MERGE, model, keep=3, router=rule, allow_starved=True)
    surgery.apply(model, plan)
    new = layers_of(model)[0].router.weight
    for index, sources in enumerate(plan.layers[0].experts):
        mean = sum(s.weight * old[s.expert] for s in sources if s.expert is not None)
        torch.testing.assert_close(new[index], old[sources[0].expert or 0] if rule == "rows" else mean)
    assert layers_of(model)[0].router.top_k == 2
    with pytest.raises(PlanError, match=r"keep=1 leaves 1 experts, but each token chooses 2; .* or use router=remap"):
        planned(MERGE, mixture("llama", experts=6, top_k=2), keep=1, router=rule)


def test_a_bias_is_averaged_with_its_row_and_groups_are_counted(tmp_path: Path) -> None:
    model = opened("gpt_oss", tmp_path)
    old = layers_of(model)[0].router.bias.detach().clone().normal_(generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layers_of(model)[0].router.bias.copy_(old)
    plan = planned(MERGE, model, keep=3, router="mean", allow_starved=True)
    surgery.apply(model, plan)
    for index, sources in enumerate(plan.layers[0].experts):
        mean = sum(float(s.weight * old[s.expert]) for s in sources if s.expert is not None)
        assert float(layers_of(model)[0].router.bias.detach()[index]) == pytest.approx(mean, rel=1e-5, abs=1e-6)
    grouped = opened("deepseek_v3", tmp_path, n_routed_experts=16)
    with pytest.raises(PlanError, match=r"9 experts cannot be 4 groups of equal size; keep 8 or 12"):
        planned(MERGE, grouped, keep=9, router="mean", allow_starved=True)
    applied(MERGE, grouped, keep=9, allow_starved=True)
    assert torch.isfinite(logits(grouped)).all()


def test_bfloat16_experts_are_merged_in_float32() -> None:
    model = mixture("llama", experts=4).bfloat16()
    old = [layers_of(model)[0].bank.weight(e, "up").clone() for e in range(4)]
    plan = planned(MERGE, model, keep=2, align="none", allow_starved=True)
    surgery.apply(model, plan)
    for index, sources in enumerate(plan.layers[0].experts):
        mean = sum((s.weight * old[s.expert].float() for s in sources if s.expert is not None), torch.zeros(()))
        found = layers_of(model)[0].bank.weight(index, "up")
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, mean.bfloat16())


def test_random_groups_and_activations() -> None:
    model = mixture("llama", experts=6)
    one, two = (planned(MERGE, model, seed=s, keep=3, grouping="random", align="none") for s in (0, 1))
    assert merged_groups(one) != merged_groups(two)
    assert all(s.permutation is None for e in one.layers for sources in e.experts for s in sources)
    by_use = planned(MERGE, model, keep=3, align="activations", sample=40)
    assert any(s.permutation is not None for e in by_use.layers for sources in e.experts for s in sources)
    with pytest.raises(ConfigError, match="grouping=random looks at no similarity"):
        planned(MERGE, model, grouping="random", similarity="router_weight")


def test_a_group_that_nobody_used_becomes_a_plain_mean() -> None:
    model = mixture("llama", experts=8, top_k=2)
    one = [torch.tensor([[5]])]
    for similarity in ("router_logits", "router_weight", "expert_output"):
        config: dict[str, Any] = {"keep": 4, "grouping": "agglomerative", "similarity": similarity}
        with pytest.raises(PlanError, match=r"6 of 8 experts .* allow_starved=true"):
            make_plan(MERGE, model, config, batches=one)
        plan = make_plan(MERGE, model, {**config, "allow_starved": True}, batches=one)
        weights = [[s.weight for s in sources] for sources in plan.layers[0].experts]  # type: ignore[attr-defined]
        assert all(w == w for group in weights for w in group)
        assert all(sum(group) == pytest.approx(1.0) for group in weights)


def test_losses_are_taken_over_groups() -> None:
    model = mixture("llama", experts=6)
    swap(model, "train.balance_loss", {"scope": "batch"})
    applied(MERGE, model, keep=3, allow_starved=True)
    with session(collect=True) as seen:
        logits(model)
    (ctx,) = seen.take()
    for site, routing in ctx.routings.items():
        assert routing is not None
        assert routing.num_experts == 3
        fraction = routing.counts_C().double() / routing.counts_C().sum()
        mean = routing.scores.probabilities().double().mean(0) if routing.scores is not None else fraction
        assert len(mean) == 3
        assert float(ctx.losses[site, "balance"].total) == pytest.approx(3 * float((fraction * mean).sum()))


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_merged_stock_models_reopen_and_export_or_say_why_not(family: str, tmp_path: Path) -> None:
    model = opened(family, tmp_path)
    applied(MERGE, model, keep=4, router="mean", allow_starved=True)
    moestro.save(model, tmp_path / "ours")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), logits(model))
    moestro.export(model, tmp_path / "theirs")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", experts_implementation="eager")
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-4)
    other = opened(family, tmp_path / "b")
    applied(MERGE, other, keep=4, allow_starved=True)
    moestro.save(other, tmp_path / "remapped")
    assert torch.equal(logits(moestro.load(tmp_path / "remapped")), logits(other))
    with pytest.raises(moestro.MoestroError, match="its router is RemapRouter"):
        moestro.export(other, tmp_path / "no")
    with pytest.raises(PlanError, match=r"merged experts under a remapped router.*use router=remap"):
        planned(MERGE, other, keep=3, router="mean", allow_starved=True)
    with pytest.raises(PlanError, match=r"merged experts under a remapped router.*use similarity=router_logits"):
        planned(MERGE, other, keep=3, similarity="router_weight", allow_starved=True)


@pytest.mark.parametrize("method", [MERGE, "compress.uncurl", "compress.prune_experts"])
def test_a_merged_model_can_be_cut_down_again(method: str, tmp_path: Path) -> None:
    """From six experts to four under a remapped router, then to three or two; it reopens with the same logits."""
    model = opened("olmoe", tmp_path)  # each token makes three choices
    applied(MERGE, model, keep=4, allow_starved=True)
    merged = [layer.router.mapping for layer in layers_of(model)]
    receipt = applied(method, model, keep=3, allow_starved=True)
    layers = layers_of(model)
    assert [layer.bank.num_experts for layer in layers] == [3, 3]
    for layer, before in zip(layers, merged, strict=True):
        choices = len(layer.router.mapping)
        assert (choices == 6) if method != "compress.prune_experts" else (3 <= choices < 6)
        assert choices == layer.router.inner.num_experts <= len(before)
    assert receipt["ledger"]["rows_touched"] == receipt["ledger"]["rows_expected"]
    moestro.save(model, tmp_path / "again")
    assert torch.equal(logits(moestro.load(tmp_path / "again")), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_what_pruning_cannot_ask_of_a_remapped_router(tmp_path: Path) -> None:
    model = opened("olmoe", tmp_path)
    applied(MERGE, model, keep=4, allow_starved=True)
    for criterion in ("router_norm", "reconstruction"):
        with pytest.raises(PlanError, match=rf"criterion={criterion} asks for it, use criterion=reap"):
            planned("compress.prune_experts", model, keep=3, criterion=criterion)
    # Each token makes three choices: one expert is enough only if three rows lead to it.
    smallest = min(max(layer.router.mapping.count(e) for e in range(4)) for layer in layers_of(model))
    assert smallest < 3, "else this says nothing"
    with pytest.raises(PlanError, match=r"keep=1 leaves 1 of 4 experts, but each token chooses 3; keep at least 2"):
        planned("compress.prune_experts", model, keep=1, criterion="random")
