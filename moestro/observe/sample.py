"""Experts run apart from the model's forward: one assignment at a time, all on one token, and a sample of tokens to
weigh what a block would answer with fewer experts.
"""

import zlib
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from moestro.core.bank import Bank
from moestro.core.context import RoutingContext
from moestro.core.errors import PlanError
from moestro.core.remap import RemapRouter
from moestro.core.router import Router
from moestro.core.routing import Routing, Scores
from moestro.core.session import Session


_CHUNK: Final = 4096  # rows of one bank call


def one_by_one(bank: Bank, x_TD: Tensor, routing: Routing) -> Iterator[tuple[Routing, Tensor]]:
    """The unweighted output f_e(x) of every assignment on its own.

    Yields:
        (the assignments of a chunk, their outputs [n, O]).
    """
    for start in range(0, routing.token_N.numel(), _CHUNK):
        at = slice(start, start + _CHUNK)
        part = routing.replace(
            token_N=routing.token_N[at], expert_N=routing.expert_N[at], weight_N=routing.weight_N[at],
            kept_N=None, top_k=None,
        )  # fmt: skip
        count = part.token_N.numel()
        alone = Routing(
            torch.arange(count, device=x_TD.device),
            part.expert_N,
            torch.ones_like(part.weight_N),
            count,
            routing.num_experts,
            top_k=1,
        )
        # not bank(...): the hook that asked must not see this call
        yield part, bank.forward(x_TD[part.token_N], alone)


def every_expert(bank: Bank, x_TD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The unweighted outputs of all experts for each row.

    Yields:
        (the rows of a chunk, their outputs [t, E, O]).
    """
    experts = bank.num_experts
    step = max(1, _CHUNK // experts)
    for start in range(0, len(x_TD), step):
        rows_TD = x_TD[start : start + step]
        count = len(rows_TD) * experts
        token_N = torch.arange(len(rows_TD), device=x_TD.device).repeat_interleave(experts)
        expert_N = torch.arange(experts, device=x_TD.device).repeat(len(rows_TD))
        weight_N = torch.ones(count, device=x_TD.device)
        each = Routing(token_N, expert_N, weight_N, len(rows_TD), experts, top_k=experts)
        y_NO = torch.cat([y_NO for _, y_NO in one_by_one(bank, rows_TD, each)])
        yield slice(start, start + len(rows_TD)), y_NO.view(len(rows_TD), experts, -1)


class BlockSample:
    """Some tokens of a layer, drawn alike from all batches, with what a choice among fewer experts would make of them.

    With F_t [E, O] the outputs of all experts for token t and w_t [E] its weights, two choices differ in the block's
    output by |F_t^T (w_t - w'_t)|^2 = (w - w')^T G_t (w - w'), G_t = F_t F_t^T: the outputs themselves are not kept.

    Attributes:
        size: tokens at most. input_TD: what the experts are given, float32. gram_TEE: G_t, float32.
        weight_TE: weights of the natural choice, float32. scores: of the sampled tokens.
    """

    def __init__(self, router: Router, size: int) -> None:
        self.router, self.size = router, size
        experts = router.num_experts
        self.input_TD = torch.zeros(0, 0)
        self.gram_TEE = torch.zeros(0, experts, experts)
        self.weight_TE = torch.zeros(0, experts)
        self.scores: Scores | None = None
        self._key_T = torch.zeros(0, dtype=torch.float64)
        self._draw: torch.Generator | None = None

    @torch.no_grad()
    def take(self, site: str, bank: Bank, x_TD: Tensor, routing: Routing, valid_T: Tensor) -> None:
        """Let a batch's tokens into the sample: each gets a random key, and the smallest keys stay."""
        if self._draw is None:
            self._draw = torch.Generator().manual_seed(zlib.crc32(site.encode()))
        valid = valid_T.nonzero().squeeze(1).cpu()
        key_T = torch.rand(len(valid), generator=self._draw, dtype=torch.float64)
        best = torch.argsort(torch.cat([self._key_T, key_T]), stable=True)[: self.size]
        old, new = best[best < len(self._key_T)], best[best >= len(self._key_T)] - len(self._key_T)
        at = valid[new].to(x_TD.device)
        fresh_TEO = [y_TEO.float() for _, y_TEO in every_expert(bank, x_TD[at])]
        fresh_TEE = [(y_TEO @ y_TEO.transpose(1, 2)).cpu() for y_TEO in fresh_TEO]
        x_TD = x_TD[at].float().cpu()
        self.input_TD = torch.cat([self.input_TD[old], x_TD]) if self.input_TD.numel() else x_TD
        self.gram_TEE = torch.cat([self.gram_TEE[old], *fresh_TEE])
        self.weight_TE = torch.cat([self.weight_TE[old], weights_TE(routing)[at].cpu()])
        self._key_T = torch.cat([self._key_T[old], key_T[new]])
        if routing.scores is not None:
            self.scores = _rows(self.scores, old, routing.scores, at)

    def merge(self, other: "BlockSample") -> None:
        """Join another run's sample of the same layer."""
        if not len(other._key_T):
            return
        best = torch.argsort(torch.cat([self._key_T, other._key_T]), stable=True)[: self.size]
        if other.scores is not None:
            every = _rows(self.scores, torch.arange(len(self._key_T)), other.scores, torch.arange(len(other._key_T)))
            self.scores = _rows(None, best, every, best)
        inputs = [part.input_TD for part in (self, other) if part.input_TD.numel()]
        self.input_TD = torch.cat(inputs)[best]
        self.gram_TEE = torch.cat([self.gram_TEE, other.gram_TEE])[best]
        self.weight_TE = torch.cat([self.weight_TE, other.weight_TE])[best]
        self._key_T = torch.cat([self._key_T, other._key_T])[best]

    @torch.no_grad()
    def weights_of(self, kept_E: Tensor) -> Tensor:
        """Weights [T, E] if only the experts where ``kept_E`` (bool) is True were there.

        The router's own choice with the others closed. Gates that share a sum of 1 over all experts share it over those
        that are left, which is what a softmax over fewer rows gives.

        Raises:
            PlanError: a router that gives no scores, that closes groups of choices to a token, or whose choices were
                renamed.
        """
        if self.scores is None or isinstance(self.router, RemapRouter):
            raise PlanError(f"a {type(self.router).__name__} cannot be asked to choose again among fewer experts")
        if bool(torch.isneginf(self.scores.select_TC).any()):
            raise PlanError(
                f"a {type(self.router).__name__} that closes groups of choices cannot be asked to choose again among "
                "fewer experts: which groups it would keep is not in its scores"
            )
        closed_C = torch.zeros(self.router.num_choices, dtype=torch.bool)
        closed_C[: len(kept_E)] = ~kept_E
        gate_TC = self.scores.gate_TC
        if bool((gate_TC >= 0).all()) and torch.allclose(gate_TC.sum(-1), torch.ones(len(gate_TC)), atol=1e-4):
            left_T = gate_TC.masked_fill(closed_C, 0.0).sum(-1, keepdim=True)
            gate_TC = gate_TC / left_T.clamp(min=torch.finfo(gate_TC.dtype).tiny)
        select_TC = self.scores.select_TC.masked_fill(closed_C, float("-inf"))
        scores = Scores(self.scores.logits_TC, select_TC, gate_TC)
        return weights_TE(self.router.choose(scores, RoutingContext("sample", Session())))

    def error_of(self, kept_E: Tensor) -> float:
        """Sum over the sampled tokens of the squared change of the block's output with only these experts."""
        away_TE = self.weight_TE - self.weights_of(kept_E)
        return float(torch.einsum("te,tef,tf->", away_TE, self.gram_TEE, away_TE))


def weights_TE(routing: Routing) -> Tensor:
    """Weights as a table [T, E], float32; 0 where an expert does not run."""
    real = routing.real()
    table = torch.zeros(real.num_tokens, real.num_experts, device=real.weight_N.device)
    return table.index_put((real.token_N, real.expert_N), real.weight_N.float(), accumulate=True)


def _rows(before: Scores | None, old: Tensor, scores: Scores, at: Tensor) -> Scores:
    """Rows ``old`` of what was there, then rows ``at`` of new scores."""

    def join(name: str) -> Tensor:
        new = getattr(scores, name)[at].detach().cpu()
        return new if before is None else torch.cat([getattr(before, name)[old], new])

    return Scores(join("logits_TC"), join("select_TC"), join("gate_TC"))
