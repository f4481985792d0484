"""Calibration: each policy counts other tokens and changes no output; starved experts are named."""

from typing import Any

import pytest
import torch
from torch import nn

import moestro
from moestro.core.errors import ConfigError, DataError, PlanError
from moestro.core.layer import mixture_layers
from moestro.observe import calibrate, collect
from moestro.observe.moments import JointMoments, RankRatios
from moestro.testing.tiny import tiny_folder
from tests.surgery.helpers import mixture


def batches(count: int = 4, rows: int = 2, width: int = 9) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(3, 97, (rows, width), generator=draw) for _ in range(count)]


def answers(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=batch).logits for batch in batches()]


def scores_of(model: nn.Module, layer: int) -> torch.Tensor:
    """Raw logits of a layer's router for all tokens, from its inputs."""
    mixed, rows = list(mixture_layers(model).values())[layer], []
    handle = mixed.register_forward_pre_hook(lambda module, args: rows.append(args[0].reshape(-1, args[0].shape[-1])))
    answers(model)
    handle.remove()
    return torch.cat(rows) @ mixed.router.weight.T


@pytest.mark.parametrize(("policy", "raise_to"), [("natural", None), ("raised", 4), ("all", None)])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_policy_changes_the_counts_and_no_output(policy: Any, raise_to: int | None, streamed: bool) -> None:
    model = mixture("llama", experts=6, top_k=2)
    before = answers(model)
    during: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: during.append(output.detach()))
    found = calibrate(model, batches(), policy=policy, raise_to=raise_to, streamed=streamed, outputs=True, least=1)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, answers(model), strict=True)), "the model is as it was"
    if not streamed:
        assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True)), "and answered as ever"
    chosen = {"natural": 2, "raised": 4, "all": 6}[policy]
    natural = calibrate(model, batches(), allow_starved=True)
    for layer, stats in found.items():
        logits_TE = scores_of(model, layer)
        best_TK = logits_TE.topk(chosen, dim=-1).indices
        assert torch.equal(stats.count_E, torch.bincount(best_TK.flatten(), minlength=6))
        assert stats.count_E.sum() == 72 * chosen
        assert torch.equal(stats.natural_E, natural[layer].count_E)
        gate_TE = logits_TE.softmax(-1)
        mask_TE = torch.zeros_like(gate_TE).scatter_(1, best_TK, 1.0)
        weight_TE = gate_TE * mask_TE / (gate_TE * mask_TE).sum(-1, keepdim=True)
        torch.testing.assert_close(stats.weight.total, weight_TE.double().sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.gate.total, (gate_TE * mask_TE).double().sum(0), rtol=1e-4, atol=1e-5)
    assert found.stats.num_tokens == 72
    assert all(not layer.bank._forward_hooks for layer in mixture_layers(model).values())


def test_streamed_and_whole_runs_give_the_same_numbers() -> None:
    model = mixture("llama", experts=5)
    model.train()
    wishes: dict[str, Any] = {"outputs": True, "gram": True, "output_gram": True, "sample": 30}
    one, two = (calibrate(model, batches(), streamed=way, **wishes) for way in (False, True))
    assert model.training
    assert one.note() == two.note()
    for layer, stats in one.items():
        torch.testing.assert_close(stats.gated_norm.mean, two[layer].gated_norm.mean)
        torch.testing.assert_close(stats.output_gram_EE, two[layer].output_gram_EE)
        torch.testing.assert_close(stats.logits.comoment_DD, two[layer].logits.comoment_DD)
        torch.testing.assert_close(stats.sample.gram_TEE, two[layer].sample.gram_TEE)
        torch.testing.assert_close(stats.input_gram.of(0), two[layer].input_gram.of(0))


def test_what_the_router_says_is_summed_as_written_out() -> None:
    model = mixture("llama", experts=5, top_k=3)
    found = calibrate(model, batches(), output_gram=True, sample=20)
    for layer, stats in found.items():
        logits_TE = scores_of(model, layer)
        gate_TK, best_TK = logits_TE.softmax(-1).topk(3, dim=-1)
        assert torch.equal(stats.top_E, torch.bincount(best_TK[:, 0], minlength=5))
        lower = (gate_TK[:, 1:] / gate_TK[:, :1]).double().quantile(0.5, dim=0, interpolation="lower")
        torch.testing.assert_close(stats.ratios.median_R, lower, rtol=0, atol=1 / 4096)
        torch.testing.assert_close(stats.logits.correlation_DD, torch.corrcoef(logits_TE.T.double()), rtol=0, atol=1e-5)
        gram_EE = logits_TE.double().T @ logits_TE.double()
        torch.testing.assert_close(stats.logits.gram_DD, gram_EE, rtol=1e-5, atol=1e-5)
        sample = stats.sample
        natural_TE = sample.weights_of(torch.ones(5, dtype=torch.bool))
        torch.testing.assert_close(natural_TE, sample.weight_TE)
        assert sample.error_of(torch.ones(5, dtype=torch.bool)) < 1e-8
        assert len(sample.gram_TEE) == 20
        assert torch.linalg.eigvalsh(stats.output_gram_EE).min() > -1e-6


def test_the_error_without_an_expert_is_that_of_the_block() -> None:
    """The block pruned for good, on the same inputs, differs by what the sample says."""
    from moestro import surgery
    from moestro.core.plan import ExpertPlan
    from tests.surgery.helpers import keep

    model, other = mixture("llama", experts=5), mixture("llama", experts=5)
    stats = calibrate(model, batches(), sample=1000)[0]
    surgery.apply(other, ExpertPlan(method="test", layers=[keep(0, [0, 1, 3])]))
    outs: list[list[torch.Tensor]] = [[], []]
    for place, subject in enumerate((model, other)):
        layer = next(iter(mixture_layers(subject).values()))
        layer.register_forward_hook(lambda module, args, output, place=place: outs[place].append(output))
        answers(subject)
    truth = sum(float((a - b).square().sum()) for a, b in zip(*outs, strict=True))
    kept = torch.tensor([True, True, False, True, False])
    assert stats.sample.error_of(kept) == pytest.approx(truth, rel=1e-4)
    assert truth > 0.01


def test_joint_moments_survive_a_large_offset_and_join() -> None:
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, 2] = 4.0
    shifted, parts = JointMoments(3), JointMoments(3)
    shifted.add(rows + 1e6)
    for part in rows.split(7):
        parts.add(part)
    want = torch.corrcoef(rows[:, :2].T)
    for found in (shifted, parts):
        torch.testing.assert_close(found.correlation_DD[:2, :2], want, rtol=0, atol=1e-8)
        assert found.correlation_DD[2].tolist() == [0.0, 0.0, 1.0], "a column that never varies tells nothing"
    torch.testing.assert_close(parts.gram_DD, rows.T @ rows)
    with pytest.raises(ConfigError, match="width 2 do not join those of 3"):
        parts.merge(JointMoments(2))


def test_ratios_of_ragged_tokens_join() -> None:
    one, two = RankRatios(), RankRatios()
    one.add(torch.tensor([1, 1]), torch.tensor([0.25, 0.75]))
    two.add(torch.tensor([1, 2]), torch.tensor([0.5, 1.0]))
    one.merge(two)
    torch.testing.assert_close(one.median_R, torch.tensor([0.5, 1.0], dtype=torch.float64), rtol=0, atol=1 / 4096)


def dead(count: int = 4) -> nn.Module:
    """Six experts of which ``count`` are never chosen in the second layer."""
    model = mixture("llama", experts=6)
    router = list(mixture_layers(model).values())[1].router
    with torch.no_grad():
        router.weight[count:] *= 50.0
        router.weight[:count] *= 0.0
        # both signs of a direction: one of the two lies above zero for every token
        router.weight[count + 1] = -router.weight[count]
    return model


def test_a_starved_calibration_is_refused_and_may_be_allowed() -> None:
    model = dead()
    with pytest.raises(PlanError) as told:
        calibrate(model, batches(), least=30)
    text = str(told.value)
    assert "on 72 tokens (policy natural) gives" in text
    assert "of 6 experts of model.layers.1.mlp fewer than 30 tokens" in text
    assert "policy=raised" in text
    assert "allow_starved=true" in text
    found = calibrate(model, batches(), least=30, allow_starved=True, outputs=True)
    for stats in found.values():
        for part in (stats.weight, stats.gate, stats.output_norm, stats.gated_norm, stats.input_norm):
            assert torch.isfinite(part.mean).all()
            assert torch.isfinite(part.variance).all()
    assert calibrate(model, batches(), policy="all", least=30)[1].count_E.tolist() == [72] * 6
    table = found.table().splitlines()
    assert table[0].startswith("calibration: 72 tokens, policy natural")
    assert "below 30" in table[1]
    assert len(table) == 4


def test_what_cannot_be_calibrated_is_refused() -> None:
    model = mixture("llama", experts=4)
    for settings, message in (
        ({"policy": "raised"}, "raise_to goes with policy=raised"),
        ({"raise_to": 3}, "policy=natural with raise_to=3"),
        ({"policy": "raised", "raise_to": 5}, "raise_to=5, but its router has 4 choices"),
        ({"policy": "raised", "raise_to": 1}, "raise_to=1, but its router chooses 2 anyway"),
        ({"policy": "most"}, "must be one of natural, raised, all"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibrate(model, batches(), **settings)
    with pytest.raises(DataError, match="holds no token"):
        calibrate(model, [])


def test_nulls_and_groups_count_like_the_router_does(tmp_path: Any) -> None:
    """Groups: raising goes as far as the open ones; all reaches the closed."""
    tiny_folder("deepseek_v3", tmp_path / "model")
    model = moestro.load(tmp_path / "model")
    raised = calibrate(model, batches(), policy="raised", raise_to=4, allow_starved=True)
    assert all(stats.count_E.sum() == 72 * 4 for stats in raised.values()), "2 of 4 groups of 2 are open"
    wider = calibrate(model, batches(), policy="raised", raise_to=6, allow_starved=True)
    assert all(stats.count_E.sum() == 72 * 4 for stats in wider.values())
    every = calibrate(model, batches(), policy="all")
    assert all(stats.count_E.tolist() == [72] * 8 for stats in every.values())
    assert list(every) == [1, 2], "by block"


def test_statistics_of_runs_join_with_the_new_parts() -> None:
    model = mixture("llama", experts=4)
    wishes: dict[str, Any] = {"output_gram": True, "sample": 8}
    calls = [{"input_ids": batch} for batch in batches(2)]
    whole = collect(model, calls, **wishes)
    first, second = (collect(model, [call], **wishes) for call in calls)
    first.merge(second)
    for site, stats in first.items():
        assert torch.equal(stats.top_E, whole[site].top_E)
        assert torch.equal(stats.natural_E, whole[site].natural_E)
        torch.testing.assert_close(stats.output_gram_EE, whole[site].output_gram_EE)
        torch.testing.assert_close(stats.logits.correlation_DD, whole[site].logits.correlation_DD)
        assert torch.equal(stats.ratios.histogram_RB, whole[site].ratios.histogram_RB)
        assert len(stats.sample.gram_TEE) == 8
    with pytest.raises(ConfigError, match="output_gram_EE was collected in one run only"):
        first.merge(collect(model, calls))
