"""Knowing what waits: batches by expert, the future as it is told to the cache's policy, the same texts in any case."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.core.batching import Pending
from moestro.core.errors import ConfigError
from moestro.core.expert_cache import ExpertCache, run_step
from moestro.core.registry import method
from moestro.engine import room
from moestro.engine.open_native import Native
from moestro.engine.packed import Packed
from moestro.engine.requests import Limits
from moestro.engine.scheduler import Scheduler
from moestro.engine.token_router import best
from moestro.testing.tiny import VOCAB, tiny_folder
from tests.engine.read_me_models import cut, saved
from tests.engine.running import Answer, check_empty, run
from tests.engine.stub import StubForward


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process holds PyTorch; a serving one does not, and tiny models need no working space."""
    monkeypatch.setattr(room, "resident_set", lambda: 0)
    monkeypatch.setattr(room, "working_bytes", lambda model: 0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(cut(), tmp_path_factory.mktemp("ahead"), 8)


CONTEXT = 16 * 24


def few(packed: Path, slots: int = 3, **options: Any) -> Native:
    """The model with room for some of its six experts."""
    opened = Packed.open(packed)
    largest = max(there.stride for there in opened.experts.values())
    model = opened.model
    kept = CONTEXT * 2 * 4 * (len(model.layers) * model.kv_heads * model.head_dim + 16)
    resident = sum(piece.nbytes for piece in opened.tensors.values())
    return Native(packed, kept + resident + slots * largest, context=CONTEXT, **options)


def answers(count: int = 7) -> list[Answer]:
    draw = np.random.Generator(np.random.PCG64(3))
    return [
        Answer(draw.integers(3, VOCAB, int(draw.integers(1, 40))).tolist(), 6, seed=number, temperature=number % 2)
        for number in range(count)
    ]


def batcher(**config: Any) -> Any:
    found = method("serve.read_me_batching")
    return found.entry("policy")(found.configure(config))


@pytest.fixture(scope="module")
def alone_texts(packed: Path) -> list[list[int]]:
    native = Native(packed, 1 << 31, context=CONTEXT)
    texts = [run(Scheduler(native.forward, share=False), answer)[0] for answer in answers()]
    native.close()
    return texts


@pytest.mark.parametrize("max_wait", [None, 0.0, 0.2])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_batches_by_expert_change_no_text(
    chunk: int, max_wait: float | None, packed: Path, alone_texts: list[list[int]]
) -> None:
    native = few(packed, policy="serve.read_me_belady", forecast="serve.read_me_belady")
    clock = iter(np.arange(0, 1e5, 0.05).tolist())
    scheduler = Scheduler(
        native.forward, Limits(running=5, chunk=chunk), batcher=batcher(max_wait=max_wait), clock=lambda: next(clock)
    )
    assert run(scheduler, *answers()) == alone_texts
    assert native.counters()["misses"] > 0
    native.close()


def test_rows_of_a_step_share_experts(packed: Path) -> None:
    unique: dict[bool, list[int]] = {}
    for by_expert in (False, True):
        native = Native(packed, 1 << 31, context=CONTEXT)
        seen = unique.setdefault(by_expert, [])
        native.forward.on_gate = lambda ids, seen=seen: seen.append(len(np.unique(ids)))
        scheduler = Scheduler(
            native.forward, Limits(running=16, chunk=6, mixed=6), batcher=batcher() if by_expert else None
        )
        run(scheduler, *answers(16))
        native.close()
    assert np.mean(unique[True]) < 0.8 * np.mean(unique[False])


def test_experts_of_what_waits_are_those_that_run(packed: Path) -> None:
    native = Native(packed, 1 << 31, context=CONTEXT)
    scheduler = Scheduler(native.forward, Limits(running=4, chunk=9), batcher=batcher())
    asked = answers(4)
    scheduler.submit(*(answer.request for answer in asked))
    while scheduler.step():
        for answer in asked:
            request = answer.request
            if request.ahead is not None:
                known = request.tokens[: len(request.ahead)]
                assert request.ahead.tolist() == best(native.forward.gate.route(np.array(known, np.int32))).tolist()
    check_empty(scheduler)
    native.close()


def test_the_policy_is_told_the_pass_and_the_queue(packed: Path) -> None:
    native = few(packed, policy="serve.read_me_belady")
    assert native.store is not None
    told: list[tuple[int, list[Any]]] = []
    policy = native.store.cache.policy
    foresee = policy.foresee
    policy.foresee = lambda steps, start: (told.append((start, [list(keys) for keys in steps])), foresee(steps, start))
    steps: list[list[Any]] = []
    native.forward.on_route = lambda layer, ids, weights: steps.append([(layer, e) for e in np.unique(ids).tolist()])
    scheduler = Scheduler(native.forward, Limits(running=3, chunk=8, mixed=8), share=False)
    asked = [Answer(list(range(3 + at, 43 + at)), 1) for at in range(0, 9, 3)]  # prompts alone: nothing to generate
    run(scheduler, *asked)
    for start, future in told:
        assert future[:2] == steps[start : start + 2]  # the pass that begins, exactly
    assert [start for start, _ in told] == list(range(0, len(steps), 2))
    experts = [best(native.forward.gate.route(np.arange(3 + at, 43 + at, dtype=np.int32))) for at in range(0, 9, 3)]
    needed = [(layer, e) for layer in (0, 1) for part in experts for e in part.tolist()]
    assert {key for keys in told[0][1] for key in keys} == set(needed)
    native.close()


def test_known_prompts_are_read_as_by_belady_in_the_simulator(packed: Path) -> None:
    native = few(packed, slots=3, policy="serve.read_me_belady")
    assert native.store is not None
    steps: list[list[Any]] = []
    native.forward.on_route = lambda layer, ids, weights: steps.append([(layer, e) for e in np.unique(ids).tolist()])
    scheduler = Scheduler(native.forward, Limits(running=1, chunk=1, mixed=1), share=False)
    run(scheduler, *[Answer(list(range(3 + at, 43 + at)), 1) for at in range(0, 9, 3)])
    stride = next(iter(native.store.packed.experts.values())).stride
    assert all(there.stride == stride for there in native.store.packed.experts.values())
    misses = {}
    for name, config in (("belady", {}), ("read_me_belady", {"lookahead": 16}), ("lru", {})):
        found = method(f"serve.{name}")
        made = found.entry("policy")(found.configure(config))
        if name != "lru":
            made.foresee(steps)
        cache = ExpertCache(made, native.store.cache.budget)
        misses[name] = sum(run_step(cache, keys, stride) for keys in steps)
    assert native.counters()["misses"] == misses["read_me_belady"]
    assert misses["belady"] <= misses["read_me_belady"] < misses["lru"]
    native.close()


def test_a_shared_beginning_is_routed_as_it_was(packed: Path) -> None:
    native = Native(packed, 1 << 31, context=CONTEXT)
    prompt = np.random.Generator(np.random.PCG64(5)).integers(3, VOCAB, 32).tolist()  # ends with a page: it is copied
    plain = Answer(prompt, 12)
    run(Scheduler(native.forward, share=False), plain)
    wanted = best(native.forward.gate.route(np.array(plain.request.tokens[:-1], np.int32))).tolist()
    scheduler = Scheduler(native.forward, Limits(running=1))
    for _ in range(3):
        seen: list[int] = []
        native.forward.on_gate = lambda ids, seen=seen: seen.extend(ids.tolist())
        again = Answer(prompt, 12)
        run(scheduler, again)
        assert again.tokens == plain.tokens
        assert seen == wanted[-len(seen) :]
    assert len(seen) == 12
    native.close()


def test_nothing_is_read_in_vain(packed: Path) -> None:
    native = few(packed, slots=5, policy="serve.read_me_belady", forecast="serve.read_me_belady")
    assert native.store is not None
    run(Scheduler(native.forward, Limits(running=2, chunk=2, mixed=2)), *answers())
    needed = {key for key in native.store.cache.resident if not native.store._entries[key].used}
    assert native.counters()["wasted"] == 0
    assert needed == set()
    native.close()


def test_models_that_do_not_tell_are_refused(tmp_path: Path, packed: Path) -> None:
    from moestro.engine.pack import pack_model

    with pytest.raises(ConfigError, match=r"serve.read_me_batching needs a model whose router reads token ids only"):
        Scheduler(StubForward(), batcher=batcher())
    tiny_folder("qwen3_moe", tmp_path / "model", head_dim=16)
    pack_model(tmp_path / "model", tmp_path / "packed", bits=8)
    for policy in ("serve.belady", "serve.read_me_belady"):
        with pytest.raises(ConfigError, match=f"{policy} must be told the future, which only routers of token ids"):
            few(tmp_path / "packed", policy=policy)
    native = few(packed, policy="serve.belady")
    run(Scheduler(native.forward), *answers(3))
    native.close()


def test_pending_without_experts_runs_in_order() -> None:
    waiting = [Pending(5, False), Pending(1, True), Pending(9, False), Pending(1, True)]
    assert batcher().take(waiting, 6) == [4, 1, 0, 1]


class Spy:
    """A batcher that runs one sequence after another, and keeps what it was shown."""

    name, needs_experts = "serve.spy", False

    def __init__(self) -> None:
        self.shown: list[tuple[list[Pending], list[int]]] = []

    def take(self, pending: list[Pending], rows: int) -> list[int]:
        turn = len(self.shown) % len(pending)
        taken = [min(item.count, rows) if at == turn else 0 for at, item in enumerate(pending)]
        self.shown.append((pending, taken))
        return taken


def test_a_batcher_is_shown_who_waits_and_for_how_long() -> None:
    spy, now = Spy(), [0.0]
    scheduler = Scheduler(StubForward(), Limits(chunk=10), batcher=spy, clock=lambda: now[0])
    asked = [Answer(list(range(25)), 3), Answer([7] * 4, 3)]
    scheduler.submit(*(answer.request for answer in asked))
    while scheduler.step():
        now[0] += 1.0
    check_empty(scheduler)
    counts = [[item.count for item in pending] for pending, _ in spy.shown]
    assert counts == [[25, 4], [15, 4], [15, 1], [5, 1], [5, 1], [1, 1], [1], [1]]
    waited = [[item.waited for item in pending] for pending, _ in spy.shown]
    assert waited == [[0, 0], [1, 1], [2, 1], [1, 2], [2, 1], [1, 2], [2], [1]]
    writing = [[item.writing for item in pending] for pending, _ in spy.shown]
    assert writing[:3] == [[False, False], [False, False], [False, True]]
    assert all(item.experts is None for pending, _ in spy.shown for item in pending)
    alone = [run(Scheduler(StubForward(), share=False), Answer(a.request.prompt, 3))[0] for a in asked]
    assert [answer.tokens for answer in asked] == alone
