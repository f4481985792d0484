"""What planners and meters are given: a model, its shape and matrices, statistics, a trace, data, a seed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from moestro.core.errors import PlanError
from moestro.core.plan import MethodUse


if TYPE_CHECKING:
    from torch import Tensor

    from moestro.core.site import Site, SiteKind


def gate_of(router: Mapping[str, Any]) -> Mapping[str, Any]:
    """The router {method, config} that ranks: itself, or the one it names as its ``gate``, as pre-gated ones do."""
    inner = router.get("config", {}).get("gate")
    return gate_of(inner) if isinstance(inner, Mapping) else router


def with_gate(router: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """The router {method, config} with other settings of what ranks in it, see ``gate_of``."""
    config = router["config"]
    if isinstance(config.get("gate"), Mapping):
        return {**router, "config": {**config, "gate": with_gate(config["gate"], **settings)}}
    return {**router, "config": {**config, **settings}}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """One feed-forward site, dense or a mixture, as far as headers and configuration tell.

    Attributes:
        layer: index of its block; the blocks of a decoder count on after those of its encoder.
        site: module path. dim: D. out: O. inner: I of the dense layer, or of one expert.
        num_experts: E, None for a dense layer. shared: whether a branch beside the experts serves every token.
        gated, bias, activation: form of an expert.
        module: the method and settings that describe what stands there; None for a dense layer.
    """

    layer: int
    site: str
    dim: int
    out: int
    inner: int
    num_experts: int | None = None
    shared: bool = False
    gated: bool = True
    bias: bool = False
    activation: str = "silu"
    module: MethodUse | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """Matrices of an expert."""
        return ("gate", "up", "down") if self.gated else ("up", "down")

    def matrix(self, projection: str) -> tuple[int, int]:
        """(out, in) of a projection's matrix."""
        return (self.out, self.inner) if projection == "down" else (self.inner, self.dim)

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors of an expert: ``gate``, ``up`` [I, D], ``down`` [O, I]; ``gate_bias``, ``up_bias``, ``down_bias``."""
        return (*self.projections, *(f"{name}_bias" for name in self.projections if self.bias))

    @property
    def top_k(self) -> int | None:
        """Choices of a token, where the router's settings say so."""
        found: int | None = self.gate.get("top_k")
        return found

    @property
    def gate(self) -> Mapping[str, Any]:
        """Settings of what ranks the experts: of the router, or of the one inside it (see ``gate_of``)."""
        router = {} if self.module is None else self.module.config.get("router", {})
        found: Mapping[str, Any] = gate_of(router).get("config", {})
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The feed-forward sites of a model, by layer.

    Attributes:
        name: for messages. layers: index of the block -> its site. num_layers: blocks, whether or not they have one.
        foreign: index of the block -> what stands at its site, where that is neither dense nor a mixture of equal
            float experts.
    """

    name: str
    layers: Mapping[int, LayerShape]
    num_layers: int
    foreign: Mapping[int, str] = field(default_factory=dict)

    def layer(self, index: int) -> LayerShape:
        """The site of block ``index``.

        Raises:
            PlanError: no such block, or one without a feed-forward site.
        """
        if index in self.foreign:
            raise PlanError(
                f"{self.name} layer {index} holds a {self.foreign[index]}, no feed-forward or equal experts"
            )
        if index not in self.layers:
            raise PlanError(
                f"{self.name} has no feed-forward site in layer {index}; it has them in layers {spell(self.layers)}"
            )
        return self.layers[index]


class Subject(Protocol):
    """A model as planners see it, open or on disk."""

    shape: ModelShape

    def fingerprint(self) -> str:
        """What a plan made for this very model stores as its ``model_hash``."""

    def tensor(self, layer: int, expert: int | None, name: str) -> "Tensor":
        """A tensor of one expert, or of the dense layer (``expert`` None); ``name`` is one of ``LayerShape.names``."""

    def router_row(self, layer: int, expert: int, name: str) -> "Tensor":
        """The row of an expert in a tensor of its layer's router, such as ``weight``."""

    def site(self, layer: int, kind: "SiteKind") -> "Site":
        """What stands at a site of another kind in a block; its tensors may be without storage."""


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """What ``plan(inputs, config)`` may look at; most planners need little of it.

    Attributes:
        subject: the model the plan is for. donors: further models by name.
        statistics: name -> what ``observe`` measured, usually by layer.
        trace: a recorded routing trace. batches: batches of token ids, for planners that run the model.
        model: the open model, where the caller has one. seed: of every random choice.
    """

    subject: Subject
    donors: Mapping[str, Subject] = field(default_factory=dict)
    statistics: Mapping[str, Any] = field(default_factory=dict)
    trace: Any = None
    batches: Iterable[Mapping[str, Any]] | None = None
    model: Any = None
    seed: int = 0

    @property
    def shape(self) -> ModelShape:
        """Of the subject."""
        return self.subject.shape

    def statistic(self, name: str, layer: int) -> Any:
        """What was measured of a layer.

        Raises:
            PlanError: it was not; the message says how to measure it.
        """
        if name not in self.statistics:
            known = ", ".join(self.statistics) or "none"
            raise PlanError(f"the statistic {name!r} was not measured (given: {known}); give calibration data")
        if layer not in self.statistics[name]:
            raise PlanError(f"the statistic {name!r} misses layer {layer}; it has {spell(self.statistics[name])}")
        return self.statistics[name][layer]


@dataclass(frozen=True, kw_only=True)
class MeterInputs:
    """What ``measure(subject, config)`` may look at; the card's ``needs`` say which of it is there.

    Attributes:
        name: of the model or trace, for the report. model: an open model, in evaluation mode; it is given back as it
            was. batches: arguments of its forward. trace: a recorded routing trace. seed: of every random choice.
    """

    name: str = ""
    model: Any = None
    batches: Iterable[Mapping[str, Any]] = ()
    trace: Any = None
    seed: int = 0


def spell(numbers: Iterable[int]) -> str:
    """Integers as a short list with runs: ``0-3, 7``; ``none`` when there are none."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
