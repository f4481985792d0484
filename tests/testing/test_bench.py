"""The benchmarks: fair order, honest arithmetic, arms that compute the same, and the printed report."""

import json
import statistics
import sys

import pytest
import torch

from moestro import ops
from moestro.cli import main
from moestro.core.errors import ConfigError
from moestro.testing.bench import harness, train_layer, train_model
from moestro.testing.bench.harness import Row, interleave, paired_ratio, time_rows


TINY_LAYER = train_layer.Shape(hidden=16, experts=4, inner=8, top_k=2)
TINY_MODEL = train_model.Shape(
    layers=2, hidden=32, experts=4, inner=8, top_k=2, heads=4, vocabulary=40, rows=2, length=8
)


def test_arms_take_turns_in_rotating_order():
    order = []
    arms = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = interleave(arms, rounds=3, warmup=0)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    with pytest.raises(ConfigError, match="0 rounds"):
        interleave(arms, rounds=0)


def test_a_ratio_over_one_means_ours_is_better():
    rows = time_rows("case", "forward", {"ours": [1.0, 2.0, 3.0], "peer": [4.0, 8.0, 6.0]})
    assert rows == [Row("case", "forward", "ms", 2000.0, "peer", 6000.0, 4.0, rows[0].spread)]
    # round by round 4, 4 and 2: quartiles 3 and 4, median 4
    assert rows[0].spread == pytest.approx((4 - 3) / 4)
    assert paired_ratio([1.0], [2.0]) == (0.5, 0.0)


@pytest.mark.parametrize("router", [False, True])
def test_all_arms_of_a_layer_compute_the_same(router):
    arms = train_layer.Arms(TINY_LAYER, 20, router=router)
    outputs = {name: forward().detach().view(20, 16) for name, forward in arms.forwards().items()}
    dense = outputs.pop("dense")
    for name, y in outputs.items():
        torch.testing.assert_close(y, outputs["eager"], atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.allclose(dense, outputs["eager"])
    flops = sum(p.numel() for p in arms.dense.parameters())
    assert flops == sum(p[0].numel() for p in arms.block.experts.parameters()) * TINY_LAYER.top_k


def test_a_step_runs_backward_and_leaves_no_gradients():
    arms = train_layer.Arms(TINY_LAYER, 20)
    with ops.counting(ops.training_backend()) as calls:
        seen = []
        arms.layer.bank.down_proj.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.abs().sum().item()))
        arms.steps()["ours"]()
    assert calls == 1
    assert seen[0] > 0
    assert all(p.grad is None for p in [*arms.layer.parameters(), arms.x_TD, arms.weight_TK])


@pytest.mark.parametrize("tokens", [1, 12])
def test_layer_rows(tokens, monkeypatch):
    seconds = {}
    monkeypatch.setattr(
        train_layer, "interleave", lambda *args, **kw: seconds.update(interleave(*args, **kw)) or seconds
    )
    rows = train_layer.compare(TINY_LAYER, tokens, 1, backward=tokens > 1, router=False)
    assert [row.peer_name for row in rows] == ["dense", "eager", "grouped_mm"]
    for row in rows:
        ratios = [peer / ours for peer, ours in zip(seconds[row.peer_name], seconds["ours"], strict=True)]
        assert row.ratio == pytest.approx(statistics.median(ratios))


@pytest.mark.slow  # two processes that import Transformers' models
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_counts_activations_and_not_the_weights():
    tokens, shape = 4096, train_layer.Shape(hidden=128, experts=8, inner=128, top_k=2)
    row = train_layer.memory(shape, tokens)
    wide = 4e-6 * tokens * shape.inner * shape.top_k  # MB of one activation of the dense twin's inner width
    assert 3 * wide < row.peer < 20 * wide
    assert 2 * wide < row.ours < 20 * wide
    assert row.ratio == pytest.approx(row.peer / row.ours)


def test_model_rows():
    rows = train_model.compare(TINY_MODEL, 1)
    assert [(row.peer_name, "interface" in row.case) for row in rows] == [
        (peer, second) for second in (False, True) for peer in ("dense", "eager", "grouped_mm")
    ]
    for row in rows:
        assert row.unit == "tokens/s"
        assert row.ratio == pytest.approx(row.ours / row.peer)


def test_different_losses_stop_the_comparison():
    trainers = {name: train_model.Trainer(TINY_MODEL, name) for name in ("ours", "eager")}
    with torch.no_grad():
        trainers["ours"].model.model.layers[0].mlp.bank.down_proj.mul_(-50)
    with pytest.raises(AssertionError, match="eager"):
        train_model.check_same_loss(trainers)


def test_the_command_prints_the_report(monkeypatch, capsys):
    row = Row("a case", "forward", "ms", 2.0, "eager", 3.0, 1.5, 0.1)
    monkeypatch.setattr(train_layer, "run", lambda rounds: [row] * rounds)
    assert main(["bench", "train-layer", "--json", "--rounds", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"name", "machine", "date", "rows"}
    assert report["name"] == "train-layer"
    assert report["rows"] == [vars(row)] * 2
    assert main(["bench", "train-layer"]) == 0
    shown = capsys.readouterr().out
    assert "a case: forward" in shown
    assert "x1.50" in shown


def test_the_command_lists_and_refuses(capsys):
    assert main(["bench", "list"]) == 0
    assert {"train-layer", "train-model"} <= set(capsys.readouterr().out.split())
    assert main(["bench", "train-lair"]) == 2
    assert "no benchmark 'train-lair'; there are:" in capsys.readouterr().err
    assert "harness" not in harness.names()
    assert not any(name.startswith(("_", "-")) for name in harness.names())
