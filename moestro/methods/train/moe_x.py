"""MoE-X: experts whose hidden units can be read, and a router that asks the experts' own weights.

An expert with rows w_1 .. w_I of its first matrix and biases b_i activates unit i for token x if w_i.x + b_i > 0. With
the rows seen as draws from a Gaussian of mean mu_j and variance v_j by coordinate, both [D] and taken over the rows of
expert j, a unit's pre-activation is about N(m_j, s_j^2):

    m_j   = mu_j . x + mean_i b_i            the exact mean of the pre-activations
    s_j^2 = v_j . (x * x) + var_i b_i        their variance, if coordinates were uncorrelated over the rows
    z_j   = -erf(m_j / sqrt(2 (s_j^2 + eps)))

so that I (1 - z_j) / 2 units are expected to be positive: the k largest z are the experts expected to be sparsest.
weight = softmax of z over the chosen. The router has no weights of its own; 2 D E multiply-adds replace D E.

With ReLU experts y = sum_j w_j W_down[j] relu(W_up[j] x) is one wide layer. Its code, all w_j relu(W_up[j] x) in a row
[E I], is exactly 0 outside the chosen experts and sparse inside them. ``expert_size`` builds that layer; left open, the
router alone, for any mixture. Of gated experts it reads the gate, whose sign decides over a ReLU unit.

Source: MoE-X (2503.07639). Deviations: see the card at the end.
"""

import logging
import weakref
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moestro.core.bank import Bank, HeterogeneousBank, StackedFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.cost import Work
from moestro.core.errors import ConfigError, NonFiniteError
from moestro.core.plan import MethodUse
from moestro.core.registry import method
from moestro.core.router import Router, choose_topk
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.selection import warn_if_dead


_Mark = tuple["weakref.ref[Tensor]", tuple[Any, ...]]


class Config(BaseConfig):
    """Settings.

    Attributes:
        detach_stats: keep routing gradients away from the experts' weights; they still reach the token.
        eps: added to the variance. expert_size: I, inner width of the ReLU experts; None builds the router alone.
        bias: whether those experts have biases. losses: name -> loss method, of that layer.
    """

    num_experts: int = Field(default=8, ge=1)
    top_k: int = Field(default=2, ge=1)
    detach_stats: bool = False
    eps: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    expert_size: int | None = Field(default=None, ge=2)
    bias: bool = False
    losses: dict[str, MethodUse] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} but num_experts={self.num_experts}; a token needs as many experts")
        if self.expert_size is None and (self.bias or self.losses is not None):
            raise ConfigError("bias and losses belong to experts; give expert_size, or leave them to the mixture")
        return self


class Moments(NamedTuple):
    """Mean and variance over the rows of each expert: of the weights [E, D], and of the biases [E] (0 without)."""

    mean_ED: Tensor
    variance_ED: Tensor
    mean_E: Tensor
    variance_E: Tensor


class RowMoments(torch.autograd.Function):
    """Mean and variance over I of rows [E, I, D], both [E, D]; one pass over the rows forward and one backward."""

    @staticmethod
    def forward(ctx: Any, rows_EID: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        mean_ED = rows_EID.mean(1)
        variance_ED = torch.empty_like(mean_ED)
        for expert, rows_ID in enumerate(rows_EID):  # one by one: the centred copy stays in the processor's cache
            centred_ID = rows_ID - mean_ED[expert]
            variance_ED[expert] = torch.linalg.vecdot(centred_ID, centred_ID, dim=0) / len(rows_ID)
        ctx.save_for_backward(rows_EID, mean_ED)
        return mean_ED, variance_ED

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mean_grad_ED: Tensor, variance_grad_ED: Tensor) -> Tensor:
        """(dL/dmu + 2 (w - mu) dL/dv) / I for every row w."""
        rows_EID, mean_ED = ctx.saved_tensors
        slope_ED = variance_grad_ED * (2 / rows_EID.shape[1])
        offset_ED = mean_grad_ED / rows_EID.shape[1] - slope_ED * mean_ED
        return torch.addcmul(offset_ED.unsqueeze(1), rows_EID, slope_ED.unsqueeze(1))


def moments(rows_EID: Tensor, bias_EI: Tensor | None = None) -> Moments:
    """Moments of experts, in float32 whatever the type of the rows: squares of small bfloat16 weights underflow.

    Raises:
        ConfigError: I is 1, which has no variance.
    """
    if rows_EID.shape[1] < 2:
        raise ConfigError("train.moe_x needs experts of at least 2 inner units: a single one has no variance")
    with torch.autocast(rows_EID.device.type, enabled=False):
        mean_ED, variance_ED = RowMoments.apply(rows_EID.float())  # type: ignore[no-untyped-call]
        if bias_EI is None:
            bias_EI = rows_EID.new_zeros(len(rows_EID), 1)
        return Moments(mean_ED, variance_ED, bias_EI.float().mean(1), bias_EI.float().var(1, correction=0))


def sparsity_scores(x_TD: Tensor, found: Moments, eps: float) -> Tensor:
    """z [T, E] in [-1, 1], float32: 1 when no unit is expected to be positive, -1 when all are; 0 for x = 0, b = 0."""
    with torch.autocast(x_TD.device.type, enabled=False):
        x_TD = x_TD.float()
        mean_TE = nn.functional.linear(x_TD, found.mean_ED, found.mean_E)
        variance_TE = nn.functional.linear(x_TD * x_TD, found.variance_ED, found.variance_E)
        return -torch.erf(mean_TE * torch.rsqrt(2 * (variance_TE + eps)))


def moments_of(bank: Bank) -> Moments:
    """The moments of every expert of a bank, with gradient to its weights.

    Raises:
        ConfigError: experts of a single unit, or a bank whose experts have no first matrix to read.
    """
    if isinstance(bank, StackedFFN):
        rows_EID, bias_EI = bank.stacked("gate" if bank.gated else "up"), bank.up_bias
        assert rows_EID is not None
        return moments(rows_EID, None if bias_EI is None else bias_EI[:, : bank.inner])
    if isinstance(bank, HeterogeneousBank):
        parts = [moments_of(part) for part in bank.parts if isinstance(part, Bank)]
    else:
        if (name := next((name for name in ("gate", "up") if name in bank.projections), None)) is None:
            raise ConfigError(
                f"train.moe_x reads the first matrix of experts; those of {type(bank).__name__} have none"
            )
        parts = [moments(bank.weight(expert, name).unsqueeze(0)) for expert in range(bank.num_experts)]
    return Moments(*(torch.cat(column) for column in zip(*parts, strict=True)))


class SparsityRouter(Router):
    """The router. It holds neither parameters nor buffers; the moments are taken anew in every forward.

    In evaluation without gradients they are remembered until the weights' version changes (writes through ``.data``
    change none) or ``train``/``eval`` is called.
    """

    def __init__(self, config: Config, dim: int, where: str = "") -> None:
        super().__init__(config.num_experts, top_k=config.top_k)
        self.config = config
        self.dim = dim
        self.where = where
        self._compared = False
        self._remembered: tuple[list[_Mark], Moments] | None = None

    def train(self, mode: bool = True) -> "SparsityRouter":
        """See torch.nn.Module."""
        self._remembered = None
        return super().train(mode)

    def flops_per_token(self, work: Work) -> float:
        """Operations for one token: products with means and with variances; taking these is no matrix product."""
        return 4.0 * self.dim * self.num_experts

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what is remembered: a copy has weights of its own."""
        return {**self.__dict__, "_remembered": None}

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router.

        Raises:
            ConfigError: the bank does not hold this router's experts, or they do not take rows like ``x_TD``.
            NonFiniteError: a token that is no padding, or an expert's matrix, holds a NaN or an infinity.
        """
        found = self._moments(bank)
        if found.mean_ED.shape[1] != x_TD.shape[1]:
            raise ConfigError(
                f"{self.where}: train.moe_x holds the experts' rows against the site's input, but they are "
                f"{found.mean_ED.shape[1]} wide and it is {x_TD.shape[1]}; behind a projection use another router"
            )
        logits_TC = sparsity_scores(x_TD, found, self.config.eps)
        self._check_finite(x_TD, logits_TC, ctx)
        return Scores(logits_TC, logits_TC.detach(), logits_TC)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        expert_TK = choose_topk(scores.select_TC, self.config.top_k)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        return Routing.from_topk(expert_TK, weight_TK, num_experts=self.num_experts, scores=scores)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """See Router."""
        return gate_TK.softmax(-1)

    def _moments(self, bank: Bank) -> Moments:
        if bank.num_experts != self.num_experts:
            raise ConfigError(
                f"{self.where}: train.moe_x scores {self.num_experts} experts by their weights, but the bank here "
                f"holds {bank.num_experts}; merged experts need a new router, experts on other ranks another one"
            )
        if torch.is_grad_enabled() and not self.config.detach_stats:
            return self._watched(moments_of(bank))
        marks = [] if self.training or not isinstance(bank, StackedFFN) else _marks(bank)
        if marks and self._remembered is not None and _same(marks, self._remembered[0]):
            return self._remembered[1]
        with torch.no_grad():
            found = self._watched(moments_of(bank))
        self._remembered = (marks, found) if marks else None
        return found

    def _watched(self, found: Moments) -> Moments:
        """Say once that experts are equal: their scores tie, and every token goes to the first ones."""
        if not self._compared:
            self._compared = True
            if self.num_experts > self.config.top_k and bool((found.mean_ED == found.mean_ED[0]).all()):
                logging.getLogger("moestro").warning(
                    "%s: train.moe_x cannot tell %d equal experts apart, so all tokens go to the first %d; upcycle "
                    "with noise=0.01",
                    self.where,
                    self.num_experts,
                    self.config.top_k,
                )
        return found

    def _check_finite(self, x_TD: Tensor, logits_TC: Tensor, ctx: RoutingContext) -> None:
        odd_TC = ~logits_TC.detach().isfinite()
        if ctx.tokens is not None:
            odd_TC = odd_TC & ctx.tokens.valid_T[:, None]
        if not odd_TC.any():
            return
        odd_T = odd_TC.any(1) & ~x_TD.isfinite().all(1)
        if odd_T.any():
            raise NonFiniteError(
                f"{self.where}: the router's input holds a NaN or an infinity in {int(odd_T.sum())} of {len(odd_T)} "
                f"tokens, first in token {int(odd_T.nonzero()[0, 0])}; look at the layer before"
            )
        raise NonFiniteError(
            f"{self.where}: the first matrix of expert {int(odd_TC.any(0).nonzero()[0, 0])} holds a NaN or an "
            "infinity, or is too large to square; go back to a checkpoint and lower the learning rate"
        )


def _marks(bank: StackedFFN) -> list[_Mark]:
    """What changes when the tensors do that the moments are taken of; empty when that cannot be told."""
    tensors = [t for t in (bank.up_weight, bank.up_bias) if t is not None]
    if any(tensor.is_inference() for tensor in tensors):
        return []
    return [(weakref.ref(t), (t._version, t.data_ptr(), t.dtype)) for t in tensors]


def _same(one: list[_Mark], two: list[_Mark]) -> bool:
    return [mark for _, mark in one] == [mark for _, mark in two] and all(
        a() is b() for (a, _), (b, _) in zip(one, two, strict=True)
    )


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a mixture, or with ``expert_size`` the mixture with ReLU experts and a balance loss."""
    if config.expert_size is None:
        warn_if_dead(config.top_k, True, "train.moe_x")
        where = site.path if site.layer is None else f"{site.path} (layer {site.layer})"
        return SparsityRouter(config, site.dim, where)
    balance = {"balance": MethodUse(method="train.balance_loss")}
    settings = {
        "num_experts": config.num_experts,
        "expert_size": config.expert_size,
        "activation": "relu",
        "gated": False,
        "bias": config.bias,
        "router": {"method": "train.moe_x", "config": config.model_dump(include={"top_k", "detach_stats", "eps"})},
        "losses": balance if config.losses is None else config.losses,
    }
    built: nn.Module = method("train.moe").build(site, method("train.moe").configure(settings), shared)
    return built


CARD = MethodCard(
    title="Mixture of Experts Made Intrinsically Interpretable",
    year=2025,
    arxiv="2503.07639",
    paper="moe-x",
    summary="ReLU experts, and a router that reads from their weights which of them will be sparsest for a token.",
    taxonomy="experts/activation/relu",
    deviations=(
        "the score is derived from the Gaussian model of the rows, the paper's released code not being available",
        "biases of the experts enter mean and variance",
        "gated experts are scored by their gate",
    ),
)
