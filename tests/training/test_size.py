"""Sizes of whole models: the same as the planner's closed forms, and as what AdamW and a counted step hold and run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moestro.core.cost import RowCounter
from moestro.core.layer import mixture_layers
from moestro.core.session import session
from moestro.models.load import adopt
from moestro.models.sizing_build import size_of_config, size_of_model
from moestro.models.swap import swap
from moestro.testing.tiny import TINY, VOCAB, tiny_model
from moestro.training.build import open_model
from moestro.training.log import read_metrics
from moestro.training.recipe import Recipe
from moestro.training.run import dry_run, train
from moestro.training.size import size_of


LENGTH = 9


@pytest.mark.parametrize("family", TINY)
def test_a_token_costs_what_the_planner_says(family: str) -> None:
    """Attention of every kind too: latent, windowed, in both directions, across stacks."""
    model = tiny_model(family)
    model.config.architectures = [type(model).__name__]
    planned = size_of_config(model.config)
    tables = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    size = size_of(adopt(model), LENGTH)
    assert size.forward_flops == pytest.approx(planned.forward_flops(LENGTH) / LENGTH, abs=1)
    assert size.parameters == planned.whole.parameters - tables
    assert size.active == pytest.approx(planned.active_parameters - tables, abs=len(planned.mixtures))
    assert size.experts_vary == (family == "switch_transformers")  # whose capacity drops tokens


def test_a_step_of_a_ragged_model_runs_what_is_counted() -> None:
    """Two layers with different numbers of experts, null experts and a shared branch; forward, backward and bytes."""
    model = adopt(tiny_model("llama", attn_implementation="eager"))
    numbers: dict[str, Any] = {"num_experts": {"per_layer": [3, 6]}, "expert_size": 20, "shared": 12}
    router = {"method": "train.expert_choice", "config": {"capacity_factor": 1.3}}
    swap(model, "train.moe", {**numbers, "router": router})
    guess = size_of(model, LENGTH)
    rows, ids = RowCounter(), torch.arange(2 * LENGTH).view(2, LENGTH) % VOCAB
    optimizer = torch.optim.AdamW(model.train().parameters())
    with session(recorder=rows), FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean()
        forward = counter.get_total_flops()
        loss.backward()
    optimizer.step()
    size = size_of(model, LENGTH, rows=rows.per_token())
    hidden_pairs = 2 * 4 * 32 * (LENGTH - 1) / 2  # layers, positions after a token's own, width of all heads
    assert forward / ids.numel() == pytest.approx(size.forward_flops + hidden_pairs, rel=0.01)
    assert counter.get_total_flops() / forward == pytest.approx(3, rel=0.01)
    assert size == guess  # places of an expert are settings, not data
    assert size.optimizer_bytes == sum(s[n].nbytes for s in optimizer.state.values() for n in ("exp_avg", "exp_avg_sq"))
    assert size.gradient_bytes == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert size.weight_bytes == sum(p.nbytes for p in model.parameters())


def test_measured_rows_decide_what_is_active() -> None:
    model = adopt(tiny_model("mixtral"))
    whole = size_of(model, LENGTH)
    sites = list(mixture_layers(model))
    one = size_of(model, LENGTH, rows={site: [0.2] * 5 for site in sites})
    bank = mixture_layers(model)[sites[0]].bank
    assert whole.forward_flops - one.forward_flops == 2 * bank.flops_per_row(0)
    assert whole.active - one.active == 2 * sum(p[0].numel() for p in bank.parameters())
    again = size_of(model, LENGTH, gradient_checkpointing=True)
    assert (again.train_flops, whole.train_flops) == (4 * whole.forward_flops, 3 * whole.forward_flops)


def test_a_run_logs_the_operations_that_ran(tmp_path: Path) -> None:
    """A capacity drops tokens; reports come every third step, at the end of a phase and at the end."""
    router = {"method": "train.switch", "config": {"capacity": 3}}
    swaps = [{"method": "train.moe", "config": {"num_experts": 4, "expert_size": 8, "router": router}}]
    settings = Recipe(
        name="dropping",
        model={"config": {**TINY["llama"], "model_type": "llama", "vocab_size": "auto"}, "swaps": swaps},
        data={"source": "builtin:german", "tokenizer": "bpe:300", "sequence_length": 16},
        phases=[{"name": "first", "steps": 4}, {"name": "second"}],
        monitor={"every": 3},
        steps=7,
        batch_size=2,
        precision="float32",
    )
    train(settings, tmp_path, silent=True)
    rows = read_metrics(tmp_path)
    assert {row["step"] for row in rows if "flops_per_token" in row} == {3, 4, 6, 7}
    assert {row["tokens"] for row in rows} == {2 * 16}
    model = open_model(tmp_path / "model")
    for row in rows:
        if "router" in row:
            real = {site: found["real_per_token"] for site, found in row["router"].items()}
            assert all(0 < value < 1 for value in real.values())
            each = {site: [value / 4] * 4 for site, value in real.items()}
            assert row["flops_per_token"] == size_of(model, 16, rows=each).train_flops
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["size"] == dry_run(settings).json()
    assert Recipe.parse(told["recipe"]) == settings


def test_tables_are_bytes_but_no_parameters() -> None:
    model = adopt(tiny_model("mixtral"))
    before = size_of(model, LENGTH)
    swap(model, "train.hash_router", {"num_experts": 5, "top_k": 2})
    after = size_of(model, LENGTH)
    assert after.buffer_bytes - before.buffer_bytes == 2 * VOCAB * 2 * 8
    assert before.parameters - after.parameters == 2 * 5 * 32


def test_a_plain_module_is_counted_too() -> None:
    module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 9, bias=False))
    assert size_of(module, LENGTH).forward_flops == 2 * (4 * 8 + 8 * 9)
    assert size_of(module, LENGTH).forward_flops == size_of_model(module).flops_per_token()
