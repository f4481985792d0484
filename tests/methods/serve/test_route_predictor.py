"""The predictor of routes: the same numbers in any cut, as in PyTorch; what it learns; what it refuses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moestro.core.errors import ConfigError, LoadError, SaveError, TraceError
from moestro.core.forecast import Recorded
from moestro.core.registry import method
from moestro.core.trace import RoutingTrace, trace
from moestro.core.trace_writer import TraceWriter
from moestro.methods.serve._parts import route_paths
from moestro.methods.serve._parts import route_rivals as rivals
from moestro.methods.serve._parts import route_training as training
from moestro.methods.serve._parts.route_file import HEADER, WEIGHTS, LayerShape, save
from moestro.methods.serve._parts.route_predictor import load
from moestro.models.load import load as load_model
from moestro.testing.tiny import VOCAB, tiny_folder
from tests.core.test_trace import context, hand_routings
from tests.methods.serve.routes import LAYERS, header, planted, random_predictor


def whole(predictor, ids: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    weights = {name: torch.from_numpy(array) for name, array in predictor.weights.items()}
    found: np.ndarray = training.logits_of(weights, predictor.header, torch.from_numpy(ids)[None])[0].numpy()
    return found


@pytest.mark.parametrize("cut", [1, 2, 5, 7, 40])
@pytest.mark.parametrize("window", [1, 6, 64])
def test_any_cut_gives_what_pytorch_gives(cut: int, window: int) -> None:
    predictor = random_predictor(window=window)
    ids = np.random.default_rng(1).integers(29, size=40)
    parts = [
        predictor.step(ids[at : at + cut], np.arange(at, min(at + cut, 40)), np.full(len(ids[at : at + cut]), 9))
        for at in range(0, 40, cut)
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole(predictor, ids), rtol=1e-3, atol=1e-3)


def test_sequences_side_by_side_do_not_see_each_other() -> None:
    predictor, draw = random_predictor(), np.random.default_rng(2)
    ids = [draw.integers(29, size=length) for length in (20, 13, 17)]
    got: list[list[np.ndarray]] = [[], [], []]
    at, cuts = [0, 0, 0], [(3, 1, 1), (1, 1, 4), (6, 0, 1), (1, 1, 1), (9, 10, 10)]
    for cut in cuts:
        rows = [(ids[s][p], p, 40 + s) for s in (2, 0, 1) for p in range(at[s], min(at[s] + cut[s], len(ids[s])))]
        tokens, positions, sequences = np.array(rows).T
        logits = predictor.step(tokens, positions, sequences)
        for s in range(3):
            got[s] += list(logits[sequences == 40 + s])
            at[s] = min(at[s] + cut[s], len(ids[s]))
    for s in range(3):
        np.testing.assert_allclose(got[s], whole(predictor, ids[s]), rtol=1e-3, atol=1e-3)


def test_a_step_that_is_repeated_and_one_that_goes_back() -> None:
    predictor, fresh = random_predictor(), random_predictor()
    ids, zeros = np.random.default_rng(3).integers(29, size=20), np.zeros(20, np.int64)
    predictor.step(ids[:12], np.arange(12), zeros[:12])
    first = predictor.step(ids[12:13], np.array([12]), zeros[:1])
    np.testing.assert_array_equal(predictor.step(ids[12:13], np.array([12]), zeros[:1]), first)
    predictor.step(ids, np.arange(20), zeros)
    back = predictor.step(ids[:3], np.arange(3), zeros[:3])  # what came later is not seen
    np.testing.assert_allclose(back, fresh.step(ids[:3], np.arange(3), zeros[:3]), rtol=1e-4, atol=1e-5)
    assert predictor.last(0) == 2


def test_what_is_forgotten_leaves_no_trace_and_its_place_is_used_again() -> None:
    predictor = random_predictor()
    ids, zeros = np.random.default_rng(4).integers(29, size=12), np.zeros(12, np.int64)
    first = predictor.step(ids, np.arange(12), zeros)
    for sequence in range(100):
        predictor.step(ids[::-1], np.arange(12), zeros + sequence)
        predictor.forget(sequence)
    predictor.forget(12345)
    assert predictor.sequences == ()
    assert len(predictor._windows.position) == 8
    np.testing.assert_array_equal(predictor.step(ids, np.arange(12), zeros), first)


def test_those_not_heard_of_for_longest_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.methods.serve._parts.route_predictor.MOST_SEQUENCES", 3)
    predictor, one = random_predictor(), np.ones(1, np.int64)
    for sequence in (1, 2, 3, 1, 4):
        predictor.step(one, one, one * sequence)
    assert predictor.sequences == (3, 1, 4)


def test_an_unknown_token_is_the_last_one() -> None:
    one = np.ones(1, np.int64)
    np.testing.assert_array_equal(
        random_predictor().step(one * 10**6, one, one), random_predictor().step(one * 29, one, one)
    )


def test_it_learns_what_no_table_of_tokens_knows() -> None:
    taught, asked = planted(1, sequences=120), planted(2)
    state = torch.random.get_rng_state()
    settings = {"steps": 90, "batch": 8, "lr": 1e-2, "head_lr": 1e-2, "seed": 0}
    weights = training.fit(header(dim=32, inner=64), taught, **settings)  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), state)
    again = training.fit(header(dim=32, inner=64), taught, **settings)  # type: ignore[arg-type]
    assert all(np.array_equal(weights[name], again[name]) for name in weights)
    predictor = training.RoutePredictor(header(dim=32, inner=64), weights)
    found = {
        "predictor": rivals.by_predictor(predictor, asked, chunk=7),
        "token": rivals.by_token(taught, asked, 30),
        "frequency": rivals.by_frequency(taught, asked),
        "previous": rivals.by_previous(taught, asked),
    }
    recall = {name: rivals.recall(rivals.top(ranked, LAYERS), asked.used) for name, ranked in found.items()}
    assert recall["predictor"] > 0.95
    assert 0.7 < recall["token"] < 0.8, "two of three are known from the token"
    assert max(recall["frequency"], recall["previous"]) < 0.5
    # Tokens that were never met all stand in one place.
    embedding = weights["embedding"]
    assert np.array_equal(embedding[12:], np.broadcast_to(embedding[12], embedding[12:].shape))
    np.testing.assert_allclose(embedding[12], embedding[:12].mean(0), rtol=1e-4, atol=1e-6)


def fitted(lr: float, head_lr: float, steps: int = 2) -> dict[str, np.ndarray]:
    return training.fit(header(), planted(1, sequences=8), steps=steps, batch=4, lr=lr, head_lr=head_lr, seed=0)


def test_the_last_map_and_the_body_learn_at_rates_of_their_own() -> None:
    start = fitted(0, 0)
    for rates, learned in (((0, 1e-2), {"head", "bias"}), ((1e-2, 0), header().shapes().keys() - {"head", "bias"})):
        found = fitted(*rates)
        assert {name for name in found if not np.array_equal(found[name], start[name])} == learned


def test_rates_are_warmed_up_and_let_down_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[float, float]]] = []

    class Watched(torch.optim.AdamW):
        def step(self, *given: Any) -> Any:
            seen.append([(group["lr"], group["weight_decay"]) for group in self.param_groups])
            return super().step(*given)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    fitted(1e-3, 2e-3, steps=40)
    share = [0.5, *(min(1, (40 - step) / 38) for step in range(1, 40))]  # a twentieth of the steps is warm-up
    assert share[1:3] == [1, 1]
    np.testing.assert_allclose([[rate for rate, _ in step] for step in seen], np.outer(share, [1e-3, 2e-3]))
    assert {tuple(decay for _, decay in step) for step in seen} == {(1e-4, 0.01)}


def test_every_token_is_learned_once_before_any_is_twice() -> None:
    """Sequences longer than a row of 256 are cut; nothing of them is left out."""
    lengths = [600, 256, 257, 3]
    start = np.cumsum([0, *lengths])
    tokens = np.arange(start[-1])
    paths = route_paths.Paths(LAYERS, tokens, np.zeros((len(tokens), 14), dtype=bool), start, ("",) * 4)
    rows = training._rows(paths, 7, 3)  # of 3 + 1 + 2 + 1 pieces
    orders = []
    for _ in range(2):
        ids, _, valid = next(rows)
        assert sorted(ids[valid].tolist()) == tokens.tolist()
        for row, live in zip(ids, valid, strict=True):
            piece = row[live]
            assert (piece.diff() == 1).all(), "a piece is one stretch of a sequence"
        orders.append(ids[:, 0].tolist())
    assert orders[0] != orders[1]


def test_what_is_held_back_teaches_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each sequence has tokens and experts of its own: whoever was not shown one names none of its experts."""
    sequence = np.repeat(np.arange(4), 30)
    used = np.zeros((120, 14), dtype=bool)
    for expert in (2 * sequence, 2 * sequence + 1, 8 + sequence):
        used[np.arange(120), expert] = True
    paths = route_paths.Paths(LAYERS, sequence * 3 + np.arange(120) % 3, used, np.arange(5) * 30, ("",) * 4)
    monkeypatch.setattr(training, "paths_of", lambda trace: paths)
    monkeypatch.setattr(training, "trace_hash", lambda trace: "t")
    told = SimpleNamespace(model="", model_hash=None, tokenizer_hash=None)
    subject: Any = SimpleNamespace(trace=SimpleNamespace(header=told), seed=0)
    config = method("serve.expertflow").configure({"dim": 16, "heads": 2, "inner": 16, "epochs": 60, "held": 0.25})
    scores = training.learned(subject, config, tmp_path / "out")
    for name in ("predictor", "token_table", "frequency"):
        assert scores[f"{name}_recall"] == scores[f"{name}_precision"] == 0, name
    assert scores["previous_token_recall"] > 0.9  # it may look at what was held back
    shown = rivals.by_predictor(load(tmp_path / "out"), paths)
    assert rivals.recall(rivals.top(shown, LAYERS), used) > 0.7, "three of four sequences were learned"


def test_the_loss_is_cross_entropy_over_experts_of_rows_that_have_one() -> None:
    predictor, paths = random_predictor(), planted(3, sequences=2, length=5)
    paths.used[3, :8] = False  # nobody took this token in layer 1
    weights = {name: torch.from_numpy(array) for name, array in predictor.weights.items()}
    ids = torch.from_numpy(paths.tokens).view(2, 5)
    used = torch.from_numpy(paths.used).view(2, 5, -1)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found = training._loss(weights, predictor.header, ids, used, valid).item()
    logits = training.logits_of(weights, predictor.header, ids).double().numpy()
    rows = []
    for b in range(2):
        for s in range(5):
            for layer, part in ((0, slice(0, 8)), (1, slice(8, 14))):
                if valid[b, s] and not (b == 0 and s == 3 and layer == 0):
                    p = 1 / (1 + np.exp(-logits[b, s, part]))
                    y = used[b, s, part].numpy()
                    rows.append(-(np.log(p[y]).sum() + np.log(1 - p[~y]).sum()))
    assert len(rows) == 13
    assert found == pytest.approx(np.mean(rows), rel=1e-4)


def test_a_predictor_survives_the_disk_and_damage_is_noticed(tmp_path: Path) -> None:
    predictor = random_predictor()
    save(tmp_path / "one", predictor.header, predictor.weights)
    back = load(tmp_path / "one")
    ids = np.arange(10)
    np.testing.assert_array_equal(back.step(ids, ids, ids * 0), predictor.step(ids, ids, ids * 0))
    with pytest.raises(SaveError, match="exists"):
        save(tmp_path / "one", predictor.header, predictor.weights)
    with pytest.raises(LoadError, match="moestro learn"):
        load(tmp_path / "two")
    told = json.loads((tmp_path / "one" / HEADER).read_text())
    for change in ({"window": 0}, {"dim": 15}, {"version": 2}, {"layers": []}, {"surprise": 1}):
        (tmp_path / "one" / HEADER).write_text(json.dumps({**told, **change}))
        with pytest.raises(LoadError):
            load(tmp_path / "one")
    (tmp_path / "one" / HEADER).write_text(json.dumps({**told, "inner": 25}))
    with pytest.raises(LoadError, match=r"blocks\.0\.down is \(16, 24\), not \(16, 25\)"):
        load(tmp_path / "one")
    (tmp_path / "one" / HEADER).write_text(json.dumps(told))
    raw = bytearray((tmp_path / "one" / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (tmp_path / "one" / WEIGHTS).write_bytes(raw)
    with pytest.raises(LoadError, match="sha256"):
        load(tmp_path / "one")


@pytest.mark.parametrize(("dim", "heads"), [(16, 3), (6, 2), (15, 1)])
def test_heads_of_odd_width_are_refused(dim: int, heads: int) -> None:
    with pytest.raises(ConfigError):
        header(dim=dim, heads=heads)


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="top_k=3 of 2"):
        LayerShape(layer=0, experts=2, top_k=3)


def test_paths_of_a_trace_are_what_was_routed(tmp_path: Path) -> None:
    tiny_folder("qwen3_moe", tmp_path / "model")
    model = load_model(tmp_path / "model")
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 9), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad(), trace(model) as recorded, trace(model, tmp_path / "t.trace") as stored:
        model(input_ids=ids, attention_mask=mask)
    paths = route_paths.paths_of(recorded)
    assert np.diff(paths.start).tolist() == [9, 5, 9]
    assert paths.tokens.tolist() == [*ids[0].tolist(), *ids[1, 4:].tolist(), *ids[2].tolist()]
    for shape, part in rivals.columns(paths.layers):
        assert (paths.used[:, part].sum(1) == shape.top_k).all()
        np.testing.assert_array_equal(paths.used[:, part].sum(0), recorded.load(shape.layer).numpy())
    assert route_paths.trace_hash(recorded) == route_paths.trace_hash(stored)
    taken = paths.take([2, 0])
    assert taken.tokens.tolist() == [*ids[2].tolist(), *ids[0].tolist()]
    np.testing.assert_array_equal(taken.used, np.concatenate([paths.used[14:], paths.used[:9]]))
    with torch.no_grad(), trace(model) as blind:
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(TraceError, match="token ids"):
        route_paths.paths_of(blind)


def test_what_capacity_dropped_and_null_experts_use_nothing(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.trace") as writer:
        where = context([[7, 8, 9, 0]], [[1, 1, 1, 0]])
        for site, routing in zip(("layers.1", "layers.4"), hand_routings(), strict=True):
            writer.record(site, routing, where)
    paths = route_paths.paths_of(RoutingTrace.open(tmp_path / "t.trace"))
    assert paths.tokens.tolist() == [7, 8, 9]
    first, second = (paths.used[:, part] for _, part in rivals.columns(paths.layers))
    assert [np.flatnonzero(row).tolist() for row in first] == [[0, 1], [1, 2], [0]]  # the third took a null
    assert [np.flatnonzero(row).tolist() for row in second] == [[2], [], [2]]  # the first's other was dropped


def test_a_recorded_past_gives_the_same_paths() -> None:
    rows = [(0, 1), (1, 0), (0, 0), (1, 1), (0, 2)]  # (sequence, position), as steps mix them
    tokens = [5, 6, 7, 8, 9]
    routes = np.array([[0, 1], [2, -1], [3, 4], [5, 6], [7, 0]], np.int32)
    sequence, position = np.array(rows, np.int32).T
    past = Recorded(np.array(tokens, np.int32), position, sequence, {1: routes}, (0, 8))
    paths = route_paths.paths_of_past(past)
    assert paths.tokens.tolist() == [7, 5, 9, 6, 8]
    assert paths.start.tolist() == [0, 3, 5]
    assert [np.flatnonzero(row).tolist() for row in paths.used] == [[3, 4], [0, 1], [0, 7], [2], [5, 6]]
    assert paths.layers == (LayerShape(layer=1, experts=8, top_k=2),)


def test_shares_held_back_are_sequences_of_their_own() -> None:
    paths = planted(4, sequences=10)
    rest, held = route_paths.split_heldout(paths, 0.25, 0)
    assert (len(rest), len(held)) == (8, 2)
    with pytest.raises(ConfigError, match="two or more"):
        route_paths.split_heldout(paths.take([0]), 0.5, 0)


def test_the_rivals_on_a_case_by_hand() -> None:
    paths = planted(5, sequences=1, length=6)
    taught = route_paths.Paths(LAYERS, np.array([1, 1, 2]), paths.used[:3].copy(), np.array([0, 3]), ("",))
    taught.used[:] = False
    taught.used[[0, 1, 2], [0, 0, 3]] = True
    asked = route_paths.Paths(LAYERS, np.array([2, 1, 9]), taught.used[[2, 0, 0]], np.array([0, 2, 3]), ("", ""))
    rate = np.array([2 / 3, 0, 0, 1 / 3])
    table = rivals.by_token(taught, asked, 12)[:, :4]
    np.testing.assert_allclose(table, [(np.eye(4)[3] + rate) / 2, (2 * np.eye(4)[0] + rate) / 3, rate], rtol=1e-5)
    before = rivals.by_previous(taught, asked)
    np.testing.assert_allclose(before[:, :4], [rate, np.eye(4)[3] + rate, rate], rtol=1e-5)
    best = rivals.top(before, LAYERS)
    assert best.sum(1).tolist() == [3, 3, 3]
    assert rivals.recall(best, asked.used) == 1.0  # two of layer 1 are named, all that is used is among them
    assert rivals.precision(best, asked.used) == pytest.approx(3 / 9)
    assert rivals.top(before, LAYERS, 1.5).sum(1).tolist() == [5, 5, 5]
    joined = rivals.merged(asked.used, np.array([0, 0, 1]))
    assert [np.flatnonzero(row).tolist() for row in joined] == [[0, 3], [0]]
