"""FactorLLM's cut: untouched slices, E / K in the router, the dense model with all of them on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moestro
from moestro import surgery
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import PlanInputs
from moestro.core.registry import method
from moestro.core.routing import Routing
from moestro.methods.planning import make_plan
from moestro.surgery.opened import OpenModel
from moestro.surgery.parity import AllOn
from moestro.testing.operations import operation_counter
from moestro.testing.tiny import tiny_model
from tests.surgery.helpers import ids, layers_of, logits


FACTORLLM = method("convert.factorllm")
PARTITIONS = ("contiguous", "random", "weights", "coactivation")
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "swiglu": ("llama", {}),
    "gated_relu_bias": ("llama", {"hidden_act": "relu", "mlp_bias": True}),
    "gated_gelu": ("gemma3_text", {}),
    "gelu_bias": ("bert", {}),
    "relu_bias": ("bert", {"hidden_act": "relu"}),
}


def planned(model: Any, seed: int = 0, **config: Any) -> Any:
    return make_plan("convert.factorllm", model, config, batches=[ids(4, 9)], seed=seed)


def cut(model: Any, seed: int = 0, **config: Any) -> Any:
    return surgery.apply(model, planned(model, seed, **config), calib=[ids()])


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("form", FORMS)
def test_all_slices_on_are_the_dense_model(form: str, partition: str) -> None:
    family, changes = FORMS[form]
    model = tiny_model(family, **changes)
    before = logits(model)
    receipt = cut(model, num_experts=4, top_k=4, partition=partition)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    assert receipt["parity"]["all_on"]["max_abs_diff"] <= 1e-5
    assert {float(layer.router.scale) for layer in layers_of(model)} == {1.0}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_cut_that_is_not_all_on_changes_the_model_and_is_exact_all_the_same(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    cut(model, num_experts=4, top_k=2)
    assert (logits(model) - before).abs().max() > 1e-2
    with moestro.session(edits=[AllOn([layer.site for layer in layers_of(model)], 1.0)]):
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_slices_keep_the_bits_of_the_dense_rows_and_columns(partition: str) -> None:
    model, plain = tiny_model("llama"), OpenModel(tiny_model("llama"))
    plan = planned(model, num_experts=4, partition=partition)
    surgery.apply(model, plan)
    for entry, layer in zip(plan.layers, layers_of(model), strict=True):
        rows = [sources[0].rows for sources in entry.experts]
        assert sorted(unit for part in rows for unit in part) == list(range(48))
        for expert, part in enumerate(rows):
            for name in ("gate", "up"):
                assert torch.equal(layer.bank.weight(expert, name), plain.tensor(entry.layer, None, name)[part])
            down = plain.tensor(entry.layer, None, "down")[:, part]
            assert torch.equal(layer.bank.weight(expert, "down"), down)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (4, 3), (6, 4)])
def test_the_scale_is_a_quotient_that_may_be_broken(experts: int, top_k: int) -> None:
    model = tiny_model("llama")
    cut(model, num_experts=experts, top_k=top_k)
    for layer in layers_of(model):
        assert float(layer.router.scale) == pytest.approx(experts / top_k)


def loop(layer: Any, x_TD: Tensor) -> Tensor:
    """The layer written out: all slices, masked."""
    rows = []
    for x in x_TD:
        best = sorted(
            range(layer.bank.num_experts),
            key=lambda e: -float(layer.router.weight[e] @ x + layer.router.bias[e]),
        )[: layer.router.top_k]
        total = torch.zeros_like(x)
        for expert in best:
            gate, up, down = (layer.bank.weight(expert, name) for name in ("gate", "up", "down"))
            total = total + down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
        rows.append(layer.bank.num_experts / layer.router.top_k * total)
    return torch.stack(rows)


@torch.no_grad()
def test_the_dispatch_is_the_masked_sum() -> None:
    model = tiny_model("llama")
    cut(model, num_experts=4, top_k=3)
    layer = layers_of(model)[0]
    layer.router.bias.copy_(torch.tensor([0.1, -0.2, 0.0, 0.3]))
    for tokens in (1, 13):
        x_TD = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
        torch.testing.assert_close(layer(x_TD[None])[0], loop(layer, x_TD), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", ["swiglu", "gated_relu_bias", "gelu_bias"])
def test_the_bias_of_down_is_added_once(form: str) -> None:
    family, changes = FORMS[form]
    model, biased = tiny_model(family, **changes), form.endswith("bias")
    dense = OpenModel(tiny_model(family, **changes))
    cut(model, num_experts=4, top_k=3)
    bias = dense.tensor(0, None, "down_bias") if biased else torch.zeros(32)
    bank, scale = layers_of(model)[0].bank, float(layers_of(model)[0].router.scale)
    assert (bank.down_proj_bias is not None) == biased
    shares = bank.down_proj_bias if biased else torch.zeros(4, 32)
    for chosen in ([0, 1, 2], [1, 2, 3]):
        torch.testing.assert_close(scale * shares[chosen].sum(0), bias)


@torch.no_grad()
def test_only_chosen_slices_cost_operations() -> None:
    """One slice that no token chose is a quarter of the operations less than all four."""
    model = tiny_model("llama")
    cut(model, num_experts=4, top_k=2)
    bank = layers_of(model)[0].bank
    x_TD = torch.randn(10, 32)

    def operations(experts: list[int]) -> int:
        expert_TK = torch.tensor(experts).repeat(10, 1)
        with operation_counter() as run:
            bank(x_TD, Routing.from_topk(expert_TK, torch.ones(expert_TK.shape), num_experts=4))
        return run.get_total_flops()

    one_slice = 10 * 2 * 3 * 32 * 12
    assert [operations([0, 1, 2, 3]), operations([0, 2]), operations([3])] == [4 * one_slice, 2 * one_slice, one_slice]


@torch.no_grad()
def test_it_saves_opens_and_generates(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    cut(model, num_experts=4, top_k=2)
    for layer in layers_of(model):
        layer.router.scale.fill_(1.25)  # as if it were fitted
        layer.router.bias.normal_(generator=torch.Generator().manual_seed(1))
    moestro.save(model, tmp_path / "cut")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert {float(layer.router.scale) for layer in layers_of(again)} == {1.25}
    assert torch.equal(logits(again), logits(model))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(ids(1), **options), model.generate(ids(1), **options))


def test_a_plan_that_looked_at_the_model_belongs_to_it() -> None:
    with pytest.raises(PlanError, match="make a new plan"):
        surgery.apply(tiny_model("llama", seed=1), planned(tiny_model("llama"), partition="weights"))
    assert planned(tiny_model("llama")).model_hash is None
    assert planned(tiny_model("llama"), seed=1) != planned(tiny_model("llama"), seed=2)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="top_k=5, but num_experts=4"):
        FACTORLLM.configure({"num_experts": 4, "top_k": 5})
    with pytest.raises(PlanError, match="48 inner units cannot be cut into 5 equal slices; num_experts may be"):
        planned(tiny_model("llama"), num_experts=5)
    config = FACTORLLM.configure({"partition": "coactivation"})
    with pytest.raises(PlanError, match="'coactivation' was not measured"):
        FACTORLLM.plan(PlanInputs(subject=OpenModel(tiny_model("llama"))), config)
