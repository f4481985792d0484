"""How to time several arms against each other without fooling oneself.

All arms run in one process and in rounds; the order rotates from round to round, so that no arm always inherits the
same heap, cache and clock from the same neighbour. Figures are medians over rounds, and so are ratios: each is taken
within a round, where whatever slows the machine slows both arms. Every arm does the whole of its work inside the timed
call (also the clearing of its gradients).
"""

import importlib
import inspect
import os
import pkgutil
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moestro.core.errors import ConfigError


Arm = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` > 1 means ours is better, whatever the metric.

    `ratio` is the median over the rounds, `spread` the interquartile range as a share of it (0 where measured once).
    `peer` and `ratio` are None where the peer is missing; `note` then says why, and else what a reader should know.
    """

    case: str
    metric: str
    unit: str
    ours: float
    peer_name: str
    peer: float | None
    ratio: float | None
    spread: float
    note: str = ""


def take_turns(arms: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """What every arm says its work took, in every round; the order rotates by one each round, warm-up is not counted.

    Raises:
        ConfigError: no rounds.
    """
    if rounds < 1:
        raise ConfigError(f"{rounds} rounds; a benchmark needs at least 1")
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = arms[name]()
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


def interleave(
    arms: Mapping[str, Arm], rounds: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every arm in every round by a clock; see ``take_turns``."""

    def timed(arm: Arm) -> float:
        start = clock()
        arm()
        return clock() - start

    return take_turns({name: partial(timed, arm) for name, arm in arms.items()}, rounds, warmup)


def time_rows(case: str, metric: str, seconds: Mapping[str, list[float]], ours: str = "ours") -> list[Row]:
    """Our median time against that of every other arm, in milliseconds."""
    mine = statistics.median(seconds[ours]) * 1e3
    rows = []
    for name, theirs in seconds.items():
        if name != ours:
            peer = statistics.median(theirs) * 1e3
            rows.append(Row(case, metric, "ms", mine, name, peer, *paired_ratio(theirs, seconds[ours])))
    return rows


def paired_ratio(numerators: list[float], denominators: list[float]) -> tuple[float, float]:
    """Median of the round-by-round ratio, and its interquartile range over the median."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    if len(ratios) < 2:
        return ratios[0], 0.0
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, (high - low) / middle


def names() -> list[str]:
    """Every benchmark there is."""
    from moestro.testing import bench

    found = [module.name.replace("_", "-") for module in pkgutil.iter_modules(bench.__path__)]
    return sorted(name for name in found if name != "harness" and not name.startswith("-"))  # private modules


def run(name: str, rounds: int, model: Path | None = None) -> dict[str, Any]:
    """Run one benchmark: {name, machine, date, rows}.

    Args:
        model: folder of the reference model, for the benchmarks of the engine.

    Raises:
        ConfigError: no such benchmark, or it has no use for ``model``.
    """
    if name not in names():
        raise ConfigError(f"no benchmark {name!r}; there are: {', '.join(names())}")
    module = importlib.import_module(f"moestro.testing.bench.{name.replace('-', '_')}")
    if model is not None and "model" not in inspect.signature(module.run).parameters:
        raise ConfigError(f"benchmark {name!r} runs no reference model; leave --model out")
    rows: list[Row] = module.run(rounds) if model is None else module.run(rounds, model)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"name": name, "machine": machine(), "date": date, "rows": [asdict(row) for row in rows]}


def machine() -> str:
    """Processor, cores, torch threads and version."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{processor}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads{load}"
    )
