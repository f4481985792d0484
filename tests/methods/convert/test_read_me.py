"""Read-ME's cut: exact widths, permanent units, masked dense equals experts, pool equals copies, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moestro
from moestro import surgery
from moestro.core.errors import ConfigError, DataError, PlanError
from moestro.core.registry import method
from moestro.methods.convert.read_me import domain_masks, masks_of, refactorize
from moestro.methods.planning import make_plan
from moestro.observe.neurons import domain_activity
from moestro.observe.passing import scaled_inputs
from moestro.surgery.opened import OpenModel
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import ids, layers_of, logits


READ_ME = method("convert.read_me")


def batches() -> list[dict[str, Any]]:
    return [
        {"input_ids": ids(2, 9), "domain": "a"},
        {"input_ids": ids(2, 9).flip(1) // 2, "domain": "b"},
        {"input_ids": ids(1, 5), "domain": "a"},
    ]


def masks(model: Any, keep: float = 0.5) -> Any:
    return domain_masks(domain_activity(model, batches()), keep, min_tokens=1)


class Always:
    """Edit: one expert for all tokens."""

    def __init__(self, expert: int) -> None:
        self.expert = expert

    def on_scores(self, site: str, scores: Any, ctx: Any) -> Any:
        return scores

    def on_routing(self, site: str, routing: Any, router: Any, ctx: Any) -> Any:
        expert_TK = torch.full((routing.num_tokens, 1), self.expert)
        weight_TK = torch.ones(routing.num_tokens, 1)
        return type(routing).from_topk(expert_TK, weight_TK, num_experts=routing.num_experts, scores=routing.scores)


def test_experts_have_exactly_as_many_units_and_permanent_ones_are_the_intersection() -> None:
    found = masks_of(
        torch.tensor([[5.0, 5.0, 5.0, 1.0, 0.0], [0.0, 9.0, 1.0, 8.0, 1.0], [1.0, 3.0, 2.0, 1.0, 1.0]]), 0.5
    )
    assert found.rows_EW.tolist() == [[0, 1], [1, 3], [1, 2]]
    assert found.permanent == [1]
    assert masks_of(torch.zeros(2, 7), 0.01).rows_EW.tolist() == [[0], [0]]


def test_activity_is_the_mean_magnitude_of_what_enters_the_down_projection() -> None:
    model, rows = tiny_model("llama"), {"a": [], "b": []}
    for batch in batches():
        hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
            lambda module, args, name=batch["domain"]: rows[name].append(args[0].flatten(0, 1).abs())
        )
        model(input_ids=batch["input_ids"])
        hook.remove()
    found = domain_activity(model, batches())[1]
    assert {name: count for name, (_, count) in found.items()} == {"a": 23, "b": 18}
    for name, parts in rows.items():
        torch.testing.assert_close(found[name][0], torch.cat(parts).mean(0))


def test_activity_leaves_padding_out() -> None:
    model, one = tiny_model("llama"), ids(1, 6)
    padded = {"input_ids": nn.functional.pad(one, (0, 3)), "attention_mask": nn.functional.pad(one * 0 + 1, (0, 3))}
    (mean, count), (again, same) = (domain_activity(model, [call])[0]["all"] for call in (padded, one))
    assert count == same == 6
    torch.testing.assert_close(mean, again)
    with pytest.raises(DataError):
        domain_activity(model, [])


@pytest.mark.parametrize("storage", ["shared_pool", "copied"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_expert_is_the_dense_model_with_the_other_units_silenced(family: str, storage: Any) -> None:
    dense, model = tiny_model(family), tiny_model(family)
    cut = masks(dense)
    refactorize(model, cut, storage=storage)
    for expert in (0, 1):
        factors = {}
        for layer, mask in cut.items():
            keep_I = torch.zeros(48)
            keep_I[mask.rows_EW[expert]] = 1.0
            factors[dense.get_submodule(f"model.layers.{layer}.mlp.down_proj")] = keep_I
        with scaled_inputs(factors):
            want = logits(dense)
        with moestro.session(edits=[Always(expert)]):
            torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("storage", ["shared_pool", "copied"])
@pytest.mark.parametrize(("family", "changes"), [("llama", {"mlp_bias": True}), ("gemma3_text", {}), ("bert", {})])
def test_all_units_kept_are_the_dense_model(family: str, changes: dict[str, Any], storage: Any) -> None:
    model = tiny_model(family, **changes)
    before, cut = logits(model), masks(model, 1.0)
    refactorize(model, cut, storage=storage)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


def test_the_pool_is_held_once_and_the_plan_is_the_copies() -> None:
    pooled, copied = tiny_model("llama"), tiny_model("llama")
    cut = masks(pooled)
    plan = make_plan("convert.read_me", copied, {"min_tokens": 1}, batches=batches())
    assert plan.notes["domains"] == ["a", "b"]
    assert [[sources[0].rows for sources in entry.experts] for entry in plan.layers] == [
        mask.rows_EW.tolist() for mask in cut.values()
    ]
    assert plan.notes["permanent"] == {str(layer): len(mask.permanent) for layer, mask in cut.items()}
    refactorize(pooled, cut)
    surgery.apply(copied, plan)
    for one, two in zip(layers_of(pooled), layers_of(copied), strict=True):
        assert sum(p.numel() for p in one.bank.parameters()) == 48 * 3 * one.bank.pool.dim
        assert sum(p.numel() for p in two.bank.parameters()) == 2 * 24 * 3 * one.bank.pool.dim
        for expert in (0, 1):
            for name in ("gate", "up", "down"):
                assert torch.equal(one.bank.weight(expert, name), two.bank.weight(expert, name))


def test_some_layers_only_and_saved(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cut = masks(model)
    refactorize(model, {1: cut[1]})
    assert OpenModel(model) is not None
    assert len(layers_of(model)) == 1
    moestro.save(model, tmp_path / "m")
    again = moestro.load(tmp_path / "m")
    assert torch.equal(layers_of(again)[0].bank.rows_EW, cut[1].rows_EW)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)


def test_bad_input_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(PlanError, match="18 tokens, min_tokens=20"):
        make_plan("convert.read_me", model, {"min_tokens": 20}, batches=batches())
    with pytest.raises(PlanError, match="'c' was not measured; the data have a, b"):
        make_plan("convert.read_me", model, {"min_tokens": 1, "domains": ["a", "c"]}, batches=batches())
    for keep in (0.0, 1.5):
        with pytest.raises(ConfigError, match="keep"):
            READ_ME.configure({"keep": keep, "min_tokens": 1})
