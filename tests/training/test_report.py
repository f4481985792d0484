"""What a run says about itself: router statistics, the log, the compute type."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.core.errors import ConfigError
from moestro.testing.training import TinyMixture, packed, recipe
from moestro.training import precision
from moestro.training.log import Log, read_metrics, worst_violation
from moestro.training.loop import Trainer, first_difference
from moestro.training.monitor import LoadCounter, Window, report
from moestro.training.objectives import Causal


def test_statistics_in_closed_form() -> None:
    even = report(torch.tensor([6, 6, 6, 6]))
    assert (even.max_violation, even.dead, even.assignments) == (0.0, [], 24)
    assert even.load_entropy == pytest.approx(1.0)
    collapsed = report(torch.tensor([0, 12, 0]))
    assert collapsed.max_violation == 2.0
    assert collapsed.load_entropy == pytest.approx(0.0, abs=1e-12)
    assert collapsed.dead == [0, 2]
    nulls = report(torch.tensor([2, 6, 8]), num_null=1, entropy=(3.0, 2))
    assert nulls.load == [0.125, 0.375, 0.5]
    assert nulls.max_violation == 0.5  # over the real experts
    assert nulls.token_entropy == 1.5
    nothing = report(torch.tensor([0, 0]))
    assert (nothing.max_violation, nothing.assignments) == (0.0, 0)


def test_token_entropy_is_the_softmaxs_over_valid_tokens() -> None:
    from moestro.core.session import session

    model = TinyMixture().train()
    counter = LoadCounter(with_entropy=True)
    ids = torch.tensor([[1, 2, 3]])
    with session(recorder=counter):
        model(ids)
    logits = model.embed(ids)[0] @ model.blocks[0].router.weight.T  # type: ignore[union-attr,operator]
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    total, tokens = counter.entropy["blocks.0"]
    assert tokens == 3
    assert total == pytest.approx(wanted.sum().item(), rel=1e-5)


def test_a_window_adds_steps_up_and_starts_anew() -> None:
    window, counter = Window(), LoadCounter()
    window.add({"a": torch.tensor([1, 0])}, counter)
    window.add({"a": torch.tensor([2, 4]), "b": torch.tensor([1])}, counter)
    taken = window.take()
    assert taken["a"].assignments == 7
    assert taken["b"].assignments == 1
    assert window.take() == {}


def test_the_monitor_is_exact_over_the_window(tmp_path: Path) -> None:
    counted: list[dict[str, list[int]]] = []
    run = Trainer(
        TinyMixture(layers=2),
        recipe(steps=6, accumulation=2, monitor={"every": 3}),
        packed(),
        Causal(),
        tmp_path,
        hooks=[lambda run, report: counted.append({site: load.tolist() for site, load in report.load.items()})],
    )
    run.run(silent=True)
    rows = [row for row in read_metrics(tmp_path) if "router" in row]
    assert [row["step"] for row in rows] == [3, 6]
    for row, steps in zip(rows, (counted[:3], counted[3:]), strict=True):
        for site, found in row["router"].items():
            total = torch.tensor([step[site] for step in steps]).sum(0).double()
            assert found["assignments"] == int(total.sum()) == 3 * 8 * 6 * 2
            assert found["load"] == pytest.approx((total / total.sum()).tolist(), abs=1e-6)


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.5, "lr": 0.1, "grad_norm": 2.0, "tokens_per_second": 10.0}


def test_lines_on_a_screen_that_is_no_terminal(tmp_path: Path) -> None:
    screen = io.StringIO()
    with Log(tmp_path, 5, every=2, stream=screen) as log:
        for step in range(1, 6):
            log.step(row(step))
    lines = screen.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    assert "loss 1.5000" in lines[0]
    assert [found["step"] for found in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    with Log(tmp_path, 2, stream=screen) as log:
        log.step({**row(1), "router": {"a": {"max_violation": 0.5, "dead": [3]}}})
        log.say("[a] line")
    text = screen.getvalue()
    assert "1/2" in text
    assert "maxvio 0.50" in text
    assert "1 dead experts" in text
    assert "[a] line" in text


def test_resuming_drops_lines_of_steps_that_never_were(tmp_path: Path) -> None:
    with Log(tmp_path, 5, silent=True) as log:
        for step in range(1, 5):
            log.step(row(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed here
    with Log(tmp_path, 5, start=2, silent=True) as log:
        log.step(row(3))
    assert [found["step"] for found in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Trainer(
        TinyMixture(), recipe(steps=2, monitor={"every": 1, "tensorboard": True}), packed(), Causal(), tmp_path
    )
    run.run(silent=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"loss", "lr", "terms/causal", "router/blocks.0/max_violation"} <= names
    wanted = [found["loss"] for found in read_metrics(tmp_path)]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(wanted)


def test_tensorboard_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        Log(tmp_path, 2, tensorboard=True, silent=True)


def test_words_on_the_least_even_layer() -> None:
    assert worst_violation({}) == ""
    rows = {"a": {"max_violation": 0.1, "dead": []}, "b": {"max_violation": 1.25, "dead": [1, 2]}}
    assert worst_violation(rows) == "maxvio 1.25  2 dead experts"


def test_the_compute_type_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {torch.float32: 1.0, torch.bfloat16: 0.5}
    monkeypatch.setattr(precision, "matmul_seconds", lambda dtype: times[dtype])
    assert precision.choose_dtype("auto")[0] is torch.bfloat16
    times[torch.bfloat16] = 0.9  # faster, but not by enough
    assert precision.choose_dtype("auto")[0] is torch.float32
    assert precision.choose_dtype("bfloat16") == (torch.bfloat16, "compute type bfloat16, as the recipe says")
    monkeypatch.undo()
    threads = torch.get_num_threads()
    assert precision.matmul_seconds(torch.float32) > 0
    assert torch.get_num_threads() == threads


def test_bfloat16_computes_with_float32_weights(tmp_path: Path) -> None:
    model = TinyMixture()
    seen: list[torch.dtype] = []
    model.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run = Trainer(model, recipe(steps=2), packed(), Causal(), tmp_path, dtype=torch.bfloat16)
    run.run(silent=True)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(state["exp_avg"].dtype == torch.float32 for state in run.optimizer.state.values())
    assert read_metrics(tmp_path)[-1]["loss"] < 4


def test_the_first_difference_between_two_recipes() -> None:
    one, two = (recipe(**values).model_dump(mode="json") for values in ({}, {"optimizer": {"lr": 0.5}}))
    assert first_difference(one, one) is None
    assert first_difference(one, two) == "optimizer.lr was 0.01, is 0.5"
    assert first_difference(one, recipe(steps=9, monitor={"every": 2}).model_dump(mode="json")) is None
    assert json.dumps(one)
