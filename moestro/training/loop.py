"""The training loop: steps, phases, held-out loss, checkpoints, signals.

``Trainer`` takes any ``nn.Module`` and any dataset; ``moestro.training.run`` builds both from a recipe.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from moestro.core.errors import ConfigError, LoadError
from moestro.data.dataset import Dataset
from moestro.data.sampling import Draw, Sampler, example_rng
from moestro.training import checkpoint, phases
from moestro.training.log import Log, router_rows
from moestro.training.monitor import Window
from moestro.training.objectives import Batch, Objective, Teachers, check_packing
from moestro.training.optimizer import (
    follow,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_lr,
)
from moestro.training.parallel import Ranks, broadcast_model, gathered_weights, settle, shard
from moestro.training.recipe import PhaseConfig, Recipe
from moestro.training.size import Size, size_of
from moestro.training.step import Stepper, StepReport
from moestro.training.validate import heldout_loss


SIGNALS = (signal.SIGINT, signal.SIGTERM)
MAY_DIFFER = frozenset({"name", "steps", "tokens", "checkpoint", "monitor", "eval", "parallel", "accumulation"})

OnEnter = Callable[[nn.Module, PhaseConfig, torch.optim.Optimizer], None]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps done, the last step's loss, and the signal that ended it early, if any."""

    steps: int
    loss: float | None
    stopped_by: int | None = None


@dataclass
class Trainer:
    """One run.

    Attributes:
        model: any module; trained in place. recipe: see ``recipe.Recipe``. dataset: examples by source.
        objective: what is learned. out: folder of the run. teachers: frozen models by name. heldout: examples for the
            held-out loss. group: this process among the run's. dtype: compute type.
        on_enter: applies a phase's plan: called with (model, phase, optimizer). tokenizer: saved with checkpoints.
        hooks: called after every step with (trainer, report).
    """

    model: nn.Module
    recipe: Recipe
    dataset: Dataset
    objective: Objective
    out: Path
    teachers: Teachers = field(default_factory=dict)
    heldout: Dataset | None = None
    group: Ranks = field(default_factory=Ranks)
    dtype: torch.dtype = torch.float32
    on_enter: OnEnter | None = None
    tokenizer: Any = None
    hooks: list[Callable[["Trainer", StepReport], None]] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        self.total = self.recipe.total_steps
        part = self.group.share(self.recipe.batch_size)
        if (part.stop - part.start) % self.recipe.accumulation:
            raise ConfigError(
                f"each of {self.group.world} ranks gets {part.stop - part.start} of batch_size="
                f"{self.recipe.batch_size} examples, not a multiple of accumulation={self.recipe.accumulation}"
            )
        if self.group.kind == "fsdp" and self.group.world > 1 and any(p.on_enter for p in self.recipe.phases):
            raise ConfigError("a phase with on_enter cannot change a sharded model; use parallel: {kind: ddp}")
        for teacher in self.teachers.values():
            teacher.eval().requires_grad_(False)
        self.sampler = Sampler(self.dataset.sizes, self.recipe.sampler, self.recipe.seed)
        self.window = Window()
        self.phase: str | None = None
        self.still: frozenset[str] = frozenset()
        self.targets_seen = 0
        self.last_signal: int | None = None
        self.last_loss: float | None = None
        broadcast_model(self.model, self.group)
        shard(self.model, self.group)
        self.optimizer = make_optimizer(self.model, self.recipe.optimizer)
        clip = self.recipe.optimizer.clip
        self.stepper = Stepper(self.model, self.objective, self.optimizer, self.teachers, self.group, self.dtype, clip)

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints stand."""
        return self.out / "checkpoints"

    # -- the run ------------------------------------------------------------------------------------------------

    def run(self, *, silent: bool = False) -> TrainResult:
        """Train from ``self.step`` to the end, or to the step in which a signal asks to stop.

        Raises:
            NonFiniteError, ConfigError, DataError, SaveError: one line each; the last complete checkpoint stays.
        """
        monitor = self.recipe.monitor
        log = Log(
            self.out,
            self.total,
            start=self.step,
            every=monitor.every,
            tensorboard=monitor.tensorboard and self.group.main,
            silent=silent or not self.group.main,
        )
        with log, self._signals(log):
            while self.step < self.total:
                report = self._step(log)
                self._after(report, log)
                if report.stop:
                    break
        if self.step < self.total:
            return TrainResult(self.step, self.last_loss, self.last_signal or int(signal.SIGTERM))
        return TrainResult(self.step, self.last_loss)

    def _step(self, log: Log) -> StepReport:
        self.enter(log)
        moment = phases.moment_at(self.recipe, self.step)
        lr = set_lr(self.optimizer, self.recipe.schedule.factor(self.step, self.total) * moment.lr)
        draws = self.sampler.step(self.recipe.batch_size)[self.group.share(self.recipe.batch_size)]
        batches, tags = self._batches(draws)
        start = time.perf_counter()
        self.model.train()
        reported = (self.step + 1) % self.recipe.monitor.every == 0 or self._ends()
        report = self.stepper.run(
            self.step,
            batches,
            weights=moment.weights,
            values=moment.values,
            tags=tags,
            still=self.still,
            with_entropy=reported,
            want_stop=self.last_signal is not None,
        )
        seconds = time.perf_counter() - start
        self.step += 1
        self.last_loss = report.loss
        self.targets_seen += report.targets
        self.window.add(report.load, report.counter)
        row = self._row(report, lr, moment, seconds)
        if reported:
            row["flops_per_token"] = self.size().train_flops
        if reported and report.load:
            row["router"] = router_rows(self.window.take())
        if self.group.main:
            log.step(row)
        return report

    def _ends(self) -> bool:
        """Whether the coming step is the last one of the run or of a phase."""
        after = self.step + 1
        here, next_ = (phases.phase_at(self.recipe, min(step, self.total - 1))[0] for step in (self.step, after))
        return after == self.total or here is not next_

    def size(self) -> Size:
        """The model as it is now, with the rows that its experts computed since the last report."""
        length, again = self.recipe.data.sequence_length, self.recipe.gradient_checkpointing
        return size_of(self.model, length, gradient_checkpointing=again, rows=self.window.rows.per_token())

    def _row(self, report: StepReport, lr: float, moment: phases.Moment, seconds: float) -> dict[str, Any]:
        row: dict[str, Any] = {
            "step": self.step,
            "loss": report.loss,
            "terms": report.terms,
            "lr": lr,
            "grad_norm": report.grad_norm,
            "targets": self.targets_seen,
            "tokens": report.tokens,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(report.tokens / seconds, 1),
        }
        if moment.phase is not None:
            row["phase"] = moment.phase
        if moment.values:
            row["values"] = moment.values
        return row

    def _after(self, report: StepReport, log: Log) -> None:
        for hook in self.hooks:
            hook(self, report)
        last = self.step == self.total
        settings = self.recipe.eval
        if self.heldout is not None and settings is not None and (last or self.step % settings.every == 0):
            found = self.evaluate()
            if self.group.main:
                log.write({"step": self.step, "heldout": found})
                log.say(f"step {self.step}/{self.total}  held out  " + _terms(found))
        every = self.recipe.checkpoint.every
        due = bool(every) and self.step % every == 0
        if (last and self.recipe.checkpoint.final) or report.stop or due:
            saved = self.save()
            if report.stop and not last:
                log.say(f"stopped by a signal after step {self.step} of {self.total}; saved {saved}")

    def evaluate(self) -> dict[str, float]:
        """Held-out losses of the objective, each divided by its units."""
        assert self.heldout is not None
        assert self.recipe.eval is not None
        found = heldout_loss(
            self.model,
            self.objective,
            self.heldout,
            limit=self.recipe.eval.limit,
            rows=max(1, self.recipe.batch_size // self.recipe.accumulation // self.group.world),
            seed=self.recipe.seed,
            teachers=self.teachers,
            values=phases.moment_at(self.recipe, min(self.step, self.total - 1)).values,
        )
        settle(self.model)
        return found

    # -- phases -------------------------------------------------------------------------------------------------

    def enter(self, log: Log | None = None, *, resumed: bool = False) -> None:
        """Begin the phase of the coming step, if it is not the one that runs; on resume its plan is not done again."""
        phase, _ = phases.phase_at(self.recipe, self.step)
        name = None if phase is None else phase.name
        if name == self.phase and not resumed:
            return
        self.phase = name
        if phase is None:
            return
        if phase.on_enter is not None and not resumed:
            if self.on_enter is None:
                raise ConfigError(f"phase {name!r} has on_enter, but this trainer was given no way to apply plans")
            self.on_enter(self.model, phase, self.optimizer)
            broadcast_model(self.model, self.group)
            follow(self.optimizer, self.model, self.recipe.optimizer)
            self.window = Window()  # the layers may have other numbers of experts now
        self.still = phases.freeze(self.model, phase)
        self.sampler.reconfigure(phase.sampler or self.recipe.sampler)
        if log is not None:
            log.say(f"phase {name} begins at step {self.step + 1}")

    # -- data ---------------------------------------------------------------------------------------------------

    def _batches(self, draws: list[Draw]) -> tuple[list[Batch], list[Mapping[str, Any]]]:
        """This rank's examples as micro-batches, and the tags of each: ``source`` is the place in the sorted names."""
        names = sorted(self.dataset.sources)
        rows = len(draws) // self.recipe.accumulation
        batches: list[Batch] = []
        tags: list[Mapping[str, Any]] = []
        for at in range(0, len(draws), rows):
            part = draws[at : at + rows]
            examples = [self.dataset.sources[draw.source][draw.place] for draw in part]
            rngs = [example_rng(self.recipe.seed, draw) for draw in part]
            batches.append(self.objective.collate(examples, rngs))
            check_packing(self.model, batches[-1])
            tags.append({"source": torch.tensor([names.index(draw.source) for draw in part])})
        return batches, tags

    # -- checkpoints --------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of this moment; rank 0 writes, all ranks take part."""
        tensors = optimizer_tensors(self.optimizer, self.model)
        weights = gathered_weights(self.model, self.group)
        rng = checkpoint.rng_state(self.group)
        target = self.checkpoints / f"step-{self.step:08d}"
        if self.group.main:
            state = {
                "phase": self.phase,
                "sampler": self.sampler.state(),
                "targets": self.targets_seen,
                "last_loss": self.last_loss,
                "dtype": str(self.dtype).removeprefix("torch."),
                "recipe": self.recipe.model_dump(mode="json"),
            }
            keep = self.recipe.checkpoint.keep
            checkpoint.save_checkpoint(
                self.checkpoints, self.step, self.model, tensors, rng, state, keep, weights, self.tokenizer
            )
        self.group.barrier()
        return target

    def resume(self, saved: checkpoint.Saved, *, model_is_loaded: bool = False) -> None:
        """Go on where ``saved`` was written.

        Args:
            model_is_loaded: the model was opened from the checkpoint's own folder; else its weights are read here.

        Raises:
            ConfigError: the recipe of that run differs in what decides the result.
            LoadError: the checkpoint does not fit the model.
        """
        state = saved.state()
        self.check_same(state["recipe"], saved.path)
        if not model_is_loaded:
            if self.group.kind == "fsdp" and self.group.world > 1:
                raise LoadError(f"{saved.path}: open the model from the checkpoint before it is sharded")
            checkpoint.load_plain_model(self.model, saved.model)
        self.step = saved.step
        self.targets_seen = state["targets"]
        self.last_loss = state["last_loss"]
        phase, _ = phases.phase_at(self.recipe, self.step)
        same = phase is not None and phase.name == state["phase"]
        self.phase = state["phase"]
        if same:
            self.enter(resumed=True)
        self.sampler.load_state(state["sampler"])
        load_optimizer_tensors(self.optimizer, self.model, saved.tensors("optimizer"), str(saved.path))
        checkpoint.set_rng_state(saved.tensors("rng"), self.group)

    def check_same(self, then: Mapping[str, Any], where: Path) -> None:
        """Raise ConfigError at the first setting in which this run's recipe differs from the saved one's."""
        now = self.recipe.model_dump(mode="json")
        if difference := first_difference(then, now):
            raise ConfigError(
                f"{where} was written by another recipe: {difference}; "
                "use the same recipe, or another --out for a new run"
            )

    @contextmanager
    def _signals(self, log: Log) -> Iterator[None]:
        """SIGINT and SIGTERM finish the step, save and stop; a second one acts as always."""
        before: dict[signal.Signals, Any] = {}

        def ask(number: int, frame: FrameType | None) -> None:
            self.last_signal = number
            signal.signal(number, before[signal.Signals(number)])
            log.say(f"{signal.Signals(number).name}: finishing step {self.step + 1}, then saving")

        try:
            for asked in SIGNALS:
                before[asked] = signal.signal(asked, ask)
        except ValueError:  # not the main thread: signals are somebody else's
            before = {}
        try:
            yield
        finally:
            for asked, handler in before.items():
                signal.signal(asked, handler)


def first_difference(then: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> str | None:
    """The first setting that differs between two dumped recipes, in words; None when they give the same run."""
    for key in sorted(set(then) | set(now)):
        if not path and key in MAY_DIFFER:
            continue
        a, b = then.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if inner := first_difference(a, b, f"{path}{key}."):
                return inner
        elif a != b:
            return f"{path}{key} was {a!r}, is {b!r}"
    return None


def _terms(terms: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
