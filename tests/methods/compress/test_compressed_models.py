"""Compressed experts in whole models: converted, saved, reopened, stripped, exported; from the command line too."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import moestro
from moestro import surgery
from moestro.cli import main
from moestro.core.bank import StackedFFN
from moestro.core.errors import ConfigError, MoestroError, PlanError, SaveError
from moestro.methods.planning import make_plan
from moestro.models.swap import state_of, swap
from moestro.surgery.opened import OpenModel
from moestro.training.size import size_of
from tests.methods.compress.helpers import applied, opened
from tests.surgery.helpers import ids, layers_of, logits, mixture


ID = "compress.compressed_experts"


def spread(model: Any, std: float = 0.3) -> Any:
    """The model with vectors that say something."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.bank.deltas.normal_(std=std, generator=draw)
    return model


def numbers(model: Any) -> list[int]:
    """The blocks that hold mixtures."""
    return [layer for layer, place in OpenModel(model).places.items() if place.dense is None]


def with_top_k(model: Any, top_k: int) -> Any:
    """The same mixture, with another number of choices."""
    there = {layer.site: (layer.router.state_dict(), layer.router.made_by.config) for layer in layers_of(model)}
    (_, config), *_ = there.values()
    swap(model, "train.softmax_topk", {**config, "top_k": top_k}, layers=numbers(model))
    for layer in layers_of(model):
        layer.router.load_state_dict(there[layer.site][0])
    return model


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "mixtral"])
@pytest.mark.parametrize("way", ["swap", "surgery"])
def test_at_the_start_logits_are_those_of_fewer_choices(family: str, way: str, tmp_path: Path) -> None:
    """A shared branch, as qwen2_moe has, stays. Where weights sum to 1 they must be filled up for this."""
    model, other = (opened(family, tmp_path / name) for name in "ab")
    kinds = {layer.router.made_by.config["renormalise"] for layer in layers_of(model)}
    config = {"n_main": 1, "renormalise_main": kinds == {True}}
    before = logits(model)
    if way == "swap":
        swap(model, ID, config, layers=numbers(model))
    else:
        applied(ID, model, **config)
    fewer = logits(with_top_k(other, 1))
    assert (fewer - before).abs().max() > 1e-4
    if kinds == {True}:  # w_1 (sum over all) / w_1 is rounded
        torch.testing.assert_close(logits(model), fewer, atol=1e-5, rtol=0)
    else:
        assert torch.equal(logits(model), fewer)
        single = ids(1, 1)
        assert torch.equal(logits(model, single), logits(other, single))
    assert all((layer.shared is None) == (family != "qwen2_moe") for layer in layers_of(model))
    assert [list(layer.losses) for layer in layers_of(model)] == [list(layer.losses) for layer in layers_of(other)]


@pytest.mark.parametrize("way", ["swap", "surgery"])
def test_a_saved_model_reopens_everywhere_and_generates(way: str, tmp_path: Path) -> None:
    model = opened("olmoe", tmp_path, num_experts_per_tok=4)
    if way == "swap":
        swap(model, ID, {"inject": "input"})
    else:
        applied(ID, model, inject="input")
    spread(model)
    moestro.save(model, tmp_path / "out")
    again = moestro.load(tmp_path / "out")
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(auto), logits(model))
    batch = ids(2, 6)
    padded, mask = torch.nn.functional.pad(batch, (3, 0)), torch.nn.functional.pad(torch.ones_like(batch), (3, 0))
    torch.testing.assert_close(
        logits(again, padded, attention_mask=mask)[:, 3:], logits(again, batch), atol=1e-5, rtol=0
    )
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached, whole = (again.generate(batch, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, whole)
    alone = again.generate(padded, attention_mask=mask, **options)
    assert torch.equal(alone[:, 9:], cached[:, 6:])
    assert torch.equal(logits(copy.deepcopy(again)), logits(model))


def test_a_checkpoint_on_disk_becomes_the_same_model(tmp_path: Path) -> None:
    model = opened("olmoe", tmp_path, num_experts_per_tok=4)
    plan = make_plan(ID, model, {})
    surgery.apply_folder(tmp_path / "stock-olmoe", plan, tmp_path / "out")
    found = moestro.load(tmp_path / "out")
    surgery.apply(model, plan)
    assert found.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.state_dict().items())
    assert torch.equal(logits(found), logits(model))


def test_strip_gives_a_plain_model_that_exports(tmp_path: Path) -> None:
    model = opened("olmoe", tmp_path, num_experts_per_tok=4)
    fewer = with_top_k(copy.deepcopy(model), 2)
    applied(ID, model)
    start = logits(model)
    spread(model)
    with pytest.raises(SaveError, match="its experts are a CompressedFFN"):
        moestro.export(model, tmp_path / "no")
    applied(ID, model, strip=True)
    assert torch.equal(logits(model), start)
    assert torch.equal(logits(model), logits(fewer))
    for layer in layers_of(model):
        assert type(layer.bank) is StackedFFN
        assert type(layer.router).__name__ == "SoftmaxTopK"
        assert layer.router.top_k == 2
    moestro.save(model, tmp_path / "out")
    assert torch.equal(logits(moestro.load(tmp_path / "out")), start)
    moestro.export(model, tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock).__name__ == "OlmoeForCausalLM"
    assert stock.config.num_experts_per_tok == 2
    torch.testing.assert_close(logits(stock), start, atol=1e-5, rtol=0)


def test_a_stripped_model_can_be_changed_again_a_compressed_one_cannot(tmp_path: Path) -> None:
    model = mixture(experts=6, top_k=4)
    applied(ID, model, layers=[1])
    shape = OpenModel(model).shape
    assert [shape.layers[i].module is None for i in (0, 1)] == [False, True]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for method, config in ((ID, {}), ("compress.prune_experts", {"criterion": "random", "layers": [1]})):
        with pytest.raises(PlanError, match="layer 1"):
            applied(method, model, **config)
    with pytest.raises(PlanError, match=r"layer 0: .*no compressed experts to strip"):
        applied(ID, model, strip=True)
    with pytest.raises(PlanError, match="CompressedFFN holds more than its experts, which would be lost"):
        surgery.apply(
            model, make_plan("compress.prune_experts", model, {"criterion": "random", "keep": 4, "layers": [1]})
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    applied(ID, model, strip=True, layers=[1])
    applied("compress.prune_experts", model, criterion="random", keep=4)
    assert [layer.bank.num_experts for layer in layers_of(model)] == [4, 4]
    assert [layer.router.top_k for layer in layers_of(model)] == [4, 2]
    with pytest.raises(PlanError, match="the router chooses 4; give at most 4"):
        applied(ID, model, n_main=5)


def test_a_failed_swap_changes_nothing() -> None:
    model = mixture(experts=4, top_k=2)
    before, kinds = logits(model), [type(layer.router) for layer in layers_of(model)]
    with pytest.raises(ConfigError, match="n_main=3, but the router chooses 2"):
        swap(model, ID, {"n_main": 3})
    assert [type(layer.router) for layer in layers_of(model)] == kinds
    assert torch.equal(logits(model), before)
    assert ID not in [entry.method for entry in state_of(model).swaps]


def test_the_plan_says_what_is_saved_and_active_parameters_fall() -> None:
    model = mixture(experts=6, top_k=4)
    before = size_of(model, 16)
    plan = make_plan(ID, model, {})
    each = sum(layer.bank.flops_per_row(0) for layer in layers_of(model))
    found = plan.notes["operations_per_token"]
    assert found["main"] == found["auxiliary"] == 2 * each
    assert plan.notes["saves"] == "operations"
    surgery.apply(model, plan)
    after = size_of(model, 16)
    assert before.forward_flops - after.forward_flops == pytest.approx(found["auxiliary"], rel=1e-6)
    vectors = sum(layer.bank.deltas.numel() for layer in layers_of(model))
    assert after.parameters == before.parameters + vectors
    assert after.active < before.active
    assert not after.experts_vary
    assert make_plan(ID, mixture(experts=6, top_k=4), {"n_main": 4}).notes["keeps"] == "as_routed"


def test_the_optimiser_follows_and_vectors_join_it() -> None:
    model = mixture(experts=4, top_k=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    old = [optimizer.state[layer.router.weight]["exp_avg"].clone() for layer in layers_of(model)]
    banks = [optimizer.state[layer.bank.down_proj]["exp_avg"].clone() for layer in layers_of(model)]
    surgery.apply(model, make_plan(ID, model, {}), optimizer=optimizer)
    for layer, router, down in zip(layers_of(model), old, banks, strict=True):
        assert torch.equal(optimizer.state[layer.router.weight]["exp_avg"], router)
        assert torch.equal(optimizer.state[layer.bank.down_proj]["exp_avg"], down)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    step()
    assert all(layer.bank.deltas.any() for layer in layers_of(model))


def test_from_the_command_line_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before: Tensor = logits(opened("olmoe", tmp_path, num_experts_per_tok=4))
    stock, out, back = tmp_path / "stock-olmoe", tmp_path / "out", tmp_path / "back"
    assert main(["compress", "compressed_experts", str(stock), str(out), "--n-main", "2"]) == 0
    assert "layers 0, 1: 6 experts" in capsys.readouterr().out
    model = moestro.load(out)
    assert [layer.bank.n_main for layer in layers_of(model)] == [2, 2]
    assert (logits(model) - before).abs().max() > 1e-4
    (entry,) = json.loads((out / "receipt.json").read_text())["surgery"]
    assert entry["notes"]["operations_per_token"]["main"] == entry["notes"]["operations_per_token"]["auxiliary"]
    assert main(["compress", "compressed-experts", str(out), str(back), "--strip"]) == 0
    assert torch.equal(logits(moestro.load(back)), logits(model))
    assert main(["compress", "compressed-experts", str(out), str(tmp_path / "no")]) == MoestroError.exit_status
    assert "compressed already" in capsys.readouterr().err
    assert main(["compress", "compressed-experts", str(stock), str(tmp_path / "no"), "--n-main", "9"]) == 2
    assert "n_main=9, but the router chooses 4" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
