"""What the engine counts, and the same as Prometheus text."""

import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt


if TYPE_CHECKING:
    from moestro.engine.requests import Request
    from moestro.engine.sequences import Floats, Ints

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Histogram:
    """Counts of seconds up to each of ``BOUNDS``, and beyond."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[next((i for i, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))] += 1
        self.total += seconds

    def lines(self, name: str, help_text: str) -> list[str]:
        """Prometheus text."""
        lines = [f"# HELP {name} {help_text}", f"# TYPE {name} histogram"]
        sums = np.cumsum(self.counts).tolist()
        for bound, count in zip((*BOUNDS, math.inf), sums, strict=True):
            lines.append(f'{name}_bucket{{le="{"+Inf" if math.isinf(bound) else bound}"}} {count}')
        return [*lines, f"{name}_sum {self.total}", f"{name}_count {sums[-1]}"]


@dataclass
class Stats:
    """Counters of a scheduler since its start. ``rate`` is a moving average of rows a second of steps."""

    requests: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    faults: int = 0
    steps: int = 0
    rows: int = 0
    busy: float = 0.0
    rate: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    first: Histogram = field(default_factory=Histogram)
    between: Histogram = field(default_factory=Histogram)
    recent: list[tuple[float, int]] = field(default_factory=list)

    def step(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        self.steps += 1
        self.rows += rows
        self.busy += seconds
        now = rows / max(seconds, 1e-6)
        self.rate = now if self.rate == 0 else 0.9 * self.rate + 0.1 * now

    def token(self, seconds: float, first: bool) -> None:
        """A token came ``seconds`` after the one before it (the first: after the request)."""
        (self.first if first else self.between).add(seconds)
        self.written_tokens += 1
        second = math.floor(time.monotonic())
        if self.recent and self.recent[-1][0] == second:
            self.recent[-1] = (second, self.recent[-1][1] + 1)
        else:
            self.recent = [*self.recent[-9:], (second, 1)]

    def end(self, how: str, request: "Request") -> None:
        """A request is over."""
        self.requests[how] += 1
        self.prompt_tokens += len(request.prompt)
        self.cached_tokens += request.cached

    def retry_after(self, tokens: int) -> int:
        """Seconds that ``tokens`` of waiting work take, 1 to 60."""
        return max(1, min(60, math.ceil(tokens / self.rate) if self.rate else 1))

    def speed(self) -> float:
        """Tokens written a second, over the last full seconds."""
        now = math.floor(time.monotonic())
        counted = [count for second, count in self.recent if now - 5 <= second < now]
        return sum(counted) / 5


class Heat:
    """How often each expert was chosen: in all, and lately (older steps count less).

    Call it with what a forward tells ``on_route``.
    """

    def __init__(self, experts: tuple[int, ...], half_life: float = 5.0) -> None:
        self.total: dict[int, npt.NDArray[np.int64]] = {
            layer: np.zeros(count, dtype=np.int64) for layer, count in enumerate(experts) if count
        }
        self._lately = {layer: counts.astype(np.float64) for layer, counts in self.total.items()}
        self._half_life = half_life
        self._then = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, layer: int, ids: "Ints", weights: "Floats") -> None:
        counts = np.bincount(ids[ids >= 0].ravel(), minlength=len(self.total[layer]))
        with self._lock:
            self._fade()
            self.total[layer] += counts
            self._lately[layer] += counts

    def lately(self) -> dict[int, list[float]]:
        """Layer -> share of each expert in what was chosen lately; zeros when nothing was."""
        with self._lock:
            self._fade()
            return {
                layer: np.round(counts / max(float(counts.sum()), 1e-9), 4).tolist() if counts.sum() > 0.5
                else [0.0] * len(counts)
                for layer, counts in self._lately.items()
            }  # fmt: skip

    def _fade(self) -> None:
        now = time.monotonic()
        if now - self._then > 0.05:
            factor = 0.5 ** ((now - self._then) / self._half_life)
            self._then = now
            for counts in self._lately.values():
                counts *= factor


def prometheus(
    stats: Stats, gauges: Mapping[str, float], counters: Mapping[str, float] | None = None, heat: Heat | None = None
) -> str:
    """All of it in Prometheus' text format 0.0.4. ``counters``: of the forward (its expert store)."""
    lines: list[str] = []

    def family(name: str, kind: str, text: str, samples: Iterable[tuple[str, Any]]) -> None:
        lines.extend([f"# HELP moestro_{name} {text}", f"# TYPE moestro_{name} {kind}"])
        lines.extend(f"moestro_{name}{labels} {value}" for labels, value in samples)

    ended = [(f'{{outcome="{how}"}}', count) for how, count in sorted(stats.requests.items())]
    family("requests_total", "counter", "Requests that ended.", [*ended, ('{outcome="refused"}', stats.refused)])
    for name, value, text in (
        ("steps_total", stats.steps, "Steps of the model."),
        ("rows_total", stats.rows, "Rows computed, over all passes."),
        ("step_seconds_total", stats.busy, "Seconds spent in steps."),
        ("step_faults_total", stats.faults, "Steps that failed."),
        ("prompt_tokens_total", stats.prompt_tokens, "Tokens of prompts of ended requests."),
        ("prompt_tokens_cached_total", stats.cached_tokens, "Of them taken from the prefix cache."),
        ("generated_tokens_total", stats.written_tokens, "Tokens written."),
    ):
        family(name, "counter", text, [("", value)])
    for name, value in (counters or {}).items():
        family(f"experts_{name}_total", "counter", f"Expert store: {name.replace('_', ' ')}.", [("", value)])
    for name, value in gauges.items():
        family(name, "gauge", f"{name.replace('_', ' ').capitalize()} now.", [("", value)])
    if heat is not None:
        chosen = [
            (f'{{layer="{layer}",expert="{expert}"}}', int(count))
            for layer, counts in heat.total.items()
            for expert, count in enumerate(counts)
        ]
        family("expert_chosen_total", "counter", "How often each expert was chosen.", chosen)
    lines += stats.first.lines("moestro_first_token_seconds", "Seconds from a request to its first token.")
    lines += stats.between.lines("moestro_next_token_seconds", "Seconds between tokens of a request.")
    return "\n".join(lines) + "\n"
