"""One arm of a benchmark in a process of its own: `python -m moestro.testing.bench._arm KIND OPTIONS`.

Orders come as lines of JSON, answers go back the same way. The engine's arm imports neither torch nor Transformers:
they would take the memory that the benchmark is about.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moestro.core.forecast import Forecast, Peek, Wish
from moestro.core.memory import peak_bytes


Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class Arm(Protocol):
    """A model that is fed. ``about``: facts for the report."""

    about: dict[str, Any]

    def feed(self, tokens: Ints, start: int, at: int) -> Floats:
        """Logits of the last of these tokens, at positions from ``start``; they stand at ``at`` in the stream."""

    def counters(self) -> dict[str, float]:
        """Whatever the arm counts."""


class Engine:
    """A packed folder on the native forward.

    Options: folder; memory, bytes of the whole process, None for all resident; context; threads; policy; forecast, a
    method; stream, a file with int32 ``tokens`` [T] and, where the routing is to be replayed, ``ids`` [T, layers, k]
    and float32 ``weights``, and with it what gates said, float32 ``peek.L.M`` [T, E].
    """

    def __init__(self, options: dict[str, Any]) -> None:
        from moestro.engine.open_native import Native
        from moestro.engine.sequences import Batch

        self.batch, self.at = Batch, 0
        memory = options["memory"] or 1 << 50
        with np.load(options["stream"], allow_pickle=False) as stream:  # before the model, which gets what is left
            arrays = dict(stream)
        self.ids, self.weights = arrays.get("ids"), arrays.get("weights")
        self.replayed = self.ids is not None
        peeks = {name: scores for name, scores in arrays.items() if name.startswith("peek.")}
        acting = {role: options[role] for role in ("policy", "forecast") if options.get(role)}
        self.native = Native(
            Path(options["folder"]), memory, context=options["context"], threads=options["threads"], **acting
        )
        self.forward = self.native.forward
        if self.forward.forecast is not None and self.replayed:
            self.forward.forecast = Told(self.forward.forecast, peeks, self)
        self.forward.overrides.append(self.recorded)
        self.table = np.arange(self.forward.pages, dtype=np.int32)[None]
        self.about = {"isa": self.forward.kernels.features()["isa"], "budget": self.native.budget}
        if self.native.store is not None:
            self.about["slots"] = self.native.budget // max(x.stride for x in self.native.store.packed.experts.values())

    def recorded(self, layer: int, scores: Floats, ids: Ints, weights: Floats) -> tuple[Ints, Floats]:
        """The routing of the stream."""
        rows = slice(self.at, self.at + len(ids))
        assert self.ids is not None
        assert self.weights is not None
        return np.ascontiguousarray(self.ids[rows, layer]), np.ascontiguousarray(self.weights[rows, layer])

    def feed(self, tokens: Ints, start: int, at: int) -> Floats:
        """See ``Arm``."""
        n, self.at = len(tokens), at
        batch = self.batch(
            tokens=tokens,
            positions=np.arange(start, start + n, dtype=np.int32),
            rows_of=np.zeros(n, np.int32),
            sequences=[0],
            tables=self.table,
            want=np.array([n - 1], np.int32),
            routes=np.ones(n, np.int32) if self.replayed else None,
        )
        return self.forward.step(batch)[0]

    def counters(self) -> dict[str, float]:
        """See ``Arm``."""
        return self.native.counters()


class Told(Forecast):
    """A forecast whose gates say what was recorded; the model's own are asked as well, and take their time."""

    def __init__(self, other: Forecast, peeks: dict[str, Floats], arm: Engine) -> None:
        self.name, self.other, self.peeks, self.arm = other.name, other, peeks, arm

    def begin(self, tokens: Ints, positions: Ints, sequences: Ints) -> list[Wish]:
        """See Forecast."""
        return self.other.begin(tokens, positions, sequences)

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        """See Forecast."""

        def recorded(later: int) -> Floats:
            peek(later)
            return self.peeks[f"peek.{layer}.{later}"][self.arm.at : self.arm.at + len(ids)]

        return self.other.routed(layer, ids, recorded)


def run(arm: Arm, tokens: Ints, order: dict[str, Any]) -> dict[str, Any]:
    """Feed ``count`` tokens of the stream from ``at``, to positions from ``start``; one by one or all at once."""
    at, count, start = order["at"], order["count"], order["start"]
    before, found, seconds = arm.counters(), [], 0.0
    width = 1 if order["single"] else count
    for done in range(0, count, width):
        part = np.ascontiguousarray(tokens[at + done : at + done + width])
        begin = time.perf_counter()
        found.append(arm.feed(part, start + done, at + done))
        seconds += time.perf_counter() - begin
    digest = hashlib.sha256()
    for logits in found:
        digest.update(np.ascontiguousarray(logits).tobytes())
    if order.get("save"):
        np.save(order["save"], found[-1])
    counted = {name: value - before.get(name, 0.0) for name, value in arm.counters().items()}
    return {"seconds": seconds, "digest": digest.hexdigest(), "counters": counted, "peak": peak_bytes()}


def main(arguments: list[str]) -> None:
    """Make the arm, then follow orders until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    kind, options = arguments[0], json.loads(arguments[1])
    with np.load(options["stream"], allow_pickle=False) as stream:
        tokens = np.asarray(stream["tokens"], dtype=np.int32)
    arm: Arm
    if kind == "engine":
        arm = Engine(options)
    else:
        from moestro.testing.bench import _arm_peers

        arm = _arm_peers.KINDS[kind](options)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    answer({**arm.about, "torch": "torch" in sys.modules})
    lines: Iterable[str] = sys.stdin
    for line in lines:
        answer(run(arm, tokens, json.loads(line)))


if __name__ == "__main__":
    main(sys.argv[1:])
