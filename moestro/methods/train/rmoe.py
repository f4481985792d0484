"""RMoE: routers that remember what the routers below them saw, through a small recurrent cell over depth.

For mixture i = 1 .. L of a forward, its input x_i [T, D] and the state h_{i-1} [T, R] of the same tokens:

    x'_i     = x_i P_i^T                          P_i [R, D], one per layer; no bias, no activation
    h_i      = GRU(x'_i, h_{i-1}),  h_0 = 0       one cell, shared by all layers, saved once
    logits_i = h_i G_i^T                          G_i [E, R], one per layer
    p = softmax(logits_i), S = the k largest p, weight_n = p_n / sum of S         (or p_n without ``renormalise``)

with s = sigmoid(W_s x' + U_s h + b_s), z = sigmoid(W_z x' + U_z h + b_z), n = tanh(W_n x' + b_1 + s (U_n h + b_2)) and
h_i = (1 - z) n + z h_{i-1} in the cell. Experts see x_i. The recurrence runs over layers, never over the sequence: each
token starts at h_0 = 0 in every forward, so nothing of it enters a KV cache. The state keeps its gradient from layer to
layer, and dense layers let it pass. Inside ``ctx.subset`` the chosen tokens go on from their own state, and the others
keep theirs. The whole router computes in float32.

The paper's ablations are settings: ``pass_state=False`` (every layer starts at h_0), ``detach_state``,
``shared_projector`` (one P), ``cell`` (``rnn`` with tanh, ``lstm``), and ``cell="none"`` with ``residual_logits`` a:
logits_i = x'_i G_i^T + a logits_{i-1}. ``base="cosine"`` scores by cos(h_i M_i^T, G_n) / tau_i, as X-MoE does, with M_i
where ``embedding_size`` is given and a learned tau_i that starts at 0.3.

One global balance over the layers is ``train.balance_loss`` with ``layers="together"``; the default is one per layer.

Sources: RMoE (2408.06793, eq. 4 to 6; ablations of the recurrent router) and its released code, which has two different
matrices W_n and U_n in the candidate and renormalises the weights; cosine scores: X-MoE (2204.09179).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.router import LinearRouter, choose_topk, exact_linear
from moestro.core.routing import Routing, Scores
from moestro.core.site import Borrowed, Shared, Site
from moestro.core.tokens import Tokens
from moestro.methods.train._parts.selection import normalise, warn_if_dead


Kind = Literal["gru", "rnn", "lstm"]
CELLS: dict[Kind, Callable[[int, int], nn.RNNCellBase]] = {"gru": nn.GRUCell, "rnn": nn.RNNCell, "lstm": nn.LSTMCell}
SLOT = "rmoe_state"
TAU = 0.3


class Config(BaseConfig):
    """Settings; see the top of the file.

    Attributes:
        state_size: R. cell: what carries the state. pass_state: False starts every layer at h_0, with the same
            parameters and work. detach_state: cut the gradient between layers. shared_projector: one P for all layers
            of a width. residual_logits: a, with ``cell="none"``. base: how the state is scored. embedding_size: rows of
            M, for ``cosine``. renormalise: chosen weights sum to 1.
    """

    num_experts: int = Field(default=8, ge=1)
    top_k: int = Field(default=2, ge=1)
    state_size: int = Field(default=128, ge=1)
    cell: Literal["gru", "rnn", "lstm", "none"] = "gru"
    pass_state: bool = True
    detach_state: bool = False
    shared_projector: bool = False
    residual_logits: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    base: Literal["linear", "cosine"] = "linear"
    embedding_size: int | None = Field(default=None, ge=1)
    renormalise: bool = True

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} but num_experts={self.num_experts}")
        if self.detach_state and not self.pass_state:
            raise ConfigError("detach_state=True with pass_state=False; no state is passed, leave one of them out")
        if self.residual_logits and self.cell != "none":
            raise ConfigError(
                f"residual_logits={self.residual_logits} with cell={self.cell!r}; logits are passed on instead of a "
                "state, so set cell='none'"
            )
        if self.cell == "none" and not self.residual_logits:
            raise ConfigError(
                "cell='none' with residual_logits=0 passes nothing on; set residual_logits (the paper tries 0.5 and 1) "
                "or use train.softmax_topk"
            )
        if self.embedding_size is not None and self.base != "cosine":
            raise ConfigError(
                f"embedding_size={self.embedding_size} with base={self.base!r}; only base='cosine' has an embedding"
            )
        return self


def advance(kind: Kind, x_TR: Tensor, state_TX: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """The next state, [T, R]; for ``lstm`` [T, 2R]: its output, then its memory.

    Args:
        weights: W, U and their biases as PyTorch's cells keep them.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    if kind == "gru":
        return torch.gru_cell(x_TR, state_TX, w_ih, w_hh, b_ih, b_hh)
    if kind == "rnn":
        return torch.rnn_tanh_cell(x_TR, state_TX, w_ih, w_hh, b_ih, b_hh)
    hidden_TR, memory_TR = state_TX.chunk(2, dim=-1)
    return torch.cat(torch.lstm_cell(x_TR, [hidden_TR, memory_TR], w_ih, w_hh, b_ih, b_hh), dim=-1)


def cosine_logits(h_TR: Tensor, weight_CR: Tensor, log_tau: Tensor) -> Tensor:
    """cos(h, G_n) / tau [T, C] in float32; 0 for a state of 0, with bounded gradient there."""
    unit_TR = nn.functional.normalize(h_TR.float(), dim=-1, eps=1e-4)
    unit_CR = nn.functional.normalize(weight_CR.float(), dim=-1, eps=1e-4)
    return exact_linear(unit_TR, unit_CR) * torch.exp(-log_tau.float())


def places(part: Tokens, whole: Tokens) -> Tensor | None:
    """Where the tokens of ``part`` stand in ``whole``, int64 [T]; None when both are the same tokens in order.

    Raises:
        ContextError: some are not there, or row and position do not tell two tokens apart.
    """
    if part is whole or (torch.equal(part.row_T, whole.row_T) and torch.equal(part.position_T, whole.position_T)):
        return None
    if part.count > whole.count:
        raise ContextError(f"there are {part.count} tokens, the state has {whole.count}")
    span = int(whole.position_T.max()) + 1
    inside_T = part.position_T < span
    part_T, whole_T = ((one.row_T * span + one.position_T) * 2 + one.valid_T for one in (part, whole))
    key_T, order_T = torch.sort(whole_T, stable=True)
    at_T = torch.searchsorted(key_T, part_T).clamp(max=len(key_T) - 1)
    missing = int((~inside_T | (key_T[at_T] != part_T)).sum())
    if missing:
        raise ContextError(f"{missing} of {part.count} tokens are not among the {whole.count} of the state")
    if bool(((key_T[1:] == key_T[:-1]) & (key_T[1:] % 2 == 1)).any()):
        raise ContextError("two tokens of a row have one position, so that the states of a subset cannot be found")
    return order_T[at_T]


@dataclass(frozen=True, slots=True)
class Memory:
    """What a site hands on: ``state_TX`` of ``tokens``; ``maker`` says what kind of cell wrote it."""

    state_TX: Tensor
    tokens: Tokens
    maker: str


class Projector(nn.Module):
    """x' = x P^T in float32. Parameter ``weight`` [R, D]; no Linear, so that whoever quantises those leaves it alone.

    Args:
        dim: D. size: R.
    """

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim))
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, R]."""
        return exact_linear(x_TD, self.weight)


class SharedCell(nn.Module):
    """The cell of all layers: PyTorch's own parameters, float32 arithmetic, under autocast too.

    Attributes:
        kind: gru, rnn or lstm. size: R. width: of the state, R or 2R.
    """

    def __init__(self, kind: Kind, size: int) -> None:
        super().__init__()
        self.kind, self.size = kind, size
        self.width = 2 * size if kind == "lstm" else size
        self.cell = CELLS[kind](size, size)

    def forward(self, x_TR: Tensor, state_TX: Tensor | None) -> Tensor:
        """The next state of each token, [T, width] in float32; None is a state of zeros."""
        cell = self.cell
        weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        if state_TX is None:
            state_TX = x_TR.new_zeros(len(x_TR), self.width)
        with torch.autocast(x_TR.device.type, enabled=False):
            return advance(self.kind, x_TR, state_TX, tuple(weight.float() for weight in weights))


class RecurrentRouter(LinearRouter):
    """The router. ``weight`` is G [E, R]; P is its own unless it is shared, the cell always is.

    Args:
        site: its place, which names its slot. dim: D. shared: gives the parts that all layers use.
    """

    def __init__(self, site: str, dim: int, config: Config, shared: Shared) -> None:
        size, kind = config.state_size, config.cell
        super().__init__(config.embedding_size or size, config.num_experts, top_k=config.top_k)
        self.config = config
        self.site = site
        self.projector: Projector | Borrowed
        if config.shared_projector:
            self.projector = Borrowed(shared(f"rmoe_projector_{dim}_{size}", lambda: Projector(dim, size)))
        else:
            self.projector = Projector(dim, size)
        self.cell: Borrowed | None = None
        if kind != "none":
            self.cell = Borrowed(shared(f"rmoe_{kind}_{size}", lambda: SharedCell(kind, size)))
        self.embedding: Projector | None = None
        self.log_tau: nn.Parameter | None = None
        if config.base == "cosine":
            self.log_tau = nn.Parameter(torch.full((1,), math.log(TAU)))
            if config.embedding_size is not None:
                self.embedding = Projector(config.state_size, config.embedding_size)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Logits [T, C] in float32 of states [T, R]."""
        if self.log_tau is None:
            return super().logits(x_TD)
        return cosine_logits(x_TD if self.embedding is None else self.embedding(x_TD), self.weight, self.log_tau)

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router.

        Raises:
            ContextError: the state that arrives is of other tokens, or of another kind or size than this router's.
        """
        tokens = ctx.tokens_for(x_TD)
        memory: Memory | None = ctx.previous(self.site, SLOT) if self.config.pass_state else None
        before_TX, at_T = (None, None) if memory is None else self.receive(memory, tokens)
        x_TR = self.projector(x_TD)
        if self.cell is None:
            logits_TC = self.logits(x_TR)
            if before_TX is not None:
                logits_TC = logits_TC + self.config.residual_logits * before_TX
            state_TX = logits_TC
        else:
            state_TX = self.cell(x_TR, before_TX)
            logits_TC = self.logits(state_TX[:, : self.config.state_size])
        if self.config.pass_state:
            if memory is not None and at_T is not None:
                state_TX, tokens = memory.state_TX.index_copy(0, at_T, state_TX), memory.tokens
            ctx.put(self.site, SLOT, Memory(state_TX, tokens, self.config.cell))
        probability_TC = logits_TC.softmax(-1)
        return Scores(logits_TC, probability_TC.detach(), probability_TC, probability_TC)

    def receive(self, memory: Memory, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The state of ``tokens`` and where they stand among those of the memory, None when they are the same."""
        width = self.num_choices if self.cell is None else self.cell.module.width
        found = memory.state_TX.shape[1]
        if (memory.maker, found) != (self.config.cell, width):
            raise ContextError(
                f"{self.site}: a state of {found} values by cell {memory.maker!r} arrives, but this router has cell "
                f"{self.config.cell!r} with {width}; give all recurrent routers of a stack the same cell and sizes"
            )
        try:
            at_T = places(tokens, memory.tokens)
        except ContextError as error:
            raise ContextError(
                f"{self.site}: {error}; each token must have passed the recurrent routers below, or start anew here "
                "with pass_state=False"
            ) from None
        state_TX = memory.state_TX if at_T is None else memory.state_TX[at_T]
        return state_TX.detach() if self.config.detach_state else state_TX, at_T

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        expert_TK = choose_topk(scores.select_TC, self.config.top_k)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        return Routing.from_topk(expert_TK, weight_TK, num_experts=self.num_experts, scores=scores)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """See Router."""
        return normalise(gate_TK) if self.config.renormalise else gate_TK


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a mixture whose input is as wide as the site's; the cell comes from ``shared``."""
    warn_if_dead(config.top_k, config.renormalise, "train.rmoe")
    return RecurrentRouter(site.path, site.dim, config, shared)


CARD = MethodCard(
    title="Layerwise Recurrent Router for Mixture-of-Experts",
    year=2024,
    arxiv="2408.06793",
    paper="rmoe",
    summary="A GRU shared by all layers hands each token's router state up, so routers know the routing below.",
    taxonomy="gating/sparse/token-choice",
    deviations=(
        "residual logits are added to the logits of the projected input, without a cell",
        "the balance loss is per layer unless it is asked to take all layers together, as the released code does",
    ),
)
