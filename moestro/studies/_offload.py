"""Recorded decoding through the simulated machine of `simulate.prefetch`, and a real run through the engine.

Times are in units in which reading the experts that a layer needs at a step, on average, takes 1 / ``speed``; a layer
takes 1 to compute, half of it beside its experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from moestro.core.expert_cache import Key, Oracle
from moestro.core.forecast import Forecast
from moestro.engine.describe import describe
from moestro.engine.native_forward import NativeForward
from moestro.engine.pack import pack_model
from moestro.engine.packed import Packed
from moestro.engine.requests import Limits, Request
from moestro.engine.sampler import Sampling
from moestro.engine.scheduler import Order, Scheduler
from moestro.engine.slabs import load_all
from moestro.engine.store import ExpertStore
from moestro.engine.text import TextStream
from moestro.methods.serve._parts.route_file import Floats, LayerShape
from moestro.methods.serve._parts.route_paths import Paths
from moestro.methods.serve._parts.route_rivals import columns
from moestro.methods.simulate._parts.machine import Counts, Machine
from moestro.models.save import save


Ints = npt.NDArray[Any]
Needs = list[tuple[int, Ints, list[int]]]
"""Of each layer: its number, the ids [R, k] of the rows (-1: none), and the experts they need together."""


@dataclass(frozen=True)
class Step:
    """One token of each of some sequences: rows of the paths, which sequence and position each is, what they need."""

    rows: Ints
    sequences: Ints
    positions: Ints
    needs: Needs


def decoding(paths: Paths, batch: int, tokens: int, groups: int) -> list[Step]:
    """The first ``tokens`` positions of sequences, ``batch`` of them side by side, ``groups`` times with others."""
    found = []
    for first in range(0, min(groups * batch, len(paths) - batch + 1), batch):
        group = np.arange(first, first + batch)
        for at in range(min(tokens, int(np.diff(paths.start)[group].min()))):
            rows = paths.start[group] + at
            found.append(Step(rows, group, np.full(batch, at), needs_of(paths, rows)))
    return found


def needs_of(paths: Paths, rows: Ints) -> Needs:
    """What rows that run together need."""
    found = []
    for shape, part in columns(paths.layers):
        used = paths.used[rows, part]
        rank = np.argsort(~used, axis=1, kind="stable")[:, : shape.top_k]
        ids = np.where(np.take_along_axis(used, rank, 1), rank, -1).astype(np.int32)
        found.append((shape.layer, ids, np.flatnonzero(used.any(0)).tolist()))
    return found


class Told:
    """Stands in for a predictor: logits [T, C] that were computed before."""

    def __init__(self, paths: Paths, logits: Floats) -> None:
        self.header = SimpleNamespace(layers=paths.layers, model="")
        self.start, self.logits = paths.start, logits

    def step(self, tokens: Ints, positions: Ints, sequences: Ints) -> Floats:
        """See RoutePredictor."""
        return self.logits[self.start[sequences] + positions]

    def forget(self, sequence: int) -> None:
        """Nothing was kept."""


@dataclass(frozen=True)
class Gates:
    """What gates said of the input of the mixture before them: of (rows, layer) float [R, E] from [T, C]."""

    said: Floats
    place: Mapping[int, slice]

    def __call__(self, rows: Any, layer: int) -> Floats:
        """See replay."""
        return self.said[rows, self.place[layer]]


def columns_of(paths: Paths) -> dict[int, slice]:
    """Layer -> its place in C."""
    return {shape.layer: part for shape, part in columns(paths.layers)}


def experts_of(layers: Sequence[LayerShape]) -> tuple[int, ...]:
    """Experts of each layer from 0 on, 0 where there are none."""
    have = {shape.layer: shape.experts for shape in layers}
    return tuple(have.get(layer, 0) for layer in range(max(have) + 1))


def keys_of(steps: Sequence[Step]) -> list[list[Key]]:
    """What each layer of each step needs."""
    return [[(layer, expert) for expert in experts] for step in steps for layer, _, experts in step.needs]


def mean_need(steps: Sequence[Step]) -> float:
    """Experts that a layer needs at a step, on average."""
    return float(np.mean([len(keys) for keys in keys_of(steps)]))


def replay(
    paths: Paths,
    steps: Sequence[Step],
    policy: Any,
    forecast: Forecast | None,
    slots: int,
    speed: float = 1.0,
    peek: Callable[[Ints, int], Floats] | None = None,
) -> Counts:
    """Play steps through a cache of ``slots`` equal experts of one byte each.

    Args:
        peek: (rows, later) -> what the gate of that layer says of the input of the mixture before it, [R, E].
    """
    need = mean_need(steps)
    machine = Machine(policy, slots, 1, 1 / (need * speed), 0.5 / need)
    if isinstance(policy, Oracle):
        policy.foresee(keys_of(steps))
    if forecast is not None:
        forecast.meet(experts_of(paths.layers))
    for step in steps:
        machine.begin()
        if forecast is not None:
            told = (paths.tokens[step.rows], step.positions, step.sequences)
            tokens, positions, sequences = (part.astype(np.int32) for part in told)
            machine.ahead(forecast.begin(tokens, positions, sequences))
        for layer, ids, experts in step.needs:
            machine.compute(0.5)

            def look(later: int, rows: Ints = step.rows) -> Floats:
                assert peek is not None
                return peek(rows, later)

            machine.layer(layer, experts, () if forecast is None else forecast.routed(layer, ids, look))
    return machine.finish()


def written(model: Any, both: Any, prompts: Sequence[list[int]], count: int, folder: Path) -> list[list[list[int]]]:
    """What the engine writes after prompts: first with all experts resident, then with a quarter of them.

    Args:
        both: policy, forecast and order of the second run, whose steps hold half of the texts. count: tokens of a text.
    """
    save(model, folder / "model")
    pack_model(folder / "model", folder / "packed", bits=8)
    packed = Packed.open(folder / "packed")
    description, (kept, slabs) = describe(packed, packed.resident()), load_all(packed)
    pages = len(prompts) * (-(-(len(prompts[0]) + count) // 16) + 1)
    many = Limits(running=len(prompts))
    found = [_texts(NativeForward(description, pages=pages, slabs=slabs, threads=1), many, prompts, count)]
    stride = max(there.stride for there in packed.experts.values())
    slots = max(2, sum(there.num for there in packed.experts.values()) // 4)
    half = Limits(running=len(prompts), width=max(1, len(prompts) // 2), max_wait=1e9)
    with ExpertStore(packed, slots * stride, both) as store:
        few = NativeForward(description, pages=pages, store=store, forecast=both, threads=1)
        found.append(_texts(few, half, prompts, count, both.order))
    for slot in kept:
        slot.free()
    return found


def _texts(
    forward: NativeForward, limits: Limits, prompts: Sequence[list[int]], count: int, order: Order | None = None
) -> list[list[int]]:
    requests = [
        Request(prompt, count, Sampling(temperature=0.0), TextStream(lambda ids: "", ()), lambda piece: None)
        for prompt in prompts
    ]
    scheduler = Scheduler(forward, limits, order=order)
    scheduler.submit(*requests)
    while scheduler.step():
        pass
    return [request.tokens[len(request.prompt) :] for request in requests]
