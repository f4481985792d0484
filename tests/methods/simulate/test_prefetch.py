"""The simulated reader: times by hand, arms against each other, rows of a trace, recorded peeks, the command."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moestro.cli import main
from moestro.core.errors import ConfigError
from moestro.core.forecast import Recorded, Wish
from moestro.core.inputs import MeterInputs
from moestro.core.plan import MethodUse
from moestro.core.registry import method
from moestro.core.report import Report
from moestro.core.trace import RoutingTrace, trace
from moestro.engine.describe import describe
from moestro.engine.native_forward import NativeForward
from moestro.engine.pack import pack_model
from moestro.engine.packed import Packed
from moestro.engine.recorder import Recorder
from moestro.engine.store import ExpertStore
from moestro.methods.simulate._parts.arms import Nothing, Repeat
from moestro.methods.simulate._parts.machine import Machine
from moestro.methods.simulate._parts.rows import Rows, rows_of
from moestro.methods.simulate._parts.steps import steps_of
from moestro.models.load import load
from moestro.testing.tiny import VOCAB, tiny_folder
from tests.engine.slab_files import policy
from tests.methods.simulate.test_cache import by_hand


METER = method("simulate.prefetch")
CACHE = method("simulate.cache")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sequences of 16 tokens through a mixture of 2 layers, 8 experts, and what its gates say ahead."""
    folder = tmp_path_factory.mktemp("trace")
    tiny_folder("mixtral", folder / "model", head_dim=16, num_local_experts=8)
    model = load(folder / "model")
    ids = torch.randint(3, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), trace(model, folder / "run.trace"):
        model(input_ids=ids)
    pack_model(folder / "model", folder / "packed", bits=32)
    packed = Packed.open(folder / "packed")
    recorder = Recorder()
    with ExpertStore(packed, 4 * packed.experts[0].stride, policy("lru")) as store:
        description = describe(packed, packed.resident())
        one = NativeForward(description, pages=3, store=store, forecast=recorder, threads=1)
        for sequence, tokens in reversed(list(enumerate(ids.numpy().astype(np.int32)))):
            one.step(one_prompt(tokens, sequence))
    recorder.save_peeks(folder / "peeks.npz")
    told = recorder.recorded()
    assert told.routes[0].shape == (48, 2)
    assert told.experts == (8, 8)
    np.savez(folder / "routes.npz", *told.routes.values())
    return folder


def one_prompt(tokens: np.ndarray, sequence: int) -> Any:
    count = len(tokens)
    return SimpleNamespace(
        tokens=tokens,
        positions=np.arange(count, dtype=np.int32),
        rows_of=np.zeros(count, np.int32),
        sequences=[sequence],
        tables=np.array([[sequence]], np.int32),
        want=np.zeros(0, np.int32),
        routes=None,
    )


def machine(slots: int = 8, read_s: float = 1.0, expert_s: float = 0.25) -> Machine:
    return Machine(policy("lru"), slots, 1, read_s, expert_s)


def test_what_was_wished_for_is_read_while_others_compute() -> None:
    one = machine()
    one.begin()
    one.compute(0.5)
    one.ahead([Wish(1, (0, 1, 2))])
    one.layer(0, [0, 1])
    # Read ahead begins at 0.5 and is not broken off, the demands follow: ready at 2.5 and 3.5, computed till 3.75.
    assert one.now == pytest.approx(3.75)
    assert one.counts.wait == pytest.approx(1.0 + 1.0 - 0.25 + 1.0)
    one.compute(1.0)
    one.layer(1, [0, 1, 2])
    # The other two are there at 4.5 and 5.5; from 4.75 on two are computed, the third waits from 5.25 to 5.5.
    assert one.now == pytest.approx(5.75)
    found = one.finish()
    assert (found.hits, found.misses, found.joined) == (2, 3, 1)
    assert (found.bytes, found.wasted) == (5, 0)
    assert (found.foreseen, found.wished, found.foreseeable) == (3, 3, 3)
    assert found.reading == pytest.approx(5.0)
    assert found.wait == pytest.approx(3.0)
    assert found.computing == pytest.approx(0.5 + 1.0 + 5 * 0.25)
    assert one.now == pytest.approx(found.wait + found.computing)
    assert found.hidden == pytest.approx(2.0)
    assert found.hideable == pytest.approx(2.75)


def test_a_layer_whose_wishes_are_seldom_right_is_not_read_ahead() -> None:
    one = Machine(policy("lru"), 2, 1, 1.0, 0.25, least_right=0.5)
    for number in range(9):
        one.begin()
        one.ahead([Wish(1, (7,))])
        one.compute(2.0)  # so that it has been read
        one.layer(0, [0, 1])
        one.layer(1, [2])
        # After n layers that did not need it, 0.9 ** n of what was wished for counts as right.
        assert one.counts.bytes + one.counts.hits == 3 * (number + 1) + min(number + 1, 7)
    assert 0.9**7 < 0.5 <= 0.9**6


def test_stale_wishes_are_dropped_and_vain_ones_counted() -> None:
    one = machine(slots=3)
    one.begin()
    one.ahead([Wish(1, (5, 6, 7)), Wish(2, (1,), 2)])
    one.layer(1, [0])
    # One read was under way, the other two wishes of the layer are stale; then the next layer's turn comes.
    assert one.counts.bytes == 3
    one.begin()
    assert one.counts.wasted == 0
    one.layer(2, [0, 1, 2])
    found = one.finish()
    assert (found.misses, found.wasted, found.bytes) == (4, 1, 5)
    assert (found.wished, found.foreseen) == (3, 0)


def test_wishes_never_evict_what_is_wished_for() -> None:
    one = machine(slots=2)
    one.begin()
    one.ahead([Wish(1, (0, 1, 2, 3))])
    one.compute(10.0)
    assert one.counts.bytes == 2
    one.layer(1, [0, 1])
    assert one.counts.wait == 0
    assert one.finish().hits == 2


def test_waves_wait_for_a_read_ahead_that_is_under_way() -> None:
    one = machine(slots=2)
    one.begin()
    one.ahead([Wish(1, (7,))])
    one.layer(0, [0, 1, 2])
    found = one.finish()
    assert found.misses == 3
    assert one.cache.used <= 2
    assert one.now == pytest.approx(found.wait + found.computing)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_rows_are_the_steps_of_the_trace(recorded: Path, batch: int) -> None:
    found = RoutingTrace.open(recorded / "run.trace")
    rows, steps = rows_of(found, "decode", batch), steps_of(found, "decode", batch)
    assert rows.needs() == steps.keys
    assert len(rows.recorded.tokens) == steps.num_tokens == 48
    needs, told = by_hand(found), rows.recorded
    for at, place in enumerate(zip(told.sequences.tolist(), told.positions.tolist(), strict=True)):
        for layer in range(2):
            assert set(told.routes[layer][at].tolist()) == needs[*place, layer]
    past, rest = rows.split(0.25)
    assert past.needs() + rest.needs() == rows.needs()
    assert rows_of(found, "recorded").needs() == steps_of(found, "recorded").keys


@pytest.mark.parametrize("held", [2, 5, 9])
@pytest.mark.parametrize("batch", [1, 3])
def test_without_a_forecast_it_is_the_simulated_cache(recorded: Path, held: int, batch: int) -> None:
    subject = MeterInputs(trace=RoutingTrace.open(recorded / "run.trace"))
    settings = {"budgets": [held * 1000], "expert_bytes": 1000, "batch": batch, "disk_latency_s": 2e-4}
    mine = METER.module.measure(subject, METER.configure(settings)).tables["forecasts"]
    theirs = CACHE.module.measure(subject, CACHE.configure(settings)).tables["policies"]
    got = dict(zip(mine.columns, mine.rows[0], strict=True))
    wanted = next(row for row in (dict(zip(theirs.columns, row, strict=True)) for row in theirs.rows)
                  if row["policy"] == "lru")  # fmt: skip
    assert got["forecast"] == "none"
    assert (got["hits"], got["misses"]) == (wanted["hits"], wanted["misses"])
    if batch * 2 <= held:
        assert got["wait (ms)"] == pytest.approx(wanted["wait a token (ms)"])
    else:  # waves, between which this machine does not read
        assert got["wait (ms)"] > wanted["wait a token (ms)"]
    assert got["wasted a token"] == got["right"] == got["on the way"] == 0


def table_of(report: Report) -> dict[str, dict[str, Any]]:
    table = report.tables["forecasts"]
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}  # type: ignore[misc]


def test_arms_hide_what_they_can(recorded: Path) -> None:
    subject = MeterInputs(trace=RoutingTrace.open(recorded / "run.trace"))
    settings = {
        "forecasts": [{"method": "serve.next_gate", "config": {"factor": factor}} for factor in (1.0, 2.0)],
        "peeks": str(recorded / "peeks.npz"),
        "budgets": [8000],
        "expert_bytes": 1000,
        "disk_latency_s": 1e-4,
        "layer_s": 5e-4,
    }
    report = METER.module.measure(subject, METER.configure(settings))
    rows = table_of(report)
    assert list(rows) == ["none", "repeat", "perfect", "next_gate(factor=1.0)", "next_gate(factor=2.0)"]
    for row in rows.values():
        assert row["hits"] + row["misses"] == 36 * 2 * 2
        assert 0 <= row["hidden share"] <= 1
        assert row["token (ms)"] == pytest.approx(2 * 0.5 + 4 * 0.1 + row["wait (ms)"])
    perfect, wide = rows["perfect"], rows["next_gate(factor=2.0)"]
    assert perfect["foreseen"] == perfect["right"] == 1
    assert perfect["wasted a token"] == 0
    assert perfect["wait (ms)"] < rows["none"]["wait (ms)"]
    assert wide["foreseen"] > rows["next_gate(factor=1.0)"]["foreseen"] > 0.3
    assert wide["right"] < rows["next_gate(factor=1.0)"]["right"]
    assert report.numbers["token_ms_perfect_at_8"] == perfect["token (ms)"]
    assert Report.parse(json.loads(json.dumps(report.model_dump(mode="json")))) == report


def test_a_perfect_forecast_with_room_leaves_the_first_layer_to_wait(recorded: Path) -> None:
    rows = rows_of(RoutingTrace.open(recorded / "run.trace"))
    config = METER.configure({"layer_s": 1.0, "expert_bytes": 1, "learn": 0})
    module = METER.module
    use = MethodUse(method="perfect")
    found = module.play(*module.acting("perfect", use, MethodUse(method="serve.lru"), rows, rows), rows, 16, config)
    first = {expert for part in rows.steps() for expert in rows.experts(part, 0)}
    late = {expert for part in rows.steps() for expert in rows.experts(part, 1)}
    assert found.bytes == len(first) + len(late)
    assert found.misses >= len(first)
    assert found.wait <= (len(first) + found.joined) * (1e-4 + 1e-9) + 1e-12


def test_a_forward_and_a_trace_tell_of_the_same_tokens(recorded: Path) -> None:
    """The trace came from PyTorch; what the engine wrote down, the last sequence first, is put in its order."""
    rows = rows_of(RoutingTrace.open(recorded / "run.trace"), peeks=recorded / "peeks.npz").recorded
    with np.load(recorded / "routes.npz") as file, np.load(recorded / "peeks.npz") as written:
        back = np.lexsort((written["position"], written["sequence"]))
        assert written["sequence"].tolist() == [2] * 16 + [1] * 16 + [0] * 16
        for layer in range(2):
            assert (np.sort(file[f"arr_{layer}"][back]) == np.sort(rows.routes[layer])).mean() > 0.9
        assert np.array_equal(written["peek.0.1"][back], rows.peeks[0, 1])


def changed(recorded: Path, folder: Path, **arrays: Any) -> Path:
    """The file of peeks with other arrays, or without those that are None."""
    with np.load(recorded / "peeks.npz") as file:
        found = {**{name: file[name] for name in file.files}, **arrays}
    with (folder / "changed.npz").open("wb") as written:
        np.savez(written, **{name: values for name, values in found.items() if values is not None})
    return folder / "changed.npz"


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"token": None}, "arrays sequence, position, token are missing"),
        ({"sequence": np.zeros(3)}, "not three lists of one length"),
        ({"token": np.zeros(48)}, "nothing of sequence 0 position 0 token [0-9]+; it belongs to another trace"),
        ({"routes.1": None}, "routes.1 is missing"),
        ({"routes.1": np.zeros((48, 2, 1), int)}, r"routes.1 of shape \(48, 2, 1\) is no routes.L"),
        ({"routes.0": np.full((48, 2), 8)}, "routes.0 holds expert 8, but the layer has 8"),
        ({"peek.0.1": np.zeros((4, 8))}, r"peek.0.1 of shape \(4, 8\) is no peek.L.M"),
        ({"peek.0.1": np.zeros((48, 6))}, r"peek.0.1 of shape \(48, 6\).*layers 0 and 1 have 8 and 8 experts"),
        ({"peek.0.3": np.zeros((48, 8))}, "layers 0 and 3 have 8 and 0 experts"),
        ({"peek.0": np.zeros((48, 8))}, "peek.0 of shape"),
    ],
)
def test_files_that_hold_no_peeks(arrays: dict[str, Any], words: str, recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        rows_of(RoutingTrace.open(recorded / "run.trace"), peeks=changed(recorded, tmp_path, **arrays))
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="no file of recorded peeks"):
        rows_of(RoutingTrace.open(recorded / "run.trace"), peeks=tmp_path / "bad.npz")


def test_peeks_of_another_model_with_the_same_tokens_are_refused(recorded: Path, tmp_path: Path) -> None:
    """Routes of a model of the same shape agree by chance; those of a coarser copy of the model mostly do."""
    trace = RoutingTrace.open(recorded / "run.trace")
    draw = np.random.Generator(np.random.PCG64(4))
    with np.load(recorded / "peeks.npz") as file:
        routes = file["routes.0"]
    coarse = np.where(draw.random((48, 1)) < 0.2, draw.integers(0, 8, (48, 2)), routes)
    assert rows_of(trace, peeks=changed(recorded, tmp_path, **{"routes.0": coarse})).recorded.peeks
    other = np.stack([draw.permutation(8)[:2] for _ in range(48)])
    with pytest.raises(ConfigError, match=r"routes.0: [0-9]+% of the trace's experts.*recorded with another model"):
        rows_of(trace, peeks=changed(recorded, tmp_path, **{"routes.0": other}))


def never_twice(layers: int, tokens: int) -> Rows:
    """One sequence of which every token takes an expert of its own in every layer."""
    column = np.arange(tokens, dtype=np.int32)
    told = Recorded(column, column, np.zeros_like(column), dict.fromkeys(range(layers), column[:, None]),
                    (tokens,) * layers)  # fmt: skip
    return Rows(told, np.arange(tokens + 1))


def played(rows: Rows, name: str, slots: int, config: Any) -> Any:
    module, lru = METER.module, MethodUse(method="serve.lru")
    return module.play(*module.acting(name, MethodUse(method=name), lru, rows, rows), rows, slots, config)


@pytest.mark.parametrize("read_s", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("distance", [0, 1, 2])
def test_what_a_pre_gated_model_has_decided_hides_what_the_formulas_say(distance: int, read_s: float) -> None:
    """t_n = 0.7 and t_e = 0.3 a block of five, room for the blocks that are known; the first ones wait."""
    rows = never_twice(5, 6)
    settings = {"decided": distance, "expert_bytes": 1, "disk_bytes_per_s": 1 / read_s, "disk_latency_s": 0}
    config = METER.configure({**settings, "layer_s": 0.7, "expert_s": 0.3})
    found = played(rows, "serve.pre_gated", distance + 1, config)
    assert (found.wasted, found.bytes) == (0, 30)
    assert found.foreseeable == found.foreseen == found.wished == (6 * (5 - distance) if distance else 0)
    on_demand, one_ahead = 5 * read_s, read_s + 4 * max(0.0, read_s - 1.0)
    if distance < 2:
        assert found.wait / 6 == pytest.approx(one_ahead if distance else on_demand)
    else:  # the second block waits too, behind what is read for the third
        assert one_ahead <= found.wait / 6 < on_demand
    assert distance != 1 or found == played(rows, "perfect", 2, config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budgets": [0.01]}, "less than one expert of 1048576; all 16 take"),
        ({"forecasts": [{"method": "serve.lru"}]}, "serve.lru is no forecast"),
        ({"policies": [{"method": "serve.next_gate"}]}, "serve.next_gate is no serving policy"),
        ({"forecasts": [{"method": "serve.next_gate"}]}, "record peeks and name their file with --peeks"),
        ({"learn": 0.999}, "leaves none of 48 steps"),
        ({"decided": 2}, "decided=2 in a trace of 2 mixtures decides none ahead"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: str, recorded: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        METER.module.measure(MeterInputs(trace=RoutingTrace.open(recorded / "run.trace")), METER.configure(settings))


def test_the_command_prints_draws_and_speaks_json(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figure = tmp_path / "out.json", tmp_path / "out.svg"
    arguments = ["simulate", "prefetch", str(recorded / "run.trace"), str(out), "--peeks", str(recorded / "peeks.npz")]
    arguments += ["--forecasts", '[{"method": "serve.next_gate"}]', "--budgets", "[0.3, 0.5]"]
    assert main([*arguments, "--figure", str(figure)]) == 0
    told = capsys.readouterr().out
    assert "hidden_share_perfect_at_8" in told
    assert "next_gate" in told
    assert "<svg" in figure.read_text()
    assert main([*arguments, "--json", "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())


def test_learners_are_shown_the_past(recorded: Path) -> None:
    past, rest = rows_of(RoutingTrace.open(recorded / "run.trace")).split(0.5)
    assert isinstance(past, Rows)
    _, hot = METER.module.acting("none", MethodUse(method="none"), MethodUse(method="serve.static_hot"), past, rest)
    cold = policy("static_hot")
    assert vars(hot) != vars(cold)


def test_what_is_needed_now_is_not_evicted_for_a_wish() -> None:
    one = machine(slots=3)
    one.begin()
    one.layer(0, [0, 1, 2])
    one.layer(0, [0, 1, 2], [Wish(1, (4, 5))])
    found = one.finish()
    assert (found.hits, found.misses, found.bytes) == (3, 3, 3)


def made_up(**columns: list[int]) -> Any:
    """A trace of two layers with four experts, by its columns."""
    count = len(columns["expert"])
    given = {name: np.array(columns.get(name, [0] * count)) for name in
             ("sequence", "position", "token_id", "layer", "rank", "expert", "kept", "forward")}  # fmt: skip
    layers = [SimpleNamespace(layer=layer, num_experts=4, num_null=0, top_k=None) for layer in range(2)]
    return SimpleNamespace(header=SimpleNamespace(layers=layers), scan=lambda names: [given])


def test_sequences_begin_together_wherever_they_stand_and_dropped_assignments_are_left_out() -> None:
    """Two texts, the second seen from position 7 on; one assignment was dropped, one went to a null expert."""
    trace = made_up(
        sequence=[0, 0, 0, 1, 1], position=[0, 0, 1, 7, 8], token_id=[5, 5, 6, 7, 8], layer=[0, 1, 0, 0, 0],
        expert=[1, 2, 3, 0, 4], kept=[1, 1, 0, 1, 1],
    )  # fmt: skip
    rows = rows_of(trace, "decode", 2)
    assert rows.recorded.positions.tolist() == [0, 7, 1, 8]
    assert rows.starts.tolist() == [0, 2, 4]
    assert rows.needs() == [[(0, 0), (0, 1)], [(1, 2)], [], []]


def test_all_experts_are_the_budget_of_one_and_bytes_begin_above() -> None:
    rows, config = never_twice(2, 3), METER.configure({"expert_bytes": 10})
    found = [METER.module.budget_bytes(budget, rows, config) for budget in (0.5, 1.0, 10.0, 25.0)]
    assert found == [30, 60, 10, 25]


def test_what_sequences_chose_last_is_repeated_for_each_and_forgotten_with_them() -> None:
    repeat = Repeat()
    repeat.meet((0, 4, 4))

    def step(sequences: list[int], *layers: list[list[int]]) -> list[list[Wish]]:
        row = np.array(sequences, np.int32)
        told = [repeat.begin(row, row, row)]
        return told + [repeat.routed(layer, np.array(ids, np.int32), None) for layer, ids in enumerate(layers, 1)]

    assert step([0, 1], [[3, 1], [1, -1]], [[0, 2], [2, 3]]) == [[], [], []]
    again = step([1, 0], [[2, 0], [2, 0]], [[1, 0], [1, 0]])
    assert again == [[Wish(1, (1, 3))], [Wish(2, (2, 3, 0))], []]
    repeat.forget(0)
    assert step([0, 2], [[0, 1], [0, 1]]) == [[], []]


def test_forecasts_hear_of_the_ends_of_sequences() -> None:
    rows = rows_of(made_up(sequence=[0, 1, 1, 2], position=[0, 0, 1, 0], expert=[0, 1, 2, 3], kept=[1] * 4))
    nothing, gone = Nothing(), []
    nothing.forget = lambda sequence: gone.append(sequence)
    METER.module.play(nothing, policy("lru"), rows, 4, METER.configure({"expert_bytes": 1}))
    assert gone == [0, 1]
