"""One optimiser step: micro-batches in, updated weights and a report out.

What is minimised is

    sum over losses of  weight[name] * (total over the step's units) / (number of units in the whole step)

where the step is all micro-batches of all ranks. Totals come as sums (``LossTerm``), units are counted before the first
forward, so cutting a step into micro-batches or ranks changes nothing but rounding. Units: the objective's targets for
its own token losses; a stack's valid tokens, sequences, or forwards for the routers' losses (a loss of several layers
is the sum of the layers' means).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.context import LossTerm, RoutingContext
from moestro.core.errors import ConfigError, TrainError
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.losses import RoutingLoss
from moestro.core.session import session
from moestro.training import finite
from moestro.training.monitor import LoadCounter
from moestro.training.objectives import Batch, Objective, Teachers
from moestro.training.parallel import Ranks, reduce_gradients, synchronised


@dataclass
class StepReport:
    """What one step did.

    Attributes:
        loss: the minimised sum. terms: each loss by name, unweighted, divided by its units. grad_norm: before clipping.
        targets, tokens: units of the whole step. load: site -> assignments [C] over all ranks. counter: this rank's.
        stop: some rank asked to stop after this step.
    """

    loss: float
    terms: dict[str, float]
    grad_norm: float
    targets: int
    tokens: int
    load: dict[str, Tensor]
    counter: LoadCounter
    stop: bool = False


@dataclass
class Units:
    """Units of a whole step, over all ranks. None: the objective cannot tell."""

    targets: int
    rows: int
    forwards: int
    tokens: int | None
    decoder_tokens: int | None
    stop: bool = False

    @property
    def single(self) -> bool:
        """Whether the step is one forward of one rank, so that the forward itself knows every unit."""
        return self.forwards == 1


@dataclass
class Stepper:
    """Runs optimiser steps.

    Attributes:
        dtype: compute type; bfloat16 runs the forward under autocast over float32 weights.
        clip: bound of the global gradient norm, 0: off.
        after_backward: called before the optimiser with (model) - for tests and for hooks that read gradients.
    """

    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    teachers: Teachers = field(default_factory=dict)
    group: Ranks = field(default_factory=Ranks)
    dtype: torch.dtype = torch.float32
    clip: float = 1.0

    def run(
        self,
        step: int,
        batches: Sequence[Batch],
        *,
        weights: Mapping[str, float],
        values: Mapping[str, float] | None = None,
        tags: Sequence[Mapping[str, Any]] | None = None,
        still: frozenset[str] = frozenset(),
        with_entropy: bool = False,
        want_stop: bool = False,
    ) -> StepReport:
        """One step on this rank's micro-batches.

        Args:
            step: number of the step, from 0, for messages. weights: factor of each loss by name. values: what methods
                read through ``ctx.value``. tags: of each micro-batch, for the session. still: sites whose routers are
                frozen, so that their ``after_step`` is not called.

        Raises:
            NonFiniteError: a loss, gradient or weight is NaN or infinite; weights are as before unless they were the
                cause. ConfigError: a loss without a weight, or a weight without its loss.
        """
        units = self._count(batches, want_stop)
        counter = LoadCounter(with_entropy=with_entropy)
        with session(values=values or {}):
            global_load = self._count_load(batches, tags, units)
            terms = self.backward(step, batches, units, weights, tags, counter, global_load)
            reduce_gradients(list(self.model.parameters()), self.group)
            norm = self._norm()
            if not math.isfinite(norm) or not all(math.isfinite(value) for value in terms.values()):
                self._stop(step, terms, batches, tags)
            self._scale(norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if not finite.weights_are_finite(self.model.parameters()):
                finite.stop(step, self.model, {}, None)
            load = self._sum_load(counter)
            self._after_step(load, still)
        loss = sum(weights.get(name, 1.0) * value for name, value in terms.items())
        tokens = units.tokens if units.tokens is not None else units.rows
        return StepReport(loss, terms, norm, units.targets, tokens, load, counter, units.stop)

    # -- forward and backward -----------------------------------------------------------------------------------

    def backward(
        self,
        step: int,
        batches: Sequence[Batch],
        units: Units,
        weights: Mapping[str, float],
        tags: Sequence[Mapping[str, Any]] | None,
        counter: LoadCounter,
        global_load: Mapping[str, Tensor],
    ) -> dict[str, float]:
        """Forward and backward of every micro-batch; gradients add up. Returns each loss's mean over the step."""
        names: list[str] = []
        sums: list[Tensor] = []
        for number, batch in enumerate(batches):
            with (
                synchronised(self.model, number == len(batches) - 1),
                self._session(tags, number, recorder=counter, collect=True, global_load=global_load) as opened,
            ):
                losses = self._forward(batch)
                means = self._means(losses, _own(opened.take()), batch, units)
                _check_names(weights, means, set(losses))
                total = torch.stack([weights.get(name, 1.0) * mean for name, mean in means.items()]).sum()
                if total.requires_grad:
                    torch.autograd.backward(total)
            if not sums:
                names, sums = list(means), [torch.zeros(()) for _ in means]
            for place, name in enumerate(names):
                sums[place] = sums[place] + means[name].detach().float().cpu()
        return dict(zip(names, self.group.sum(torch.stack(sums)).tolist(), strict=True))

    def _forward(self, batch: Batch) -> dict[str, LossTerm]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.objective(self.model, batch, self.teachers)

    def _means(
        self, losses: Mapping[str, LossTerm], contexts: Sequence[RoutingContext], batch: Batch, units: Units
    ) -> dict[str, Tensor]:
        """Each loss of one micro-batch divided by its units of the whole step."""
        divisor = {"token": units.targets, "sequence": units.rows, "batch": units.forwards}
        means = {name: term.total / max(1, divisor[term.unit]) for name, term in losses.items()}
        times: dict[tuple[str, str], int] = {}
        for ctx in contexts:
            for key in ctx.losses:
                times[key] = times.get(key, 0) + 1
        for ctx in contexts:
            for key, term in ctx.losses.items():
                count = self._router_units(term, ctx, batch, units) * times[key]
                if key[1] in losses:
                    raise ConfigError(f"two losses are called {key[1]!r}, one of the objective and one of {key[0]}")
                mean = term.total / max(1, count)
                means[key[1]] = means[key[1]] + mean if key[1] in means else mean
        return means

    def _router_units(self, term: LossTerm, ctx: RoutingContext, batch: Batch, units: Units) -> int:
        if term.unit == "batch":
            return units.forwards
        if ctx.tokens is None:
            raise TrainError(f"stack {ctx.stack!r} reports a loss but ran without tokens")
        if term.unit == "sequence":
            return ctx.tokens.num_rows if units.single else units.rows
        here = int(ctx.tokens.valid_T.sum())
        if units.single:
            return here
        decoder = "decoder" in ctx.stack
        said = self.objective.tokens(batch, decoder=decoder)
        whole = units.decoder_tokens if decoder else units.tokens
        if said is None or whole is None or said != here:
            raise TrainError(
                f"stack {ctx.stack!r} saw {here} valid tokens where the objective counts {said}; a loss per token can "
                "then not be divided by the whole step's tokens: use accumulation 1 on one rank"
            )
        return whole

    @contextmanager
    def _session(self, tags: Sequence[Mapping[str, Any]] | None, number: int, **settings: Any) -> Iterator[Any]:
        with session(tags=tags[number] if tags else None, **settings) as opened:
            yield opened

    # -- counting -----------------------------------------------------------------------------------------------

    def _count(self, batches: Sequence[Batch], want_stop: bool) -> Units:
        """Units of the step before anything runs: one reduction over ranks."""
        here = [self.objective.tokens(batch, decoder=False) for batch in batches]
        decoder = [self.objective.tokens(batch, decoder=True) for batch in batches]
        counts = torch.tensor(
            [
                sum(self.objective.targets(batch) for batch in batches),
                sum(self.objective.rows(batch) for batch in batches),
                len(batches),
                sum(count or 0 for count in here),
                sum(count or 0 for count in decoder),
                int(want_stop),
            ]
        )
        targets, rows, forwards, tokens, decoder_tokens, stop = self.group.sum(counts).tolist()
        if targets == 0:
            raise TrainError("a step holds no target: every label is -100; check the data's labels and lengths")
        return Units(
            targets,
            rows,
            forwards,
            None if None in here else tokens,
            None if None in decoder else decoder_tokens,
            stop > 0,
        )

    def _count_load(
        self, batches: Sequence[Batch], tags: Sequence[Mapping[str, Any]] | None, units: Units
    ) -> dict[str, Tensor]:
        """Counts of the whole step for balance losses of scope "global".

        Costs one more forward of every micro-batch, without gradient; a step of one forward on one rank needs none,
        since the loss then sees the whole step itself. Random numbers and buffers are put back afterwards.
        """
        if units.single or not any(_is_global(module) for module in self.model.modules()):
            return {}
        counter = LoadCounter()
        state = torch.get_rng_state()
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with torch.no_grad():
            for number, batch in enumerate(batches):
                with self._session(tags, number, recorder=counter, collect=False):
                    self._forward(batch)
            for buffer, before in buffers:
                buffer.copy_(before)
        torch.set_rng_state(state)
        return self._sum_load(counter)

    def _sum_load(self, counter: LoadCounter) -> dict[str, Tensor]:
        """Counts over all ranks. Several ranks agree on the model's mixture layers, whether they ran or not."""
        if self.group.world == 1:
            return dict(counter.load)
        layers = mixture_layers(self.model)
        zeros = {site: torch.zeros(_choices(layer), dtype=torch.int64) for site, layer in layers.items()}
        if not zeros:
            return {}
        flat = self.group.sum(torch.cat([counter.load.get(site, zero) for site, zero in zeros.items()]))
        parts = torch.split(flat, [len(zero) for zero in zeros.values()])
        return dict(zip(zeros, parts, strict=True))

    def _after_step(self, load: Mapping[str, Tensor], still: frozenset[str]) -> None:
        with torch.no_grad():
            for site, layer in mixture_layers(self.model).items():
                if site in load and site not in still and int(load[site].sum()) > 0:
                    layer.after_step(load[site])

    # -- gradients ----------------------------------------------------------------------------------------------

    def _norm(self) -> float:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not grads:
            raise TrainError("no parameter got a gradient; is everything frozen, or does the loss not reach the model?")
        norm = torch.nn.utils.get_total_norm(grads)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _scale(self, norm: float) -> None:
        if self.clip and norm > self.clip:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, self.clip / (norm + 1e-6))

    def _stop(
        self,
        step: int,
        terms: Mapping[str, float],
        batches: Sequence[Batch],
        tags: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        def again() -> None:
            for number, batch in enumerate(batches):
                with self._session(tags, number, collect=True):
                    self._forward(batch)

        repeat = again if self.group.world == 1 else None  # other ranks do not come along
        finite.stop(step, self.model, {name: torch.tensor(value) for name, value in terms.items()}, repeat)


def _own(contexts: Sequence[RoutingContext]) -> list[RoutingContext]:
    """Forwards of the model that is trained; teachers run in evaluation mode."""
    return [ctx for ctx in contexts if ctx.training]


def _choices(layer: MoELayer) -> int:
    return layer.router.num_experts + layer.router.num_null


def _is_global(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return isinstance(module, RoutingLoss) and getattr(config, "scope", None) == "global"


def _check_names(weights: Mapping[str, float], means: Mapping[str, Tensor], own: set[str]) -> None:
    """Every router loss has a weight, every weight a loss: nothing is added or left out in silence."""
    missing = sorted(set(means) - own - set(weights))
    if missing:
        raise ConfigError(
            f"the model computes the loss {missing[0]!r} but the recipe gives it no weight; "
            f"add losses: {{{missing[0]}: 0.01}} (0 leaves it out)"
        )
    unknown = sorted(set(weights) - set(means))
    if unknown:
        raise ConfigError(f"losses: no loss is called {unknown[0]!r}; this run computes {', '.join(sorted(means))}")
