"""What the engine does in a second on this machine: measured once in some seconds, kept in a file.

A step takes what it costs once, what each layer and mixture costs beside its weights, its weights and its attention;
``moestro.engine.measure`` measures them. Nothing here is a promise for a busier machine: the load is kept too.
"""

import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

from pydantic import Field

from moestro.core.config import Config, read_kept
from moestro.core.files import cache_root, write_text
from moestro.core.version import VERSION
from moestro.engine.kernels import choose


ROWS: Final = (1, 2, 4, 8, 16, 64, 512)

Progress = Callable[[str], None]


class Cost(Config):
    """Seconds of something beside its weights.

    Attributes:
        once: whatever it is about. row: for every row of the step; of mixtures, for every choice of a row.
        expert: for every expert that is met.
    """

    once: float = Field(ge=0)
    row: float = Field(ge=0)
    expert: float = Field(default=0.0, ge=0)

    def seconds(self, rows: float, experts: float = 0.0) -> float:
        """All together."""
        return self.once + self.row * rows + self.expert * experts


class Disk(Config):
    """Seconds until slabs are there: ``latency_s``, and their bytes at a rate."""

    latency_s: float = Field(ge=0)
    bytes_per_s: float = Field(gt=0)

    @classmethod
    def of(cls, nbytes: int, alone: float, count: int, together: float) -> Self:
        """From the seconds of one slab, and of ``count`` at once."""
        each = max((together - alone) / (count - 1), together / count / 4) if count > 1 else alone
        each = max(each, 1e-9)
        return cls(latency_s=max(alone - each, 0.0), bytes_per_s=nbytes / each)

    def seconds(self, nbytes: float) -> float:
        """Of what a layer misses."""
        return self.latency_s + nbytes / self.bytes_per_s


class Attend(Config):
    """Seconds of attention for every position that a row looks at with a head.

    Attributes:
        look_s: of the look. product_s: of each of the two multiply-adds that a dimension of the head takes.
    """

    look_s: float = Field(ge=0)
    product_s: float = Field(ge=0)


class Profile(Config):
    """Measured rates.

    Attributes:
        signature: processor, threads, kernels and version; another one is measured anew. measured: when.
        busy: processes that wanted to run for every core then; well above 1 the rates are too low.
        weights_per_s: layout -> rows of a product -> matrix weights a second (each met once, whatever the rows).
        attention: ``one``: of a step of one row, which reads keys and values for itself; ``many``: of longer ones.
        step, layer: of every step and of every layer. resident, stored: of a mixture besides, its experts all in memory
            or in a store that holds what is needed.
    """

    signature: str
    measured: str
    busy: float = Field(ge=0)
    weights_per_s: dict[str, dict[int, float]]
    attention: dict[str, Attend]
    step: Cost
    layer: Cost
    resident: Cost
    stored: Cost

    def seconds(self, weights: float, rows: float, layout: str) -> float:
        """Seconds of a product of ``rows`` rows with so many weights; between measured rows by their logarithms."""
        rates = self.weights_per_s[layout]
        known = max(rates)
        return weights / _between(rates, rows) * max(rows / known, 1.0)

    def attending(self, looks: float, dim: int, rows: float) -> float:
        """Seconds of attention in a step of ``rows`` rows: heads of ``dim`` dimensions times positions looked at."""
        cost = self.attention["one" if rows == 1 else "many"]
        return looks * (cost.look_s + 2 * dim * cost.product_s)


def _between(rates: Mapping[int, float], rows: float) -> float:
    """The rate at a number of rows, by logarithms of both; the ends go on."""
    known = sorted(rates)
    if rows <= known[0] or rows >= known[-1]:
        return rates[known[0 if rows <= known[0] else -1]]
    high = next(index for index, value in enumerate(known) if value > rows)
    a, b = known[high - 1], known[high]
    part = math.log(rows / a) / math.log(b / a)
    return math.exp((1 - part) * math.log(rates[a]) + part * math.log(rates[b]))


def pairs(rows: int, start: int, window: int = 0) -> int:
    """Positions that ``rows`` rows of a text from ``start`` on look at, together; window: see ``AttentionSpec``."""
    return sum(min(at + 1, window or at + 1) for at in range(start, start + rows))


def busy() -> float:
    """Processes that want to run for every core, over the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


def profile_file() -> Path:
    """Where it is kept."""
    return cache_root() / "engine.json"


def signature(threads: int) -> str:
    """What must be the same for a measurement to hold: the machine, and the build of what runs on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    kernels = choose()
    made = f"moestro {VERSION}, {kernels.name} {kernels.features()['isa']}"
    library = getattr(getattr(getattr(kernels, "module", None), "_native", None), "__file__", None)
    if library is not None:
        made += " " + hashlib.sha256(Path(library).read_bytes()).hexdigest()[:8]
    return f"{model or platform.machine()}, {threads} threads; {made}"


def this_profile(layouts: set[str], threads: int, *, again: bool = False, progress: Progress | None = None) -> Profile:
    """The kept profile, or a new one; layouts that it lacks are added.

    Args:
        layouts: those that are needed. again: measure even what is kept. progress: told what is being measured.
    """
    from moestro.engine import measure

    path, tell = profile_file(), progress or (lambda text: None)
    now = signature(threads)
    found = None if again else read_kept(Profile, path)
    new = found is None or found.signature != now
    if found is None or new:
        tell("attention")
        nothing = Cost(once=0.0, row=0.0)
        found = Profile(
            signature=now,
            measured=time.strftime("%Y-%m-%d %H:%M"),
            busy=busy(),
            weights_per_s={},
            attention=measure.attention(threads),
            **dict.fromkeys(("step", "layer", "resident", "stored"), nothing),
        )
    missing = sorted((layouts | {"q8"} if new else layouts) - set(found.weights_per_s))
    for layout in missing:
        tell(f"matrices in {layout}")
        measured = {**found.weights_per_s, layout: measure.rates(layout, threads, found)}
        found = found.model_copy(update={"weights_per_s": measured})
    if new:
        tell("steps, layers and mixtures")
        found = found.model_copy(update=measure.costs(threads, found))
    if new or missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, found.model_dump_json(indent=1) + "\n")
    return found


def facts(profile: Profile, disk: Disk | None) -> dict[str, Any]:
    """For a report."""
    reading = None if disk is None else disk.model_dump(mode="json")
    return {**profile.model_dump(mode="json"), "file": str(profile_file()), "disk": reading}
