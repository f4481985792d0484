"""ExpertFlow: patterns, slots by demand, who leaves, who runs together; through the store and the scheduler."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moestro.core.errors import ConfigError, SaveError
from moestro.core.expert_cache import ExpertCache, run_step
from moestro.core.forecast import Wish
from moestro.core.inputs import MeterInputs
from moestro.core.registry import method
from moestro.core.trace import trace
from moestro.engine.acting import as_use, cache_and_forecast
from moestro.engine.requests import Limits
from moestro.engine.scheduler import Scheduler
from moestro.methods.serve._parts import route_rivals as rivals
from moestro.methods.serve._parts.route_file import LayerShape, save
from moestro.methods.serve._parts.route_predictor import load
from moestro.models.load import load as load_model
from moestro.testing.tiny import VOCAB, tiny_folder
from tests.engine.running import Answer, run
from tests.engine.stub import StubForward
from tests.methods.serve.policies import residents
from tests.methods.serve.routes import LAYERS, header, random_predictor


FLOW = method("serve.expertflow")
MODULE: Any = FLOW.module
EXPERTS = (0, 8, 0, 6)


def flow(**config: Any) -> Any:
    """With a random predictor for layers 1 and 3."""
    made = MODULE.ExpertFlow(FLOW.configure(config))
    made.predictor = random_predictor()
    made.meet(EXPERTS)
    return made


def begin(made: Any, tokens: list[int], position: int = 0) -> list[Wish]:
    count = len(tokens)
    rows = np.array(tokens, np.int32), np.full(count, position, np.int32), np.arange(count, dtype=np.int32)
    found: list[Wish] = made.begin(*rows)
    return found


def ids(*experts: int) -> Any:
    return np.array([experts], np.int32)


# -- the mathematics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("demand", "slots", "shares"),
    [
        ([3, 2], 4, [3, 1]),  # the paper's example
        ([3, 2], 5, [3, 2]),
        ([3, 2], 9, [3, 2]),
        ([2, 2, 2], 3, [1, 1, 1]),
        ([2, 2, 2], 4, [2, 1, 1]),
        ([4, 0, 1], 2, [2, 0, 0]),
        ([5, 5], 0, [0, 0]),
        ([], 3, []),
        ([0, 0], 3, [0, 0]),
    ],
)
def test_slots_go_by_demand_and_earlier_layers_come_first(demand: list[int], slots: int, shares: list[int]) -> None:
    assert MODULE.shared_slots(demand, slots) == shares


def test_shares_add_up_and_none_exceeds_its_demand() -> None:
    draw = np.random.default_rng(0)
    for _ in range(300):
        demand, slots = draw.integers(0, 9, size=draw.integers(1, 7)).tolist(), int(draw.integers(0, 40))
        shares = MODULE.shared_slots(demand, slots)
        assert sum(shares) == min(slots, sum(demand))
        assert all(0 <= share <= wanted for share, wanted in zip(shares, demand, strict=True))
        # Nobody gets more than the proportional share rounded up.
        exact = [slots * wanted / max(1, sum(demand)) for wanted in demand]
        assert shares[0] <= np.ceil(exact[0])


def test_a_pattern_is_the_union_of_each_rows_best_by_the_chance_that_any_needs_it() -> None:
    logits = np.array([[3.0, 1.0, 0.0, -1.0, 5.0, 0.0], [-4.0, 2.0, 1.9, 0.0, -5.0, 1.0]], np.float32)
    layers = (LayerShape(layer=0, experts=4, top_k=1), LayerShape(layer=1, experts=2, top_k=1))
    first, second = MODULE.pattern(logits, layers, 1.0)
    chance = 1 - np.prod(1 - 1 / (1 + np.exp(-logits.astype(float))), axis=0)
    assert chance[1] > chance[0], "one row's best may be less likely than what two rows may need"
    assert first.tolist() == [1, 0]
    assert second.tolist() == [0, 1]
    more, _ = MODULE.pattern(logits, layers, 1.5)  # ceil(1.5) = 2 a row
    assert more.tolist() == sorted([0, 1, 2], key=lambda expert: -chance[expert])
    everyone, _ = MODULE.pattern(logits, layers, 9.0)
    assert everyone.tolist() == np.argsort(-chance[:4]).tolist()


@pytest.mark.parametrize(("factor", "count"), [(1.0, 25), (1.12, 28), (1.13, 29), (0.01, 1), (9.0, 40)])
def test_so_many_experts_are_expected_of_a_token(factor: float, count: int) -> None:
    logits = np.random.default_rng(3).normal(size=(1, 40)).astype(np.float32)
    layers = (LayerShape(layer=0, experts=40, top_k=25),)
    (found,) = MODULE.pattern(logits, layers, factor)  # 1.12 * 25 is a little above 28
    assert found.tolist() == np.argsort(-logits[0])[:count].tolist()
    marks = rivals.top(logits, layers, factor)
    assert sorted(found.tolist()) == np.flatnonzero(marks[0]).tolist()


def test_layers_of_one_size_are_told_apart() -> None:
    logits = np.random.default_rng(2).normal(size=(3, 21)).astype(np.float32)
    sizes, starts = (5, 5, 5, 6), (0, 5, 10, 15)
    layers = tuple(LayerShape(layer=place, experts=size, top_k=2) for place, size in enumerate(sizes))
    together = MODULE.pattern(logits, layers, 1.0)
    for found, layer, start in zip(together, layers, starts, strict=True):
        (alone,) = MODULE.pattern(logits[:, start : start + layer.experts], (layer,), 1.0)
        assert found.tolist() == alone.tolist()


# -- what is wished for -----------------------------------------------------------------------------------------------


def test_without_limits_the_whole_pattern_is_wished_for_in_order_of_layers() -> None:
    made = flow()
    wishes = begin(made, [3, 7, 11])
    logits = random_predictor().step(np.array([3, 7, 11]), np.zeros(3, int), np.arange(3))
    wanted = [found.tolist() for found in MODULE.pattern(logits, LAYERS, 1.0)]
    assert wishes == [Wish(1, tuple(wanted[0]), 1), Wish(3, tuple(wanted[1]), 2)]
    assert made.routed(1, ids(0, 1), None) == []  # the rest is asked for already


def test_when_a_layer_has_run_its_share_goes_to_the_next() -> None:
    made = flow(slots=3)
    first, second = begin(made, [3, 7, 11])
    pattern = dict(made._pattern)
    demand = [len(pattern[1]), len(pattern[3])]
    shares = MODULE.shared_slots(demand, 3)
    assert shares[1] < demand[1] > 1, "the case would show nothing"
    assert (first.experts, second.experts) == (tuple(pattern[1][: shares[0]]), tuple(pattern[3][: shares[1]]))
    assert made.routed(1, ids(0, 5), None) == []  # two are in use, one slot is left, as before
    begin(made, [3, 7, 11])
    (later,) = made.routed(1, ids(0), None)
    assert later == Wish(3, tuple(pattern[3][:2]), 1)
    assert made.routed(3, ids(0), None) == []


def test_the_number_of_slots_is_learned_from_the_first_that_must_leave() -> None:
    made = flow()
    cache = ExpertCache(made, 4)
    for step in ([(1, 0), (1, 1)], [(3, 0), (3, 1)]):
        run_step(cache, step, 1)
    assert made.full is None
    run_step(cache, [(1, 2)], 1)
    assert made.full == 4
    assert sum(len(wish.experts) for wish in begin(made, [3, 7, 11])) <= 4


def test_it_is_the_most_that_were_in_the_cache_at_once() -> None:
    made = flow()
    cache = ExpertCache(made, 4)
    for expert in range(4):
        run_step(cache, [(1, expert)], 1)
    run_step(cache, [(3, 0)], 2)  # two have to leave for one that is twice as large
    assert (len(cache.resident), made.full) == (3, 4)
    run_step(cache, [(3, 1)], 2)
    assert made.full == 4


def test_places_without_an_expert_take_no_room() -> None:
    made = flow(slots=3)
    begin(made, [3, 7, 11])
    (later,) = made.routed(1, ids(0, -1), None)
    assert len(later.experts) == 2


def test_a_sequence_that_ends_is_forgotten_by_the_predictor() -> None:
    made, fresh = flow(), flow()
    begin(made, [3, 7])
    made.forget(0)
    assert made.predictor.sequences == (1,)
    later = [other.begin(np.array([9]), np.array([1]), np.array([0])) for other in (made, fresh)]
    assert later[0] == later[1], "another sequence of this id, whose beginning came from shared pages"
    MODULE.ExpertFlow(FLOW.configure({})).forget(0)  # nobody has taught it


def test_a_predictor_of_another_model_is_refused() -> None:
    made = flow()
    with pytest.raises(ConfigError, match="knows 8 experts in layer 1, the model has 9"):
        made.meet((0, 9, 0, 6))
    with pytest.raises(ConfigError, match="knows 0 experts in layer 2, the model has 4"):
        made.meet((0, 8, 4, 6))
    with pytest.raises(ConfigError, match="knows 6 experts in layer 3, the model has 0"):
        made.meet((0, 8))


def test_nobody_has_taught_it() -> None:
    made = MODULE.forecast(FLOW.configure({}))
    made.meet(EXPERTS)
    with pytest.raises(ConfigError, match="moestro learn"):
        begin(made, [1])
    with pytest.raises(ConfigError, match="moestro learn"):
        made.ready(EXPERTS, (0, 2, 0, 1))
    with pytest.raises(ConfigError, match="moestro learn"):
        MODULE.order(FLOW.configure({}))
    flow().ready(EXPERTS, (0, 2, 0, 1))
    with pytest.raises(ConfigError, match="knows 2 choices of a token in layer 1, the model makes 3"):
        flow().ready(EXPERTS, (0, 3, 0, 1))


# -- who leaves -------------------------------------------------------------------------------------------------------


def test_without_a_forecast_it_is_lru() -> None:
    steps = ["a", "b", "c", "a", "d", "b", "a"]
    assert residents("serve.expertflow", 2, steps) == residents("serve.lru", 2, steps)


def test_who_is_foreseen_goes_last_and_the_latest_layer_first() -> None:
    made = flow(slots=3)
    begin(made, [3, 7, 11])
    pattern = {layer: list(experts) for layer, experts in made._pattern.items()}
    stranger = (1, next(e for e in range(8) if e not in pattern[1]))
    older = (3, next(e for e in range(6) if e not in pattern[3]))
    candidates = [(layer, expert) for layer, experts in pattern.items() for expert in experts] + [stranger, older]
    for time, key in enumerate([older, stranger, *candidates[:-2]]):
        made.on_access(key, time)
        made.on_insert(key, time)
    gone = []
    while candidates:
        gone.append(made.victim(candidates))
        candidates.remove(gone[-1])
    shares = {layer: share for layer, (_, share) in made._shares.items()}
    assert gone[:2] == [older, stranger], "who is in no pattern goes first, the least recently used before others"
    beyond = [(layer, expert) for layer in (3, 1) for expert in reversed(pattern[layer][shares[layer] :])]
    within = [(layer, expert) for layer in (3, 1) for expert in reversed(pattern[layer][: shares[layer]])]
    assert beyond
    assert gone[2:] == beyond + within


def test_what_an_earlier_step_foresaw_protects_nobody() -> None:
    made = flow(slots=14)
    likeliest = {}
    for token in range(12):
        begin(made, [token])
        likeliest[token] = made._pattern[1][0]
    begin(made, [0, 1])
    now = made._pattern[1]
    token, gone = next((token, expert) for token, expert in likeliest.items() if expert not in now)
    begin(made, [token])
    begin(made, [0, 1])
    for time, key in enumerate([(1, now[-1]), (1, gone)]):
        made.on_access(key, time)
        made.on_insert(key, time)
    assert made.victim([(1, now[-1]), (1, gone)]) == (1, gone)


def test_who_was_read_ahead_in_vain_is_as_old_as_its_reading() -> None:
    made = flow(slots=6)
    for time, key in enumerate([(1, 0), (1, 1), (1, 2)]):
        if key != (1, 1):  # read ahead, and not needed
            made.on_access(key, time)
        made.on_insert(key, time)
    left = [(1, 2), (1, 1), (1, 0)]
    assert [left.pop(left.index(made.victim(left))) for _ in range(3)] == [(1, 0), (1, 1), (1, 2)]


def test_a_layer_that_has_run_protects_nobody() -> None:
    made = flow(slots=6)
    begin(made, [3, 7, 11])
    mine, next_up = (1, made._pattern[1][0]), (3, made._pattern[3][0])
    for time, key in enumerate([next_up, mine]):
        made.on_access(key, time)
        made.on_insert(key, time)
    made.routed(1, ids(mine[1]), None)
    assert made.victim([mine, next_up]) == mine


# -- who runs together ------------------------------------------------------------------------------------------------


def asked(number: int, tokens: list[int]) -> Any:
    return SimpleNamespace(tokens=tokens, lanes=[SimpleNamespace(table=SimpleNamespace(id=number))])


def test_the_order_puts_those_together_that_touch_the_same() -> None:
    made = flow(width=2)
    requests = [asked(number, [5, token]) for number, token in enumerate([3, 9, 3, 9, 4])]
    ordered = made.order(requests)
    assert [request.tokens[-1] for request in ordered] == [3, 3, 9, 9, 4]
    assert ordered[0] is requests[0]
    assert made.order(requests[:1]) == requests[:1]
    assert MODULE.ExpertFlow(FLOW.configure({})).order(requests) == requests


def test_the_order_reads_what_it_has_not_seen_of_a_text_and_leaves_the_forecast_alone() -> None:
    text = [int(token) for token in np.random.default_rng(1).integers(29, size=20)]
    made, other = flow(), flow()
    path = made._path(asked(7, text))
    whole = random_predictor().step(np.array(text), np.arange(20), np.zeros(20, int))
    tail = random_predictor().step(np.array(text[-6:]), np.arange(14, 20), np.zeros(6, int))
    wanted = np.zeros(14, dtype=bool)
    for found, at in zip(MODULE.pattern(tail[-1:], LAYERS, 1.0), (0, 8), strict=True):
        wanted[at + found] = True
    np.testing.assert_array_equal(path, wanted)
    other.begin(np.array(text[:-1]), np.arange(19), np.full(19, 7))
    other._path(asked(7, text))  # a look at the next token, before its step
    (row,) = other.predictor.step(np.array(text[-1:]), np.array([19]), np.array([7]))
    np.testing.assert_allclose(row, whole[-1], rtol=1e-3, atol=1e-3)


def test_texts_are_the_same_with_and_without_scheduling() -> None:
    prompts = [[(7 * number + at) % 29 for at in range(3 + number % 5)] for number in range(12)]

    def texts(**options: Any) -> tuple[list[list[int]], list[list[int]]]:
        forward = StubForward(pages=200)
        scheduler = Scheduler(forward, Limits(running=12, **options.pop("limits", {})), **options)
        answers = [Answer(prompt, 9, seed=n, temperature=n % 2) for n, prompt in enumerate(prompts)]
        return run(scheduler, *answers), [list(batch.sequences) for batch in forward.steps]

    plain, _ = texts()
    limits = {"width": 3, "max_wait": 1e9}
    first_come, steps = texts(limits=limits)
    ordered, other_steps = texts(limits=limits, order=flow(width=3).order)
    assert steps != other_steps, "the order changed nothing, so the test shows nothing"
    assert ordered == first_come == plain


# -- learning and serving ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("expertflow")
    tiny_folder("qwen3_moe", folder / "model", head_dim=16)
    model = load_model(folder / "model")
    tokens = torch.randint(3, VOCAB, (12, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), trace(model, folder / "run.trace", model="tiny", tokenizer_hash="abc") as found:
        model(input_ids=tokens)
    return SimpleNamespace(folder=folder, trace=found, model=model)


def test_what_is_learned_is_written_with_where_it_comes_from(recorded: Any, tmp_path: Path) -> None:
    config = FLOW.configure({"dim": 16, "heads": 2, "inner": 16, "epochs": 30, "held": 0.2})
    scores = MODULE.learn(MeterInputs(trace=recorded.trace), config, tmp_path / "out")
    made = load(tmp_path / "out").header
    assert made.scores == scores
    assert scores.keys() >= {"predictor_recall", "token_table_precision", "frequency_recall", "previous_token_recall"}
    infos = recorded.trace.header.layers
    assert [(s.layer, s.experts, s.top_k) for s in made.layers] == [(i.layer, i.num_experts, i.top_k) for i in infos]
    assert (made.model, made.tokenizer_hash, made.settings["steps"]) == ("tiny", "abc", 30)
    assert len(made.trace) == 64
    with pytest.raises(SaveError, match="exists"):
        MODULE.learn(MeterInputs(trace=recorded.trace), config, tmp_path / "out")
    forecast = MODULE.forecast(FLOW.configure({"predictor": str(tmp_path / "out")}))
    known = {info.layer: info.num_experts for info in infos}
    forecast.meet([known.get(layer, 0) for layer in range(max(known) + 1)])
    assert forecast.policy is forecast


def test_one_object_forecasts_and_decides_who_leaves() -> None:
    leaves, foresees = cache_and_forecast(as_use("serve.expertflow"), as_use("serve.expertflow"))
    assert leaves is foresees
    leaves, foresees = cache_and_forecast(as_use("serve.lru"), as_use("serve.expertflow"))
    assert leaves is not foresees


def test_serving_needs_no_pytorch(tmp_path: Path) -> None:
    predictor = random_predictor()
    save(tmp_path / "one", header(), predictor.weights)
    code = f"""
import sys, json, numpy as np
from moestro.core.registry import method
use = method("serve.expertflow")
made = use.entry("forecast")(use.configure({{"predictor": {str(tmp_path / "one")!r}}}))
made.meet((0, 8, 0, 6))
wishes = made.begin(np.array([1]), np.array([0]), np.array([0]))
print(json.dumps([len(wishes), "torch" in sys.modules, "transformers" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [2, False, False]
