"""The gate of GShard: one or two experts a token, places counted by sequence, and its loss on first choices."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from moestro.core.bank import Bank
from moestro.core.context import RoutingContext
from moestro.core.errors import ContextError
from moestro.core.losses import RoutingLoss
from moestro.core.router import LinearRouter, choose_topk, topk_indices
from moestro.core.routing import Routing, Scores
from moestro.methods.train._parts.capacity import within_capacity
from moestro.methods.train._parts.selection import normalise


Policy = Literal["all", "none", "threshold", "random"]
Weight = Literal["normalised", "probability", "straight"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Settings; see the method for what they mean."""

    num_experts: int
    top_k: int
    weight: Weight
    capacity_factor: float | None
    eval_capacity_factor: float | None
    min_capacity: int
    second_policy: Policy
    eval_second_policy: Policy
    second_threshold: float


def places(count_B: Tensor, num_experts: int, factor: float, least: int) -> Tensor:
    """Places an expert has in sequences of ``count_B`` tokens: max(min(n, floor(n factor / E)), least), int64 [B]."""
    exact = Fraction(str(factor)) / num_experts
    share_B = count_B * exact.numerator // exact.denominator
    return torch.minimum(count_B, share_B).clamp(min=least)


def second_asked(weight_T: Tensor, policy: Policy, threshold: float) -> Tensor:
    """Whether a token asks its second expert at all, bool [T]; ``weight_T`` is that expert's share of the two."""
    if policy == "all":
        return torch.ones_like(weight_T, dtype=torch.bool)
    if policy == "none":
        return torch.zeros_like(weight_T, dtype=torch.bool)
    if policy == "threshold":
        return weight_T > threshold
    return torch.rand_like(weight_T) * threshold < weight_T  # with probability min(1, weight / threshold)


def served(
    expert_TK: Tensor, asked_TK: Tensor, row_T: Tensor, num_rows: int, num_experts: int, places_B: Tensor
) -> Tensor:
    """Which choices find a place, bool [T, K]: all first choices of a sequence come before its second ones."""
    index_N = asked_TK.T.reshape(-1).nonzero().squeeze(1)
    row_N = row_T.repeat(asked_TK.shape[1])[index_N]
    expert_N = expert_TK.T.reshape(-1)[index_N]
    kept_N = within_capacity(expert_N, row_N, num_rows, num_experts, places_B[row_N])
    flat = torch.zeros(asked_TK.numel(), dtype=torch.bool, device=asked_TK.device)
    return flat.index_put((index_N,), kept_N).view(asked_TK.shape[1], -1).T


class TopTwo(LinearRouter):
    """The router; with ``top_k`` 1 that of a switch layer. A second expert that a token does not ask is no assignment;
    one that had no place left is a dropped one.
    """

    def __init__(self, dim: int, gate: Gate) -> None:
        super().__init__(dim, gate.num_experts, top_k=gate.top_k)
        self.gate = gate
        self.causal = gate.capacity_factor is None and gate.eval_capacity_factor is None

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router."""
        logits_TC = self.logits(x_TD)
        probability_TC = logits_TC.softmax(-1)
        return Scores(logits_TC, probability_TC.detach(), probability_TC, probability_TC)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """See Router."""
        if self.gate.weight == "straight":
            return gate_TK / gate_TK.detach()  # 1, with the gradient of log p
        return normalise(gate_TK) if self.gate.weight == "normalised" else gate_TK

    def real_per_token(self, length: int) -> float | None:
        """See Router; known where nothing is dropped and the second expert is always or never asked."""
        gate = self.gate
        factor, policy = self._mode()
        if factor is not None or (gate.top_k == 2 and policy not in ("all", "none")):
            return None
        return 1 if policy == "none" else gate.top_k

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        gate, tokens = self.gate, ctx.tokens
        assert tokens is not None
        factor, policy = self._mode()
        expert_TK = choose_topk(scores.select_TC, gate.top_k)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        asked_TK = torch.ones_like(expert_TK, dtype=torch.bool)
        if gate.top_k == 2:
            share_T = normalise(scores.gate_TC.detach().gather(1, expert_TK))[:, 1]
            asked_TK[:, 1] = second_asked(share_T, policy, gate.second_threshold)
        kept_TK = None
        if factor is not None:
            count_B = torch.bincount(tokens.row_T[tokens.valid_T], minlength=tokens.num_rows)
            places_B = places(count_B, gate.num_experts, factor, gate.min_capacity)
            asking_TK = asked_TK & tokens.valid_T[:, None]
            kept_TK = served(expert_TK, asking_TK, tokens.row_T, tokens.num_rows, gate.num_experts, places_B)
        whole = Routing.from_topk(
            expert_TK,
            weight_TK,
            num_experts=gate.num_experts,
            scores=scores,
            causal=factor is None,
            kept_TK=kept_TK,
        )
        if gate.top_k == 1 or policy == "all":
            return whole
        asked_N = asked_TK.reshape(-1)
        return whole.replace(
            token_N=whole.token_N[asked_N],
            expert_N=whole.expert_N[asked_N],
            weight_N=whole.weight_N[asked_N],
            kept_N=None if whole.kept_N is None else whole.kept_N[asked_N],
            top_k=None,
        )

    def _mode(self) -> tuple[float | None, Policy]:
        """Capacity factor and policy in force."""
        gate = self.gate
        if self.training:
            return gate.capacity_factor, gate.second_policy
        return gate.eval_capacity_factor, gate.eval_second_policy


class FirstChoiceBalance(RoutingLoss):
    """E sum_e f_e P_e, f over first choices only.

    Args:
        balance: the loss over all choices; it says what f and P are means over.
    """

    def __init__(self, balance: RoutingLoss) -> None:
        super().__init__()
        self.balance = balance
        self.unit = balance.unit

    def forward(self, site: str, routing: Routing, ctx: RoutingContext) -> Tensor:
        """See RoutingLoss.

        Raises:
            ContextError: the routing carries no scores.
        """
        scores = routing.scores
        if scores is None:
            raise ContextError(f"{site}: a balance loss needs scores, this router gave none; take the loss out")
        first_TK = topk_indices(scores.select_TC, 1)
        weight_TK = torch.ones_like(first_TK, dtype=torch.float32)
        first = Routing.from_topk(first_TK, weight_TK, num_experts=routing.num_experts, scores=scores)
        total: Tensor = self.balance(site, first, ctx)
        return total
