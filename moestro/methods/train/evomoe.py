"""EvoMoE's dense-to-sparse gate: every expert at first, fewer as a temperature falls, one in the end.

For logits z = x W^T [T, C] and noise G, independent Gumbel(0, 1) for every entry of every training step,

    g = softmax((z + G) / tau),  p = softmax(z)                                                     [T, C]
    stage soft:   active = every i with g_i > threshold, and argmax g always
    stage hard:   active = argmax g
    stage dense:  active = all, weight = p; no noise, no temperature
    weight_i = p_i (combine="softmax", not renormalised) or g_i (combine="gumbel")
    tau(s) = tau_max - s (tau_max - tau_min), or tau_max (tau_min / tau_max)^s, and tau_min for s >= 1

An expert goes quiet once its gate falls e^(-gap / tau) behind the best one's, so the same gap between logits that keeps
it at a high temperature drops it at a low one. With threshold 1e-3 and unlearned logits a tau of 0.5 still leaves six
of eight experts active; about two stay at 0.1.

Nothing about time is kept here. The phases of a run say where the schedule stands, through the values ``dts_progress``
(s, the share of the decay that lies behind) and ``dts_stage`` (0 dense, 1 soft, 2 hard); a checkpoint that knows its
step therefore resumes to the bit. Evaluation has no noise and takes the argmax, in stage dense all experts.

Source: EvoMoE (2112.14397), its section on the dense-to-sparse gate, and the gate of the code released with it. The
phase before, one expert that many copies are made of, is ``convert.diversify``; the loss is ``train.dts_balance_loss``.
"""

import math
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.router import LinearRouter, choose_topk
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.noise import gumbel_like


Stage = Literal["dense", "soft", "hard"]
STAGES: tuple[Stage, ...] = ("dense", "soft", "hard")


class Config(BaseConfig):
    """Settings.

    Attributes:
        stage, progress: where the schedule stands when no phase says so. Neither has a default: a gate that is hard
            from its first step, or whose temperature never falls, is a mistake that nothing else would tell.
        tau_max, tau_min, decay: the temperature at progress 0 and 1, and the curve between them.
        threshold: gates at or below it are switched off; the best one never is.
        combine: what an active expert weighs, see the top of the file.
    """

    num_experts: int = Field(default=8, ge=1)
    stage: Stage = Field(examples=["soft"])
    progress: float = Field(ge=0, le=1, examples=[0.0])
    tau_max: float = Field(default=2.0, ge=1e-4, allow_inf_nan=False)
    tau_min: float = Field(default=0.2, ge=1e-4, allow_inf_nan=False)
    decay: Literal["linear", "exponential"] = "linear"
    threshold: float = Field(default=1e-3, ge=0, lt=1)
    combine: Literal["softmax", "gumbel"] = "softmax"

    @model_validator(mode="after")
    def _falls(self) -> "Config":
        if self.tau_min > self.tau_max:
            raise ConfigError(f"tau_min={self.tau_min} is above tau_max={self.tau_max}; the temperature falls")
        return self


def temperature(progress: float, config: Config) -> float:
    """tau when the share ``progress`` of the decay lies behind; tau_min from 1 on."""
    high, low, done = config.tau_max, config.tau_min, min(progress, 1.0)
    tau = high - done * (high - low) if config.decay == "linear" else high * (low / high) ** done
    return max(tau, low)


def active_experts(gate_TC: Tensor, threshold: float) -> Tensor:
    """Which experts a token runs, bool [T, C]: gates above the threshold, and the best one even when none is."""
    best_TK = choose_topk(gate_TC, 1)
    return (gate_TC > threshold).scatter(1, best_TK, True)


class DenseToSparse(LinearRouter):
    """The router. Its parameters are those of a LinearRouter; it keeps no state."""

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config.num_experts, top_k=None)
        self.config = config

    def stage(self, ctx: RoutingContext) -> Stage:
        """The stage in force. Evaluation knows no soft stage: noise is what softens it.

        Raises:
            ContextError: ``dts_stage`` is no stage's number.
        """
        number = ctx.value("dts_stage", STAGES.index(self.config.stage))
        if number not in (0, 1, 2):
            raise ContextError(f"dts_stage={number}; expected 0 (dense), 1 (soft) or 2 (hard), not a ramp between them")
        stage = STAGES[int(number)]
        return stage if self.training or stage == "dense" else "hard"

    def temperature(self, ctx: RoutingContext) -> float:
        """The temperature in force.

        Raises:
            ContextError: ``dts_progress`` is negative or not a number.
        """
        progress = ctx.value("dts_progress", self.config.progress)
        if not 0 <= progress < math.inf:
            raise ContextError(f"dts_progress={progress}; expected a share of the decay, from 0 to 1")
        return temperature(progress, self.config)

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """Scores [T, C] in float32. The soft stage ranks by g, which the threshold is about, the others need not."""
        logits_TC = self.logits(x_TD)
        probability_TC = logits_TC.softmax(-1)
        stage = self.stage(ctx)
        if stage == "dense":
            return Scores(logits_TC, probability_TC.detach(), probability_TC, probability_TC)
        noisy_TC = logits_TC + gumbel_like(logits_TC) if self.training else logits_TC
        select_TC, gate_TC = noisy_TC, probability_TC
        if stage == "soft" or self.config.combine == "gumbel":
            sharp_TC = (noisy_TC / self.temperature(ctx)).softmax(-1)
            select_TC = sharp_TC if stage == "soft" else noisy_TC
            gate_TC = sharp_TC if self.config.combine == "gumbel" else probability_TC
        return Scores(logits_TC, select_TC.detach(), gate_TC, probability_TC)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """Ragged in the soft and dense stages, one expert a token in the hard one."""
        stage = self.stage(ctx)
        if stage == "hard":
            expert_TK = choose_topk(scores.select_TC, 1)
            weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
            return Routing.from_topk(expert_TK, weight_TK, num_experts=self.num_experts, scores=scores)
        closed = float("-inf")  # what an edit took out stays out
        chosen_TC = active_experts(scores.select_TC, closed if stage == "dense" else self.config.threshold)
        return Routing.from_mask(chosen_TC, self.weigh(scores.gate_TC), num_experts=self.num_experts, scores=scores)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a mixture whose input is as wide as the site's."""
    return DenseToSparse(site.dim, config)


CARD = MethodCard(
    title="EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate",
    year=2021,
    arxiv="2112.14397",
    paper="evomoe",
    summary="A gate that runs all experts, then fewer as its temperature falls, then one; driven by phases.",
    taxonomy="gating/dense",
    deviations=(
        "the schedule is part of the run's phases, where the released code keeps it in globals of a module",
        "evaluation is free of noise with combine=gumbel too; the released code samples there",
        "only active experts run; the released code multiplies rows of zeros for the others",
        "the best expert stays when every gate is at or below the threshold",
    ),
)
