"""Plans: what a method decided, as data that can be read, compared, stored and replayed.

A plan is a JSON file, beside it an optional ``.safetensors`` file with the tensors it refers to by name.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from moestro.core.config import Config
from moestro.core.errors import ConfigError, PlanError, SaveError
from moestro.core.files import whole_file, write_text


if TYPE_CHECKING:
    from torch import Tensor


class MethodUse(Config):
    """A method by id with its settings."""

    method: str
    config: dict[str, Any] = Field(default_factory=dict)


class Plan(Config):
    """Base of all plans.

    Attributes:
        kind: name of the plan class. method, config: who made it. seed: of its random choices.
        model_hash: fingerprint of the model it was made for; applying it elsewhere is refused unless it is None.
        tensors: name -> tensor, stored beside the JSON.
    """

    kind: ClassVar[str] = "plan"
    schema_version: Literal[1] = 1
    method: str
    config: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    model_hash: str | None = None
    notes: dict[str, Any] = Field(default_factory=dict)

    def save(self, path: str | Path, tensors: "dict[str, Tensor] | None" = None) -> Path:
        """Write ``path`` (JSON) and, with tensors, the file of the same name ending in ``.safetensors``.

        Raises:
            SaveError: a file cannot be written; one that stood there is as it was.
        """
        path = Path(path)
        body = {"kind": self.kind, **self.model_dump(mode="json")}
        if tensors:
            from safetensors import SafetensorError
            from safetensors.torch import save_file

            beside = path.with_suffix(".safetensors")
            with whole_file(beside) as draft:
                try:
                    save_file(tensors, draft)
                except SafetensorError as error:  # it hides the operating system's error in its text
                    raise SaveError(f"{beside}: cannot be written ({error})") from None
        return write_text(path, json.dumps(body, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan written by ``save``.

        Raises:
            PlanError: not a plan, or a plan of another kind or version.
        """
        path = Path(path)
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"{path}: not a readable plan ({error})") from None
        kind = body.pop("kind", None) if isinstance(body, dict) else None
        if kind not in PLANS or (cls.kind != "plan" and kind != cls.kind):
            raise PlanError(
                f"{path}: plan of kind {kind!r}; expected {cls.kind if cls.kind != 'plan' else ', '.join(PLANS)}"
            )
        try:
            plan = PLANS[kind].parse(body, where=str(path))
        except ConfigError as error:
            raise PlanError(str(error)) from None
        assert isinstance(plan, cls)
        return plan


class ExpertSource(Config):
    """One ingredient of an expert. What it asks for happens in the order of the fields from ``rows`` on.

    Attributes:
        donor: name of the model it comes from; ``self`` is the model the plan is applied to.
        layer: index of the block in the donor; the blocks of a decoder count on after those of its encoder.
        expert: index, or None for a dense feed-forward layer (in ``shared``: or for the layer's shared branch).
        rows: inner units taken, in this order; None means all.
        permutation: order of the inner units after taking ``rows``.
        redraw: share of inner units drawn anew from a normal distribution with the mean and standard deviation of the
            units they replace (drop-upcycling).
        mask: share of the weights of each matrix set to zero.
        cut: share of inner units whose output is cut off: their columns of the down projection are zero.
        noise: standard deviation of Gaussian noise, relative to that of each matrix.
        scale_down: factor on the down projection, so that a split keeps the sum. scale_bias: factor on its bias.
        weight: factor in a weighted sum of several sources.
    """

    donor: str = "self"
    layer: int = Field(ge=0)
    expert: int | None = Field(default=None, ge=0)
    rows: list[int] | None = None
    permutation: list[int] | None = None
    redraw: float = Field(default=0.0, ge=0, le=1)
    mask: float = Field(default=0.0, ge=0, le=1)
    cut: float = Field(default=0.0, ge=0, le=1)
    noise: float = Field(default=0.0, ge=0)
    scale_down: float = 1.0
    scale_bias: float = 1.0
    weight: float = 1.0


class LayerExperts(Config):
    """What one layer looks like afterwards.

    Attributes:
        layer: index of the block, counted as in ExpertSource. experts: for each new expert its sources.
        router: where router rows come from. ``rows``: those of each expert's first source. ``mean``: the mean of all
            its sources' rows, weighted like them. ``new``: drawn anew. ``zero``: zeros, so that all choices tie.
            ``remap``: the router stays as it is, and a choice of an old expert becomes one of the new expert that it
            is a source of; two choices that meet are added and run once.
        router_scale: with ``rows``, a factor for each of the router's inputs, on its ``weight`` [C, D]; None for 1.
        module: the method that stands at the site afterwards; None keeps what stands there, with as many experts as
            the plan lists.
        shared: sources of the shared expert that every token uses; None keeps the one that is there.
    """

    layer: int = Field(ge=0)
    experts: list[list[ExpertSource]]
    router: Literal["rows", "mean", "new", "zero", "remap"] = "rows"
    router_scale: list[float] | None = None
    module: MethodUse | None = None
    shared: list[ExpertSource] | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.experts or any(not sources for sources in self.experts) or self.shared == []:
            raise ConfigError(f"layer {self.layer}: every planned layer needs experts and every expert a source")
        if self.router_scale is not None and self.router != "rows":
            raise ConfigError(f"layer {self.layer}: router_scale is for router=rows, not router={self.router}")
        return self


class TensorSource(Config):
    """One ingredient of a tensor: what a site of the same kind holds in some model.

    Attributes:
        donor: name of the model it comes from; ``self`` is the model the plan is applied to.
        layer: index of the block in the donor, counted as in ExpertSource.
        name: of the tensor, under its site: ``q_proj.weight``.
        weight: factor in a weighted sum of several sources.
    """

    donor: str = "self"
    layer: int = Field(ge=0)
    name: str
    weight: float = 1.0


class SiteParts(Config):
    """A module for a site that is no feed-forward, and what its tensors are put together from.

    Attributes:
        layer: index of the block, counted as in ExpertSource. kind: of the site. module: the method that stands there.
        tensors: name of a tensor of that module, [N, ...] -> for each of its N rows the sources, which are summed. What
            is not named here stays as the module is built.
    """

    layer: int = Field(ge=0)
    kind: Literal["attention"] = "attention"
    module: MethodUse
    tensors: dict[str, list[list[TensorSource]]]

    @model_validator(mode="after")
    def _some(self) -> Self:
        for name, rows in self.tensors.items():
            if not rows or any(not sources for sources in rows):
                raise ConfigError(f"layer {self.layer} {self.kind}: {name} needs rows and every row a source")
        return self


class ExpertPlan(Plan):
    """Layers made of sources: prune, merge, split, upcycle, aggregate, assemble, permute and segment are all this.

    Attributes:
        layers: the feed-forward layers that change. sites: other sites that change.
        rest: what happens to all other tensors when there are donors. ``keep``: they stay. ``mean``: the mean over the
            model and its donors. Any other word: the donor of that name gives them.
    """

    kind: ClassVar[str] = "experts"
    layers: list[LayerExperts]
    sites: list[SiteParts] = Field(default_factory=list)
    rest: str = "keep"

    @model_validator(mode="after")
    def _once(self) -> Self:
        seen = [entry.layer for entry in self.layers]
        if len(set(seen)) != len(seen):
            raise ConfigError("a layer is planned twice; each block index may stand once in `layers`")
        places = [(entry.kind, entry.layer) for entry in self.sites]
        if len(set(places)) != len(places):
            raise ConfigError("a site is planned twice; each block index may stand once a kind in `sites`")
        return self


class BitPlan(Plan):
    """How the matrices of experts are stored, keyed ``layer/expert/projection``.

    A plan names every expert of every mixture; what stays a float says so, as a matrix of the format ``wide`` or as a
    layer in ``wide``. Nothing else of a model is ever packed.

    Attributes:
        bits: of a code, for each matrix. group_size: weights along the input that share a scale, None for a whole row.
        formats: packings (see docs/formats.md) of single matrices; without one a matrix has the ``int`` format of its
            bits, ``sign1`` for 1, in groups of ``group_size`` with float32 scales.
        wide: layers whose experts stay as they are.
        rounding: a method with ``rounding(config)`` that chooses the codes; None rounds to the nearest.
    """

    kind: ClassVar[str] = "bits"
    bits: dict[str, float]
    group_size: int | None = Field(default=None, ge=1)
    formats: dict[str, str] = Field(default_factory=dict)
    wide: list[int] = Field(default_factory=list)
    rounding: MethodUse | None = None

    @model_validator(mode="after")
    def _keyed(self) -> Self:
        for key in (*self.bits, *self.formats):
            layer, _, rest = key.partition("/")
            expert, _, projection = rest.partition("/")
            if not (layer.isdecimal() and expert.isdecimal() and projection in ("gate", "up", "down")):
                raise ConfigError(
                    f"{key!r} names no matrix of an expert; keys are layer/expert/projection such as 3/0/up, "
                    "with gate, up or down: routers, norms, embeddings and attention are never packed"
                )
            if key not in self.bits:
                raise ConfigError(f"formats name {key}, bits do not")
            if int(layer) in self.wide:
                raise ConfigError(f"layer {layer} is in `wide`, and {key} has bits; one of the two is wrong")
        return self

    def packing(self, layer: int, expert: int, projection: str) -> str | None:
        """The packing of one matrix as it is spelled, None where the plan has none."""
        key = f"{layer}/{expert}/{projection}"
        if key in self.formats or key not in self.bits:
            return self.formats.get(key)
        bits = self.bits[key]
        name = "sign1" if bits == 1 else f"int{bits:g}" if bits < 16 else "wide"
        return f"{name}:{'row' if self.group_size is None else f'g{self.group_size}'}"


class PlacementPlan(Plan):
    """Devices that hold each expert, keyed ``layer/expert``; the first is the owner, the rest replicas."""

    kind: ClassVar[str] = "placement"
    devices: list[str]
    experts: dict[str, list[int]]


class ServingPlan(Plan):
    """How a model is served: which bytes live in which tier, and who decides what while it runs.

    The same plan runs in the engine (`moestro serve --plan`) and in the simulator (`moestro simulate cache`).

    Attributes:
        budget_bytes: memory of the whole process. tiers: bytes of each; ``memory.experts`` and ``disk.experts`` are the
            experts that fit and the others.
        policy: who leaves the cache of experts. forecast: what is read ahead of need. order: which tokens run together.
        decoder: how logits become a choice where a request does not say. All are methods of the stage serve; None
            leaves it to the server.
        context: positions of keys and values over all requests. running: sequences at once. chunk: rows of a step at
            most. None leaves them to the server.
    """

    kind: ClassVar[str] = "serving"
    budget_bytes: int = Field(ge=0)
    tiers: dict[str, int]
    policy: MethodUse | None = None
    forecast: MethodUse | None = None
    order: MethodUse | None = None
    decoder: MethodUse | None = None
    context: int | None = Field(default=None, ge=1)
    running: int | None = Field(default=None, ge=1)
    chunk: int | None = Field(default=None, ge=1)

    @property
    def expert_share(self) -> float:
        """Share of the experts' bytes that are in memory; 1 where there are none."""
        held, away = self.tiers.get("memory.experts", 0), self.tiers.get("disk.experts", 0)
        return held / (held + away) if held + away else 1.0


class CompositionPlan(Plan):
    """Several models behind one router."""

    kind: ClassVar[str] = "composition"
    models: dict[str, str]
    router: MethodUse


PLANS: dict[str, type[Plan]] = {
    cls.kind: cls for cls in (ExpertPlan, BitPlan, PlacementPlan, ServingPlan, CompositionPlan)
}
