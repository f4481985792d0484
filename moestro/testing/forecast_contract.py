"""Checks of the entry `forecast`: each plays steps of several sequences, with made-up gates or through a tiny model."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from moestro.core.forecast import Floats, Ints, Recorded, Student, Wish
from moestro.core.registry import Method
from moestro.core.registry import method as method_by_id
from moestro.engine.describe import describe
from moestro.engine.native_forward import NativeForward
from moestro.engine.pack import pack_model
from moestro.engine.packed import Packed
from moestro.engine.slabs import load_all
from moestro.engine.store import ExpertStore
from moestro.testing.contracts import example_config
from moestro.testing.contracts import settings_round_trip as settings_round_trip
from moestro.testing.tiny import VOCAB, tiny_folder


EXPERTS = (0, 8, 8, 0, 6)
"""Experts of each layer of the model that is made up: dense layers, and layers of different sizes."""
TOP_K = 2
Batch = Sequence[tuple[int, int, int]]
"""(token, position, sequence) of each row."""


def _draw(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([7, *seed]))


def scores(batch: Batch, layer: int, later: int, experts: Sequence[int] = EXPERTS) -> Floats:
    """What the gate of ``later`` says of a layer's input: alike for a token whatever the layer, but not the same."""
    rows = [
        _draw(token, later).normal(size=experts[later]) * 2 + _draw(token, position, layer, later).normal()
        for token, position, _ in batch
    ]
    return np.asarray(rows, dtype=np.float32)


def routes(batch: Batch, layer: int, experts: Sequence[int] = EXPERTS) -> Ints:
    """The two best experts of each row."""
    found: Ints = np.argsort(-scores(batch, layer, layer, experts), axis=1)[:, :TOP_K].astype(np.int32)
    return found


def batches(seed: int = 0) -> list[Batch]:
    """A prompt, then three sequences side by side."""
    draw = _draw(seed)
    tokens = draw.integers(3, VOCAB, size=(3, 12)).tolist()
    found: list[Batch] = [[(token, at, 0) for at, token in enumerate(tokens[0][:6])]]
    found += [[(tokens[one][at], at, one) for one in range(3)] for at in range(6, 12)]
    return found


def past(experts: Sequence[int] = EXPERTS) -> Recorded:
    """Sequences to learn from."""
    flat = [row for seed in range(5, 8) for batch in batches(seed) for row in batch]
    tokens, positions, sequences = np.asarray(flat, dtype=np.int32).T
    mixtures = [layer for layer, count in enumerate(experts) if count]
    return Recorded(
        tokens, positions, sequences, {layer: routes(flat, layer, experts) for layer in mixtures}, tuple(experts)
    )


def fresh(method: Method, experts: Sequence[int] = EXPERTS) -> Any:
    """A forecast by the example settings, which has met the model, learned what it asks to learn, and is ready."""
    made = method.entry("forecast")(example_config(method))
    made.meet(experts)
    if isinstance(made, Student):
        made.study(past(experts))
    made.ready(experts, [TOP_K if count else 0 for count in experts])
    return made


def play(forecast: Any, steps: Sequence[Batch]) -> list[tuple[int, list[Wish]]]:
    """(layer, -1 for the beginning; wishes) of every call, in a model whose every input settles the next routing."""
    told = []
    for batch in steps:
        tokens, positions, sequences = np.asarray(batch, dtype=np.int32).T
        told.append((-1, list(forecast.begin(tokens, positions, sequences))))
        for layer, count in enumerate(EXPERTS):
            if not count:
                continue

            def peek(later: int, batch: Batch = batch, layer: int = layer) -> Floats:
                assert later > layer, f"layer {layer} peeks at layer {later}, which is not behind it"
                assert later < len(EXPERTS), f"peeks at layer {later} of {len(EXPERTS)}"
                assert EXPERTS[later], f"peeks at layer {later}, which has no experts"
                return scores(batch, layer, later)

            later = next((other for other in range(layer + 1, len(EXPERTS)) if EXPERTS[other]), None)
            if later is not None:
                told.append((layer, list(forecast.settled(later, routes(batch, later)))))
            told.append((layer, list(forecast.routed(layer, routes(batch, layer), peek))))
    return told


def wishes_can_be_read(method: Method) -> None:
    """See the contract."""
    told = play(fresh(method), batches())
    assert any(wishes for _, wishes in told), "it wishes for nothing"
    for layer, wishes in told:
        seen = set()
        for wish in wishes:
            assert layer < wish.layer < len(EXPERTS), f"layer {layer} wishes for layer {wish.layer} of {len(EXPERTS)}"
            assert wish.priority >= 1, f"priority {wish.priority}; those below 1 are for what is needed now"
            for expert in wish.experts:
                assert type(expert) is int, f"expert {expert!r} is a {type(expert).__name__}"
                assert 0 <= expert < EXPERTS[wish.layer], f"layer {wish.layer} has no expert {expert}"
                assert (wish.layer, expert) not in seen, f"expert {expert} of layer {wish.layer} comes twice"
                seen.add((wish.layer, expert))


def wishes_are_repeatable(method: Method) -> None:
    """See the contract."""
    assert play(fresh(method), batches()) == play(fresh(method), batches()), "two runs wish for other experts"


def ends_are_forgotten(method: Method) -> None:
    """See the contract."""
    forecast = fresh(method)
    first = play(forecast, batches())
    for sequence in range(3):
        forecast.forget(sequence)
    assert play(forecast, batches()) == first, "a sequence that is over shows in the wishes of another"


def outputs_are_the_model(method: Method) -> None:
    """See the contract."""
    lru = method_by_id("serve.lru")
    with tempfile.TemporaryDirectory() as folder:
        tiny_folder("mixtral", Path(folder) / "model", head_dim=16, num_hidden_layers=3)
        pack_model(Path(folder) / "model", Path(folder) / "packed", bits=8)
        packed = Packed.open(Path(folder) / "packed")
        description = describe(packed, packed.resident())
        kept, slabs = load_all(packed)
        whole = NativeForward(description, pages=4, slabs=slabs, threads=1)
        stride = max(there.stride for there in packed.experts.values())
        for slots in (2, 5):
            forecast = fresh(method, whole.experts)
            with ExpertStore(packed, slots * stride, lru.module.policy(lru.configure({}))) as store:
                few = NativeForward(description, pages=4, store=store, forecast=forecast, threads=1)
                for batch in batches():
                    same = np.array_equal(whole.step(_rows(batch)), few.step(_rows(batch)))
                    assert same, f"other logits than without the forecast, in {slots} slots"
        for slot in kept:
            slot.free()


def _rows(batch: Batch) -> Any:
    tokens, positions, sequences = np.asarray(batch, dtype=np.int32).T
    return SimpleNamespace(
        tokens=tokens,
        positions=positions,
        rows_of=sequences,
        sequences=[0, 1, 2],
        tables=np.arange(3, dtype=np.int32)[:, None],
        want=np.arange(len(batch), dtype=np.int32),
        routes=None,
    )


def it_is_named(method: Method) -> None:
    """See the contract."""
    assert fresh(method).name == method.id, f"{method.id} calls itself {fresh(method).name}"
