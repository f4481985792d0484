"""Experts of few bits, and fewer of them, against our own 4 bits: with everything in memory, and under a limit.

Reference model R with its experts in 4 bits, in 1 to 3 bits with a mean of 2.5 (MC-MoE), and in three values (QMoE),
what every token needs in 4 bits throughout. Routing is that of the trained mixture. Where it is pruned, experts are
left out by MC-MoE's rule with the thresholds that its plan would choose, the median of each layer and rank over this
trace; the stream that is replayed lacks them. What the same choices cost is the held-out perplexity of the trained
mixture itself. R's weights are random, so its own outputs say nothing.

Under the limit, the arms are processes in memory cgroups of their own, and experts are read ahead as the server does
it. Logits must be those of a run with everything in memory.
"""

import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError
from moestro.engine.decoding import thinned
from moestro.methods.serve.dynamic_pruning import Config
from moestro.testing.bench import _low_packs as packs
from moestro.testing.bench import _reference as reference
from moestro.testing.bench import _streams as streams
from moestro.testing.bench._cgroup import drop, group
from moestro.testing.bench._children import Child
from moestro.testing.bench._resident import BEFORE, threads
from moestro.testing.bench._trained import trained_stream, trained_trace
from moestro.testing.bench.harness import Row, paired_ratio, take_turns
from moestro.testing.bench.offload import CONTEXT, DECODED, GATE, NO_GROUP, SETTLE, Limited, settle


LIMIT: Final = 288 << 20
"""Bytes of a process: about a quarter of the experts in 4 bits fit beside what every token needs."""

PEER: Final = "4 bits"
ARMS: Final[Mapping[str, tuple[str, bool]]] = {
    PEER: ("4", False),
    "4 bits, pruned": ("4", True),
    "2.5 bits": ("mixed", False),
    "2.5 bits, pruned": ("mixed", True),
    "ternary": ("ternary", False),
}
"""Arm -> which packed model, and whether experts are left out."""

Stream = Mapping[str, npt.NDArray[Any]]


def pruned(stream: Stream, weights_TLK: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
    """A stream without the experts that MC-MoE's rule leaves out, by thresholds over these weights [T, LAYERS, k]."""
    ids, weights = stream["ids"].copy(), stream["weights"].copy()
    router: Any = SimpleNamespace(kind="softmax_topk", renormalise=True, scale=1.0)
    for layer in range(ids.shape[1]):
        told = weights_TLK[:, layer]
        bars = np.quantile(told[:, 1:] / told[:, :1], Config().quantile, axis=0)
        found = thinned(np.array([0, *bars], np.float32), router, ids[:, layer], weights[:, layer])
        ids[:, layer], weights[:, layer] = found
    return {**stream, "ids": ids, "weights": weights}


def run(rounds: int, model: Path | None = None) -> list[Row]:
    """Rows of all arms; ``model``: folder of the reference model, built when missing."""
    folder = reference.folder_of(model)
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        files = _streams(folder, Path(place), rounds)
        common = {"threads": threads(), "context": CONTEXT}
        options = {
            name: {**common, "folder": str(_packed(folder, kind)), "stream": files[prunes]}
            for name, (kind, prunes) in ARMS.items()
        }
        rows, wanted = _measure("all resident", options, rounds, None, {})
        rows += _measure(f"limit {LIMIT >> 20} MiB", options, rounds, LIMIT, wanted)[0]
    cost = packs.perplexities(folder)
    for name, found in cost.items():
        if name != PEER:
            case = f"held-out perplexity of the trained mixture, {name}"
            rows.append(Row(case, "perplexity", "", found, PEER, cost[PEER], cost[PEER] / found, 0.0))
    return rows


def _packed(folder: Path, kind: str) -> Path:
    return reference.packed(folder, 4) if kind == "4" else packs.packed(folder, kind)


def _streams(folder: Path, place: Path, rounds: int) -> dict[bool, str]:
    """Whether pruned -> file of the stream."""
    stream = trained_stream(folder, BEFORE + SETTLE + DECODED * (rounds + 1))
    whole = streams.recorded(trained_trace(folder))
    both = ((False, stream), (True, pruned(stream, whole["weights"])))
    return {prunes: streams.store(place / f"{prunes}.npz", arrays) for prunes, arrays in both}


def _measure(
    where: str, options: Mapping[str, dict[str, Any]], rounds: int, limit: int | None, wanted: Mapping[str, Any]
) -> tuple[list[Row], dict[str, tuple[str, ...]]]:
    """Rows of decoding, and the digests of what each arm computed.

    Raises:
        ConfigError: they are not those of the resident run.
    """
    arms: dict[str, Limited] = {}
    with ExitStack() as opened:
        for number, (name, given) in enumerate(options.items()):
            drop(Path(given["folder"]))
            fence = None if limit is None else group(f"moestro-bits-{number}", limit)
            more = {"memory": limit, "forecast": None if limit is None else GATE}
            child = opened.enter_context(Child("engine", {**given, **more}, fence))
            arms[name] = Limited(child, name, digests=(settle(child),))
        seconds = take_turns({name: arm.decode for name, arm in arms.items()}, rounds)
    for name, found in wanted.items():
        if arms[name].digests != found:
            raise ConfigError(f"{name}, {where}: logits are not those of the resident run")
    speed = {name: 1 / statistics.median(taken) for name, taken in seconds.items()}
    rows = []
    for name, arm in arms.items():
        ratio, spread = paired_ratio(seconds[PEER], seconds[name])
        note = "" if limit is None else _note(arm)
        case = f"decode, {where}, {name}"
        rows.append(Row(case, "speed", "tokens/s", speed[name], PEER, speed[PEER], ratio, spread, note))
    return rows, {name: arm.digests for name, arm in arms.items()}


def _note(arm: Limited) -> str:
    """What a limited arm held and read."""
    limited = "" if arm.child.group is not None else f"; {NO_GROUP}"
    if not arm.needs:
        return "all experts fit" + limited
    read = f"hits {arm.hits / arm.needs:.0%}, {arm.bytes / arm.decoded / 1e6:.0f} MB read a token"
    return f"{arm.child.about['slots']} experts held, {read}{limited}"
