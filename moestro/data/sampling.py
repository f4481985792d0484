"""Which example comes next: deterministic from the seed, independent of ranks and accumulation, exactly resumable.

The order of a source in one epoch is a permutation drawn from (seed, source, epoch). A sampler's whole state is how
many examples each source has given so far, a handful of integers; a run that resumes from them goes on with the very
next example. All ranks draw the same list and take their own slice of it.
"""

import hashlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from moestro.core.config import Config
from moestro.core.errors import ConfigError


ALL = "*"  # the stream over all sources laid end to end


class SamplerConfig(Config):
    """How examples are chosen.

    ``shuffle``: all sources as one set, every example once an epoch. ``sequential``: the same, in file order.
    ``weighted``: each draw picks a source by ``weights`` (default: equal), then that source's next example.
    ``temperature``: as weighted, with weights n^(1/temperature) for a source of n examples.
    """

    kind: Literal["shuffle", "sequential", "weighted", "temperature"] = "shuffle"
    weights: dict[str, float] = Field(default_factory=dict)
    temperature: float = Field(default=1.0, gt=0)
    one_source_per_step: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "SamplerConfig":
        if self.weights and self.kind != "weighted":
            raise ValueError(f"weights belong to kind='weighted', not to kind={self.kind!r}")
        if any(weight < 0 for weight in self.weights.values()) or (self.weights and not any(self.weights.values())):
            raise ValueError(f"weights must be >= 0 and not all 0, got {self.weights}")
        if self.one_source_per_step and self.kind in ("shuffle", "sequential"):
            raise ValueError("one_source_per_step needs kind='weighted' or 'temperature'")
        return self


class Draw(NamedTuple):
    """One example of the training order."""

    source: str
    epoch: int
    place: int


class Sampler:
    """Gives the examples of each step.

    Args:
        sizes: number of examples of each source.
        config: the way of choosing.
        seed: of the run.

    Raises:
        ConfigError: weights for a source that does not exist, or no example at all.
    """

    def __init__(self, sizes: Mapping[str, int], config: SamplerConfig, seed: int) -> None:
        check_weights(sizes, config)
        if not sizes or min(sizes.values()) < 1:
            raise ConfigError(f"every source needs at least one example, got {dict(sizes)}")
        self.sizes = dict(sizes)
        self.config = config
        self.seed = seed
        self.consumed: dict[str, int] = {}
        self.drawn = 0
        self._orders: dict[str, tuple[int, NDArray[np.int64]]] = {}

    def state(self) -> dict[str, object]:
        """The position, as JSON values."""
        return {"drawn": self.drawn, "consumed": dict(self.consumed)}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Go on exactly where ``state`` was taken."""
        consumed = state["consumed"]
        assert isinstance(consumed, Mapping)
        self.drawn = int(str(state["drawn"]))
        self.consumed = {str(name): int(count) for name, count in consumed.items()}

    def reconfigure(self, config: SamplerConfig) -> None:
        """Choose another way from here on; what each source has given so far still counts."""
        check_weights(self.sizes, config)
        self.config = config
        self._orders.clear()

    def step(self, count: int) -> list[Draw]:
        """The next ``count`` examples: one optimiser step."""
        if self.config.kind in ("shuffle", "sequential"):
            return [self._next_of_all() for _ in range(count)]
        names, chances = self._chances()
        draws = 1 if self.config.one_source_per_step else count
        rng = np.random.Generator(np.random.Philox(_key(self.seed, "source", self.drawn)))
        picked = [names[number] for number in rng.choice(len(names), size=draws, p=chances)]
        if self.config.one_source_per_step:
            picked = picked * count
        self.drawn += count
        return [self._next_of(name) for name in picked]

    def _chances(self) -> tuple[list[str], NDArray[np.float64]]:
        names = sorted(self.sizes)
        if self.config.kind == "temperature":
            weights = [self.sizes[name] ** (1.0 / self.config.temperature) for name in names]
        else:
            weights = [self.config.weights.get(name, 0.0 if self.config.weights else 1.0) for name in names]
        values = np.asarray(weights, dtype=np.float64)
        return names, values / values.sum()

    def _next_of_all(self) -> Draw:
        self.drawn += 1
        epoch, place = self._advance(ALL, sum(self.sizes.values()))
        for name in sorted(self.sizes):
            if place < self.sizes[name]:
                return Draw(name, epoch, place)
            place -= self.sizes[name]
        raise AssertionError("a place outside the sources")

    def _next_of(self, name: str) -> Draw:
        epoch, place = self._advance(name, self.sizes[name])
        return Draw(name, epoch, place)

    def _advance(self, stream: str, size: int) -> tuple[int, int]:
        epoch, at = divmod(self.consumed.get(stream, 0), size)
        self.consumed[stream] = self.consumed.get(stream, 0) + 1
        if self.config.kind == "sequential":
            return epoch, at
        if self._orders.get(stream, (-1, None))[0] != epoch:
            rng = np.random.Generator(np.random.Philox(_key(self.seed, f"order {stream}", epoch)))
            self._orders[stream] = (epoch, rng.permutation(size))
        return epoch, int(self._orders[stream][1][at])


def check_weights(sizes: Mapping[str, int], config: SamplerConfig) -> None:
    """Raises ConfigError where a weight names a source that does not exist."""
    unknown = sorted(set(config.weights) - set(sizes))
    if unknown:
        known = ", ".join(sorted(sizes))
        raise ConfigError(f"sampler weight for unknown source {unknown[0]!r}; sources: {known}")


def example_rng(seed: int, draw: Draw) -> np.random.Generator:
    """Random numbers that belong to one example in one epoch (masking and the like)."""
    return np.random.Generator(np.random.Philox(_key(seed, f"example {draw.source} {draw.epoch}", draw.place)))


def _key(seed: int, purpose: str, number: int) -> int:
    """A 128-bit key of its own for every purpose and number."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{purpose}|{number}".encode()).digest()[:16], "little")
