"""A serving plan acts alike in the engine and in the simulator, and is checked before anything is loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moestro.core.errors import ConfigError
from moestro.core.inputs import MeterInputs
from moestro.core.plan import MethodUse, ServingPlan
from moestro.core.registry import method
from moestro.core.trace import RoutingTrace, trace
from moestro.engine import room
from moestro.engine.acting import as_use, batcher_of, check_plan, check_use, decoder_of, forecast_for, order_of
from moestro.engine.open import open_forward
from moestro.engine.open_native import Native
from moestro.engine.packed import EXPERTS, Packed
from moestro.engine.requests import Limits
from moestro.engine.scheduler import Scheduler
from moestro.methods.serve._parts.route_file import Header, LayerShape
from moestro.methods.serve._parts.route_file import save as save_predictor
from moestro.testing.tiny import VOCAB
from tests.engine.read_me_models import cut, saved
from tests.engine.running import Answer, run


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process holds PyTorch; a serving one does not, and tiny models need no working space."""
    monkeypatch.setattr(room, "resident_set", lambda: 0)
    monkeypatch.setattr(room, "working_bytes", lambda model: 0)


IDS = torch.randint(3, VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model, and beside it the trace of three texts."""
    folder, model = tmp_path_factory.mktemp("plan"), cut()
    with torch.no_grad(), trace(model, folder / "run.trace"):
        model(input_ids=IDS)
    return saved(model, folder)


def planned(packed: Path, slots: int, **uses: Any) -> ServingPlan:
    """A plan that keeps some experts of the model in memory, for three texts of 48 positions."""
    opened = Packed.open(packed)
    model, experts = opened.model, opened.files[EXPERTS][0]
    stride = next(iter(opened.experts.values())).stride
    kept = 144 * 2 * 4 * (len(model.layers) * model.kv_heads * model.head_dim + 16)
    resident = sum(piece.nbytes for piece in opened.tensors.values())
    return ServingPlan(
        method="test",
        model_hash=model.hash,
        budget_bytes=kept + resident + slots * stride,
        tiers={"memory.experts": slots * stride, "disk.experts": experts - slots * stride},
        context=144,
        **{name: as_use(use) for name, use in uses.items()},
    )


USES = [
    as_use("serve.lru"),
    MethodUse(method="serve.lfu", config={"half_life": 20.0}),
    MethodUse(method="serve.read_me_belady", config={"lookahead": 0}),
    MethodUse(method="serve.read_me_belady", config={"lookahead": 12}),
]


@pytest.mark.parametrize("slots", [2, 4])
@pytest.mark.parametrize("use", USES)
def test_engine_and_simulator_miss_alike_by_one_plan(
    use: MethodUse, slots: int, recorded: Path, tmp_path: Path
) -> None:
    path = planned(recorded, slots, policy=use).save(tmp_path / "plan.json")
    plan = ServingPlan.load(path)
    opened = Native(recorded, plan.budget_bytes, context=plan.context, policy=plan.policy or "")
    # Prompts token by token, one after another, are what the simulator plays; the queue is all that comes.
    scheduler = Scheduler(opened.forward, Limits(running=1, chunk=1, mixed=1), share=False)
    run(scheduler, *[Answer(ids.tolist(), 1) for ids in IDS])
    counted = opened.counters()
    opened.close()
    meter = method("simulate.cache")
    inputs = MeterInputs(name="t", trace=RoutingTrace.open(recorded.parent / "run.trace"))
    report = meter.module.measure(inputs, meter.configure({"plan": str(path), "learn": 0.0}))
    table = report.tables["policies"]
    mine, bound = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert mine["experts held"] == bound["experts held"] == slots
    assert (counted["hits"], counted["misses"]) == (mine["hits"], mine["misses"])
    assert bound["misses"] <= mine["misses"] > 6


@pytest.mark.parametrize(
    ("uses", "told"),
    [
        ({"policy": "serve.scmoe"}, "policy serve.scmoe is none of .*serve.lru"),
        ({"policy": "serve.read_me_batching"}, "policy serve.read_me_batching is none of"),
        ({"forecast": "serve.lru"}, "forecast serve.lru is none of .*serve.read_me_belady"),
        ({"order": "serve.scmoe"}, "order serve.scmoe is none of serve.read_me_batching"),
        ({"decoder": "train.moe"}, "decoder train.moe is none of serve.dynamic_pruning, serve.scmoe"),
        ({"policy": MethodUse(method="serve.lfu", config={"half": 1})}, "half"),
        (
            {
                "policy": MethodUse(method="serve.read_me_belady", config={"lookahead": 2}),
                "forecast": "serve.read_me_belady",
            },
            "one object with one set of settings",
        ),
        ({"order": "serve.expertflow"}, "order serve.expertflow is none of serve.read_me_batching"),
        ({"order": "serve.expertflow", "forecast": "serve.next_gate"}, "order serve.expertflow is none of"),
        ({"order": "serve.next_gate", "forecast": "serve.next_gate"}, "order serve.next_gate is none of"),
        (
            {"order": "serve.none", "forecast": "serve.none"},
            "order serve.none is none of|forecast serve.none is none of",
        ),
        (
            {"forecast": MethodUse(method="serve.expertflow", config={"width": 3}), "order": "serve.expertflow"},
            "order with .* and forecast with .*one object with one set of settings",
        ),
    ],
)
def test_methods_that_cannot_act_so_are_refused(uses: dict[str, Any], told: str) -> None:
    plan = ServingPlan(method="test", budget_bytes=1, tiers={}, **{name: as_use(use) for name, use in uses.items()})
    with pytest.raises(ConfigError, match=told):
        check_plan(plan)


def test_a_whole_plan_is_served(recorded: Path) -> None:
    both = MethodUse(method="serve.read_me_belady", config={"lookahead": 3})
    plan = planned(recorded, 3, policy=both, forecast=both, order="serve.read_me_batching", decoder="serve.scmoe")
    check_plan(plan)
    opened = Native(recorded, plan.budget_bytes, context=plan.context, policy=both, forecast=both)
    forward: Any = opened.forward
    assert forward.forecast.policy is forward.store.cache.policy
    assert forward.foresight.passes == 3
    scheduler = Scheduler(forward, Limits(running=4, chunk=16), batcher=batcher_of(plan))
    asked = [IDS[at, :20].tolist() for at in range(2)]
    texts = run(scheduler, *[Answer(ids, 4, decoder=decoder_of(plan)) for ids in asked])
    assert opened.counters()["misses"] > 0
    opened.close()
    whole = Native(recorded, 1 << 30, context=plan.context)
    for ids, text in zip(asked, texts, strict=True):
        assert run(Scheduler(whole.forward), Answer(ids, 4, decoder=decoder_of(plan))) == [text]
    whole.close()


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One of random weights for the model."""
    shapes = tuple(LayerShape(layer=layer, experts=3, top_k=1) for layer in (0, 1))
    head = Header(layers=shapes, vocabulary=VOCAB, dim=8, heads=2, inner=8, depth=1, window=8, trace="none")
    draw = np.random.default_rng(0)
    weights = {name: draw.normal(size=shape).astype(np.float32) for name, shape in head.shapes().items()}
    return str(save_predictor(tmp_path_factory.mktemp("predictor") / "one", head, weights))


def test_what_forecasts_may_say_who_is_written_first(recorded: Path, predictor: str) -> None:
    use = MethodUse(method="serve.expertflow", config={"predictor": predictor, "width": 2})
    plan = planned(recorded, 3, policy=use, forecast=use, order=use)
    check_plan(plan)
    opened = Native(recorded, plan.budget_bytes, context=plan.context, policy=use, forecast=use)
    order, width = order_of(plan, opened.forward)
    assert (width, batcher_of(plan)) == (2, None)
    assert order.__self__ is opened.forward.forecast is opened.store.cache.policy  # type: ignore[union-attr]
    split: list[tuple[list[Any], list[Any]]] = []

    def watched(requests: list[Any]) -> list[Any]:
        split.append((requests, order(requests)))
        return split[-1][1]

    asked = [IDS[at % 3, at : at + 12].tolist() for at in range(5)]
    scheduler = Scheduler(opened.forward, Limits(running=5, width=width, max_wait=1e9), order=watched)
    texts = run(scheduler, *[Answer(ids, 6) for ids in asked])
    assert any(before != after for before, after in split), "the order changed nothing"
    opened.close()
    whole = Native(recorded, 1 << 30, context=plan.context, policy=use, forecast=use)
    assert order_of(plan, whole.forward) == (None, None)  # all experts are in memory: nobody forecasts
    for ids, text in zip(asked, texts, strict=True):
        assert run(Scheduler(whole.forward), Answer(ids, 6)) == [text]
    whole.close()
    for other in (planned(recorded, 3, forecast=use), planned(recorded, 3, order="serve.read_me_batching")):
        assert order_of(other, opened.forward) == (None, None)


def test_a_plan_for_another_model_is_refused(recorded: Path) -> None:
    with pytest.raises(ConfigError, match="made for another model"):
        open_forward(str(recorded), 1 << 30, model_hash="0" * 64)


def test_a_request_that_names_no_decoder_gets_the_plan_s() -> None:
    from moestro.core.decoding import PLAIN
    from moestro.engine.service import Engine
    from tests.engine.stub import StubForward

    opened = SimpleNamespace(forward=StubForward(), cache=dict, close=lambda: None, context=64)
    plan = ServingPlan(method="test", budget_bytes=1, tiers={}, decoder=as_use("serve.scmoe"))
    engine = Engine(opened, decoder=decoder_of(plan))  # type: ignore[arg-type]
    assert engine.decoder.name == "serve.scmoe"
    engine.close()
    assert decoder_of(plan.model_copy(update={"decoder": None})) is PLAIN
    assert np.array_equal(PLAIN.combine(np.ones((1, 3), np.float32)), np.ones(3, np.float32))


def test_what_reads_ahead_follows_from_the_routers(recorded: Path) -> None:
    def model(*routers: Any, token_router: Any = None) -> Any:
        return SimpleNamespace(layers=[SimpleNamespace(router=router) for router in routers], token_router=token_router)

    now, ahead = SimpleNamespace(ahead=0), SimpleNamespace(ahead=1)
    assert forecast_for(model(None, now, now), None) == MethodUse(method="serve.next_gate")
    assert forecast_for(model(now, ahead, ahead), None) == MethodUse(method="serve.pre_gated")
    assert forecast_for(Packed.open(recorded).model, None) is None, "routers of token ids tell the policy"
    assert forecast_for(model(None, None), None) is None, "no expert to read"
    asked = MethodUse(method="serve.next_gate", config={"ahead": 2})
    assert forecast_for(model(ahead), asked) == asked
    assert forecast_for(model(now), MethodUse(method="none")) is None


def test_nothing_can_stand_for_a_forecast_and_for_nothing_else() -> None:
    check_use("forecast", MethodUse(method="none"))
    with pytest.raises(ConfigError, match=r"policy none is none of serve\.belady"):
        check_use("policy", MethodUse(method="none"))
    with pytest.raises(ConfigError, match=r"forecast serve\.lru is none of .*serve\.next_gate.*, none$"):
        check_use("forecast", MethodUse(method="serve.lru"))
