"""What a router says: scores for every choice, then a flat list of assignments.

One flat type carries every kind of routing: top-k (the same number of experts for each token), top-p (ragged), null
experts (a slot that costs nothing), expert choice (experts pick tokens), modality groups and depth routing.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moestro.core.errors import ContextError


@dataclass(frozen=True, slots=True)
class Scores:
    """What a router thinks of each choice before it chooses. C = num_experts + num_null.

    Attributes:
        logits_TC: raw scores, float32, before noise, bias and softmax; losses and monitors read these.
        select_TC: what is ranked. Higher wins; -inf means "may not be chosen".
        gate_TC: what a chosen pair would weigh before ``Router.weigh`` (renormalisation, scaling).
        prob_TC: probabilities in this router's own sense, summing to 1 over C; None means softmax(logits).
    """

    logits_TC: Tensor
    select_TC: Tensor
    gate_TC: Tensor
    prob_TC: Tensor | None = None

    def probabilities(self) -> Tensor:
        """P [T, C] as balance losses and entropies read it."""
        return self.logits_TC.softmax(-1) if self.prob_TC is None else self.prob_TC

    def replace(self, **changes: Tensor) -> "Scores":
        """A copy with some tensors exchanged."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Routing:
    """Who computes what: assignment n sends token ``token_N[n]`` to expert ``expert_N[n]`` with ``weight_N[n]``.

    Attributes:
        token_N: int64, index into the T tokens of this forward.
        expert_N: int64. 0 .. num_experts - 1 are real; num_experts .. num_experts + num_null - 1 are nulls.
        weight_N: floating, carries gradient to the router.
        num_tokens: T.
        num_experts: E.
        num_null: null experts: they count in losses and traces and cost nothing.
        scores: the scores behind the choice, if there are any.
        causal: False when a choice read later tokens or the whole batch; reports carry the mark.
        top_k: K if every token has exactly K assignments stored token by token, else None.
        kept_N: bool, False where capacity dropped an assignment; None when nothing was dropped. A dropped assignment
            counts as demand in losses and never reaches an expert.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    num_tokens: int
    num_experts: int
    num_null: int = 0
    scores: Scores | None = None
    causal: bool = True
    top_k: int | None = None
    kept_N: Tensor | None = None

    def __post_init__(self) -> None:
        count = self.token_N.numel()
        if self.expert_N.numel() != count or self.weight_N.numel() != count:
            raise ContextError(
                f"routing has {count} tokens, {self.expert_N.numel()} experts and {self.weight_N.numel()} weights; "
                "the three lists must have one entry per assignment"
            )
        if self.top_k is not None and count != self.top_k * self.num_tokens:
            raise ContextError(
                f"routing says top_k={self.top_k} for {self.num_tokens} tokens but holds {count} assignments"
            )

    @classmethod
    def from_topk(
        cls,
        expert_TK: Tensor,
        weight_TK: Tensor,
        *,
        num_experts: int,
        num_null: int = 0,
        scores: Scores | None = None,
        causal: bool = True,
        kept_TK: Tensor | None = None,
    ) -> "Routing":
        """Routing with K experts for each token.

        Args:
            expert_TK: int64 expert ids. weight_TK: weights, same shape. kept_TK: bool, see ``kept_N``.
        """
        num_tokens, top_k = expert_TK.shape
        token_N = torch.arange(num_tokens, device=expert_TK.device).repeat_interleave(top_k)
        kept_N = None if kept_TK is None else kept_TK.reshape(-1)
        return cls(
            token_N,
            expert_TK.reshape(-1),
            weight_TK.reshape(-1),
            num_tokens,
            num_experts,
            num_null,
            scores,
            causal,
            top_k,
            kept_N,
        )

    @classmethod
    def from_mask(
        cls,
        chosen_TC: Tensor,
        weight_TC: Tensor,
        *,
        num_experts: int,
        num_null: int = 0,
        scores: Scores | None = None,
        causal: bool = True,
    ) -> "Routing":
        """Ragged routing: every True of ``chosen_TC`` is an assignment weighted by ``weight_TC`` there."""
        token_N, expert_N = chosen_TC.nonzero(as_tuple=True)
        weight_N = weight_TC[token_N, expert_N]
        return cls(
            token_N,
            expert_N,
            weight_N,
            chosen_TC.shape[0],
            num_experts,
            num_null,
            scores=scores,
            causal=causal,
        )

    @property
    def num_choices(self) -> int:
        """C: real and null experts."""
        return self.num_experts + self.num_null

    @property
    def expert_TK(self) -> Tensor:
        """Expert ids as [T, K]. Raises ContextError for a ragged routing."""
        return self.expert_N.view(self.num_tokens, self._k())

    @property
    def weight_TK(self) -> Tensor:
        """Weights as [T, K]. Raises ContextError for a ragged routing."""
        return self.weight_N.view(self.num_tokens, self._k())

    def _k(self) -> int:
        if self.top_k is None:
            raise ContextError("this routing is ragged: it has no [T, K] view; read token_N, expert_N, weight_N")
        return self.top_k

    def real(self) -> "Routing":
        """Only what experts must compute: nulls and dropped assignments are gone. Self when there are none."""
        if self.num_null == 0 and self.kept_N is None:
            return self
        live_N = self.expert_N < self.num_experts
        if self.kept_N is not None:
            live_N = live_N & self.kept_N
        return Routing(
            self.token_N[live_N],
            self.expert_N[live_N],
            self.weight_N[live_N],
            self.num_tokens,
            self.num_experts,
            scores=self.scores,
            causal=self.causal,
        )

    def without(self, drop_TK: Tensor, weigh: Callable[[Tensor], Tensor]) -> "Routing":
        """Drop assignments of a top-k routing; tokens that lose some weigh the others anew, the rest are as they were.

        Args:
            drop_TK: bool. weigh: weights of chosen pairs from their gates, ``Router.weigh``.

        Raises:
            ContextError: a ragged routing, one without scores, or a token that would lose all.
        """
        if self.scores is None:
            raise ContextError("assignments can be dropped from a routing with scores only")
        if drop_TK.all(1).any():
            raise ContextError(f"token {int(drop_TK.all(1).nonzero()[0])} would lose all of its experts")
        if not drop_TK.any():
            return self
        gate_TK = self.scores.gate_TC.gather(1, self.expert_TK)
        weight_TK = self.weight_TK.masked_fill(drop_TK, 0)
        first_TK = torch.sort(drop_TK.to(torch.uint8), dim=1, stable=True).indices
        count_T = (~drop_TK).sum(1)
        for count in sorted(set(count_T.tolist()) - {drop_TK.shape[1]}):
            rows = (count_T == count).nonzero()
            kept = first_TK[rows[:, 0], :count]
            weight_TK[rows, kept] = weigh(gate_TK[rows, kept]).to(weight_TK.dtype)
        kept_N = ~drop_TK.reshape(-1)
        return self.replace(
            weight_N=weight_TK.reshape(-1), kept_N=kept_N if self.kept_N is None else kept_N & self.kept_N
        )

    def counts_C(self, valid_T: Tensor | None = None) -> Tensor:
        """Assignments per choice, int64 [C], dropped ones included; tokens with valid_T False do not count."""
        expert_N = self.expert_N if valid_T is None else self.expert_N[valid_T[self.token_N]]
        return torch.bincount(expert_N, minlength=self.num_choices)

    def replace(self, **changes: object) -> "Routing":
        """A copy with some fields exchanged, checked like a new one."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
