"""The architectures of a supernet: which there are, how a router reads one, which one runs, a search among them."""

import functools
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.session import current_session
from moestro.core.site import Borrowed


FEATURES = ("hidden", "heads", "inner", "layers")
PART = "supernet"  # name of the encoder among the shared parts, and of the slot that holds a forward's architecture
MOST = 10_000  # architectures of a space: all are listed

Size = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, order=True, slots=True)
class Arch:
    """One architecture: model width, inner width of a feed-forward, attention heads, blocks."""

    hidden: int
    inner: int
    heads: int
    layers: int


Genes = tuple[Any, ...]
"""The choices behind an architecture: hidden; inner, or its ratio; heads, or None where they follow; layers."""


class Space(BaseConfig):
    """A search space: every combination of the choices, as far as it is an architecture.

    Attributes:
        hidden: widths of the model. head_dim: width of a head, the same in all architectures.
        heads: numbers of heads; None: hidden / head_dim. A number that does not divide hidden goes with none.
        inner: inner widths, or ratio: multiples of hidden; one of the two. layers: numbers of blocks, the first ones.
    """

    hidden: list[Size] = Field(min_length=1)
    head_dim: Size
    heads: list[Size] | None = Field(default=None, min_length=1)
    inner: list[Size] | None = Field(default=None, min_length=1)
    ratio: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(default=None, min_length=1)
    layers: list[Size] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> "Space":
        if (self.inner is None) == (self.ratio is None):
            raise ConfigError("a space gives either inner, the widths, or ratio, multiples of hidden")
        odd = next((width for width in self.hidden if width % self.head_dim), None)
        if self.heads is None and odd is not None:
            raise ConfigError(
                f"hidden={odd} is no multiple of head_dim={self.head_dim}; give heads, or multiples of it"
            )
        for width, ratio in itertools.product(self.hidden, self.ratio or []):
            if not math.isclose(ratio * width, round(ratio * width)):  # 1.1 x 10 is 11.000000000000002
                raise ConfigError(f"ratio={ratio:g} of hidden={width} is {ratio * width:g} neurons, no whole number")
        count = math.prod(len(choices) for choices in self.genes)
        if count > MOST:
            raise ConfigError(f"the space has {count} combinations, at most {MOST} are listed; give fewer choices")
        if not self.archs:
            raise ConfigError(
                f"no architecture is possible: none of hidden={self.hidden} is a multiple of one of heads={self.heads}"
            )
        if self.largest not in self.archs:
            raise ConfigError(
                f"the largest choices make no architecture: hidden={self.largest.hidden} is no multiple of "
                f"heads={self.largest.heads}; every weight of a supernet must be used by its largest one"
            )
        return self

    @property
    def genes(self) -> tuple[list[Any], ...]:
        """The choices of each gene."""
        width: list[Any] = self.inner if self.inner is not None else self.ratio or []
        return self.hidden, width, self.heads or [None], self.layers

    def sized(self, genes: Genes) -> Arch:
        """The sizes that some choices stand for."""
        hidden, width, heads, layers = genes
        inner = round(width * hidden) if self.inner is None else width
        return Arch(hidden, inner, heads or hidden // self.head_dim, layers)

    def decode(self, genes: Genes) -> Arch | None:
        """The architecture of some choices; None where the heads do not divide the width."""
        arch = self.sized(genes)
        return None if arch.hidden % arch.heads else arch

    @functools.cached_property
    def by_arch(self) -> dict[Arch, Genes]:
        """Every architecture, ordered by its sizes, with the choices behind it."""
        found = {arch: genes for genes in itertools.product(*self.genes) if (arch := self.decode(genes)) is not None}
        return dict(sorted(found.items()))

    @property
    def archs(self) -> tuple[Arch, ...]:
        """Every architecture, ordered."""
        return tuple(self.by_arch)

    @property
    def largest(self) -> Arch:
        """The whole network."""
        return self.sized(tuple(map(max, self.genes)))

    @property
    def smallest(self) -> Arch:
        """The narrowest, of those the one with the fewest neurons, then heads, then blocks."""
        return self.archs[0]

    def resolve(self, asked: Any) -> Arch:
        """The architecture that a session asks for: an Arch, a mapping of its four sizes, or None for the largest.

        Raises:
            ContextError: a size is missing, or the space has no such architecture; the choices are listed.
        """
        if asked is None:
            return self.largest
        sizes = asdict(asked) if isinstance(asked, Arch) else dict(asked) if isinstance(asked, Mapping) else {}
        if set(sizes) != set(FEATURES):
            raise ContextError(f"arch={asked!r}: an architecture has exactly the sizes {', '.join(FEATURES)}")
        arch = Arch(**sizes)
        # 16.0 would be found as 16, and then cut no matrix.
        if not all(hasattr(size, "__index__") for size in sizes.values()) or arch not in self.by_arch:
            width = self.inner or f"{self.ratio} x hidden"
            heads = self.heads or f"hidden / {self.head_dim}"
            raise ContextError(
                f"{arch} is not in the space: hidden {self.hidden}, inner {width}, heads {heads}, layers {self.layers}"
            )
        return arch

    def digest(self) -> bytes:
        """SHA-256 of the choices and of what the encoding divides by."""
        return hashlib.sha256(f"{FEATURES} {constants(self)} {self.model_dump_json()}".encode()).digest()


def constants(space: Space) -> list[int]:
    """What the features of an architecture are divided by: those of the largest one."""
    return [getattr(space.largest, name) for name in FEATURES]


class Encoder(nn.Module):
    """The encoding of architectures, once under a model and saved with it.

    The mixtures were learned for one encoding, and another would change every weight without a word. So what it
    divides by (``constants`` int64 [4]) and the hash of the space (``digest`` uint8 [32]) are saved as buffers, and
    every forward holds them against the space of the settings.
    """

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("constants", torch.tensor(constants(space)))
        self.register_buffer("digest", torch.tensor(list(space.digest()), dtype=torch.uint8))
        self.constants: Tensor
        self.digest: Tensor

    def encode(self, arch: Arch) -> Tensor:
        """enc(a) [F] float32: (hidden, heads, inner, layers), each over its constant."""
        sizes = torch.tensor([getattr(arch, name) for name in FEATURES], device=self.constants.device)
        return sizes.float() / self.constants.float()

    def check(self) -> None:
        """Raise ContextError if the space of the settings is not the one that was trained."""
        if bytes(self.digest.tolist()) != self.space.digest() or self.constants.tolist() != constants(self.space):
            raise ContextError(
                f"the supernet was trained with another search space or encoding (it divided {', '.join(FEATURES)} by "
                f"{self.constants.tolist()}); give the settings it was trained with"
            )

    def active(self, ctx: RoutingContext | None) -> Arch:
        """The architecture of this forward: what its session asks for, else the largest.

        Raises:
            ContextError: not in the space; or see ``check``.
        """
        if ctx is not None and isinstance(found := ctx.get(PART, "arch"), Arch):
            return found
        self.check()
        found = self.space.resolve((current_session() if ctx is None else ctx.session).arch)
        if ctx is not None:
            ctx.put(PART, "arch", found)
        return found


class SharedEncoder(Borrowed):
    """The encoder as a module holds it."""

    module: Encoder


@dataclass(frozen=True, slots=True)
class Found:
    """What a search chose: its fitness (lower is better), parameters, and milliseconds where they were bounded."""

    arch: Arch
    loss: float
    parameters: int
    latency: float | None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a search, inclusive; None: no bound. ``parameters`` of the plain model, ``latency`` in milliseconds."""

    parameters: int | None = None
    at_least: int = 0
    latency: float | None = None


class Search:
    """Evolution among the architectures that keep the limits.

    The parents of a generation are the fittest so far. A child takes each choice from one of two parents, or, with
    probability ``mutate``, from the space. All the time goes into the fitness; a library would spare no line.

    Args:
        fitness: held-out loss of an architecture, without training it; called once for each.
        parameters, latency: measure an architecture; called once for each. Latency is asked only where it is bounded,
            and only of what keeps the other limits.

    Raises:
        ConfigError: no architecture of the space keeps the limits; the range, or the fastest one, is named.
    """

    def __init__(
        self,
        space: Space,
        fitness: Callable[[Arch], float],
        limits: Limits,
        *,
        parameters: Callable[[Arch], int],
        latency: Callable[[Arch], float],
        seed: int = 0,
    ) -> None:
        self.space, self.limits = space, limits
        self.loss, self.size = functools.cache(fitness), functools.cache(parameters)
        self.latency = functools.cache(latency)
        self.random = random.Random(seed)
        most = math.inf if limits.parameters is None else limits.parameters
        self.fits = [arch for arch in space.archs if limits.at_least <= self.size(arch) <= most]
        if not self.fits:
            sizes = [self.size(arch) for arch in space.archs]
            raise ConfigError(
                f"none of the {len(sizes)} architectures has {limits.at_least} to {most} parameters; they have "
                f"{min(sizes)} to {max(sizes)}, change the limits or the space"
            )

    def keeps(self, arch: Arch | None) -> bool:
        """Whether an architecture keeps all limits."""
        bound = self.limits.latency
        return arch in self.fits and (bound is None or self.latency(arch) <= bound)

    def run(self, *, generations: int = 8, population: int = 16, parents: int = 4, mutate: float = 0.3) -> Found:
        """The fittest architecture seen; each of the ``generations`` has up to ``population`` new ones."""
        if min(population, parents) < 1 or not 0 <= mutate <= 1:
            raise ConfigError(f"{population=}, {parents=}, {mutate=}: a search needs 1 or more of both, and 0 to 1")
        seen = dict.fromkeys(self.first(population))
        for _ in range(generations):
            best, most = sorted(seen, key=self.loss)[:parents], len(seen) + population
            for _ in range(10 * population):
                child = self.child(best, mutate)
                if len(seen) < most and child is not None and child not in seen and self.keeps(child):
                    seen[child] = None
        arch = min(seen, key=self.loss)
        return Found(arch, self.loss(arch), self.size(arch), self.limits.latency and self.latency(arch))

    def first(self, population: int) -> list[Arch]:
        """Random architectures that keep the limits."""
        order = self.random.sample(self.fits, len(self.fits))
        found = list(itertools.islice(filter(self.keeps, order), population))
        if not found:
            fastest = min(self.fits, key=self.latency)
            raise ConfigError(
                f"none of the {len(self.fits)} architectures of fitting size runs in {self.limits.latency:g} ms; "
                f"the fastest, {fastest}, takes {self.latency(fastest):.3g} ms"
            )
        return found

    def child(self, best: list[Arch], mutate: float) -> Arch | None:
        """Choices of two parents, some of them changed; None where they make no architecture."""
        pair = [self.space.by_arch[self.random.choice(best)] for _ in range(2)]
        genes = [self.random.choice(both) for both in zip(*pair, strict=True)]
        for place, choices in enumerate(self.space.genes):
            if self.random.random() < mutate:
                genes[place] = self.random.choice(choices)
        return self.space.decode(tuple(genes))
