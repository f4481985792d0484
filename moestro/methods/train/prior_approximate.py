"""Prior-Approximate routing: the dense feed-forward tells a hard router which of its slices come closest to it.

For a token x, slices E_1 .. E_E of a dense feed-forward F, K chosen and output scale s (E / K unless fitted):

    t = F(x)                                  of the frozen dense model, the teacher
    e_i = mean over d of (E_i(x) - t / s)^2
    m = 1 for the K slices of smallest e, else 0               pseudo-labels [T, E]
    q = softmax(m)  or  m / K                                  ``target``
    p = softmax(r),  r = x W^T + b                             the router, [T, E]
    L_PA  = mean over tokens of sum_e p log(p / q)             or q log(q / p): ``direction``
    L_bal = mean over tokens and slices of [slice is one of the K largest p] p

p and q are clipped to [1e-7, 1 - 1e-7]; both losses add up over layers. The gate of a chosen slice is the constant s,
so neither loss of the output gives the router a gradient: without L_PA it stays as it was drawn. In the objective and
in ``fit_routers`` the router's input is detached: L_PA trains the router and nothing else.

``teacher_input`` "same": the teacher's feed-forward reads what the student's layer reads. "chained" is what the
released code does: from the second layer on the teacher's feed-forward, the slices and the trained router read the
output of the teacher's feed-forward one layer before (no residual, attention or norm between), though the student
routes on its own x.

Loss weights are the recipe's: the paper's code has 0.05 for ``prior_approximate`` and 0.01 for ``prior_balance``.

Source: FactorLLM (2408.11855); formulas from its released code (loss.py, new_model_KD.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import LossTerm, RoutingContext
from moestro.core.errors import ConfigError
from moestro.core.forward import logits_of
from moestro.core.routing import Routing
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.data.packing import IGNORE
from moestro.methods.train._parts.hard_slices import Fit, HardRouter, check_width, fit_routers, hard_layers, teacher_at
from moestro.methods.train._parts.prior import (
    Direction,
    Target,
    balance,
    labels_of_errors,
    pa_pseudo_labels,
    prior_approximate_loss,
    slice_errors,
)
from moestro.methods.train._parts.teachers import only


__all__ = [
    "CARD", "Config", "Fit", "HardRouter", "balance", "build", "fit_routers", "hard_layers", "labels_of_errors",
    "objective", "pa_pseudo_labels", "prior_approximate_loss", "slice_errors",
]  # fmt: skip


class Config(BaseConfig):
    """Settings of the router, and of the objective that trains it.

    Attributes:
        num_experts, top_k: E and K. scale: s, weight of every chosen slice; E / K when None.
        teacher_input: what the teacher's feed-forward reads. target, direction: of the loss, see the top of the file.
    """

    num_experts: int = Field(default=4, ge=1)
    top_k: int = Field(default=2, ge=1)
    scale: float | None = Field(default=None, gt=0)
    teacher_input: Literal["same", "chained"] = "same"
    target: Target = "softmax-mask"
    direction: Direction = "router||label"

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} but num_experts={self.num_experts}")
        return self


@dataclass
class _Inputs:
    """Recorder: what each layer under a hard router was given."""

    seen: dict[str, Tensor] = field(default_factory=dict)

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """See Recorder."""
        self.seen[site] = ctx.kept[(site, "input")].detach()


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a mixture whose input is as wide as the site's."""
    scale = config.num_experts / config.top_k if config.scale is None else config.scale
    return HardRouter(site.dim, config.num_experts, config.top_k, scale)


def objective(
    model: nn.Module, batch: dict[str, Tensor], teachers: Mapping[str, nn.Module], config: Config
) -> dict[str, LossTerm]:
    """{causal, prior_approximate, prior_balance}: sums over target tokens, the last two over layers as well.

    A position without a target (padding, the last of a document) counts in none of them.

    Args:
        model: of layers under this file's router. batch: of the objective ``causal``, labels [B, S] among them.
        teachers: exactly one, the dense model.

    Raises:
        ConfigError: no teacher or several, no such layers, or a teacher without a module at their sites.
    """
    teacher, layers, seen = only(teachers), hard_layers(model), _Inputs()
    with session(recorder=seen, keeps=["input"]):
        logits_BSV = logits_of(model, batch)
    labels_BS = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    live_BS = labels_BS != IGNORE
    causal = F.cross_entropy(logits_BSV[live_BS].float(), labels_BS[live_BS], reduction="sum")
    prior, flat = causal.new_zeros(()), causal.new_zeros(())
    chain_TD: Tensor | None = None
    for site, layer in layers.items():
        x_TD = seen.seen[site][live_BS.flatten()]
        if config.teacher_input == "chained" and chain_TD is not None:
            x_TD = chain_TD
        router = layer.router
        assert isinstance(router, HardRouter)
        with torch.no_grad(), session(collect=False):
            chain_TD = teacher_at(teacher, site)(x_TD[None])[0]
        check_width(site, layer.bank, chain_TD)
        labels_TE = labels_of_errors(slice_errors(layer.bank, x_TD, chain_TD / router.scale), router.choices)
        logits_TE = router.logits(x_TD)
        prior = prior + prior_approximate_loss(logits_TE, labels_TE, target=config.target, direction=config.direction)
        flat = flat + balance(logits_TE, router.choices)
    return {
        "causal": LossTerm(causal, "token"),
        "prior_approximate": LossTerm(prior, "token"),
        "prior_balance": LossTerm(flat, "token"),
    }


CARD = MethodCard(
    title="FactorLLM: Factorizing Knowledge via Mixture of Experts for Large Language Models",
    year=2024,
    arxiv="2408.11855",
    paper="factorllm",
    summary="A hard router over slices of a dense feed-forward, taught by the dense outputs (prior-approximate loss).",
    taxonomy="scheme/dense-to-sparse",
    deviations=(
        "the released script leaves the loss out, so its router never learns; here it is part of the objective",
        "teacher and student read the same input by default; teacher_input=chained is the released code's way",
        "the scale is E / K, not an integer quotient, and may be fitted by least squares",
        "means run over all target tokens of a step, padding apart; the released code is right for one row only",
        "router weights start as every linear router here does, not as torch's linear layer",
    ),
)
