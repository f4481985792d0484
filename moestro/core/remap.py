"""A router whose choices are renamed: what is left of a router after its experts were merged."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moestro.core.bank import Bank
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError
from moestro.core.router import Router
from moestro.core.routing import Routing, Scores


class RemapRouter(Router):
    """A choice of old expert i becomes a choice of expert ``remap[i]``; nulls stay nulls.

    Choices of one token that meet on an expert are added, so that the expert runs once; the routing is ragged then.
    Scores are grouped for losses and monitors: logits by log-sum-exp, gates and probabilities by sum, selection scores
    by maximum.

    Args:
        inner: the router of the old experts. remap: for each old expert the new one.

    Raises:
        ConfigError: not one entry for each old expert, or a new expert that nothing leads to.

    Source: the merged routing of MC-SMoE (2310.01334, section 3.2), with duplicates of top-k run once.
    """

    remap: Tensor

    def __init__(self, inner: Router, remap: Sequence[int]) -> None:
        if len(remap) != inner.num_experts:
            raise ConfigError(f"remap has {len(remap)} entries for a router of {inner.num_experts} experts")
        count = max(remap) + 1
        if sorted(set(remap)) != list(range(count)):
            raise ConfigError(f"remap={list(remap)} must use every expert from 0 to {count - 1}")
        super().__init__(count, top_k=None, num_null=inner.num_null)
        self.inner = inner
        self.mapping = list(remap)
        self.causal = inner.causal
        nulls = range(count, count + inner.num_null)
        self.register_buffer("remap", torch.tensor([*remap, *nulls]), persistent=False)

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """The inner router's scores, of the old choices: edits see what the router thinks."""
        return self.inner.score(x_TD, bank, ctx)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """The inner router's routing under the new names."""
        old = self.inner.choose(scores, ctx)
        expert_N = self.remap[old.expert_N]
        key_N = old.token_N * self.num_choices + expert_N
        if old.kept_N is not None:
            key_N = key_N * 2 + old.kept_N
        unique_G, group_N = torch.unique(key_N, return_inverse=True)
        places_N = torch.arange(len(key_N), device=key_N.device)
        first_G = torch.full_like(unique_G, len(key_N)).scatter_reduce(0, group_N, places_N, "amin")
        weight_G = old.weight_N.new_zeros(len(first_G)).index_add(0, group_N, old.weight_N)
        order_G = torch.argsort(first_G)  # by place of the first of each group: slots stay in order within a token
        first_G, weight_G = first_G[order_G], weight_G[order_G]
        return Routing(
            old.token_N[first_G],
            expert_N[first_G],
            weight_G,
            old.num_tokens,
            self.num_experts,
            self.num_null,
            scores=self._grouped(old.scores or scores),
            causal=old.causal,
            kept_N=None if old.kept_N is None else old.kept_N[first_G],
        )

    def real_per_token(self, length: int) -> float | None:
        """None: how many choices of a token meet on an expert depends on the token."""
        return None

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """See Router."""
        return self.inner.weigh(gate_TK)

    def after_step(self, load_C: Tensor) -> None:
        """Old experts share the load of the expert they became, in equal parts."""
        members_C = torch.bincount(self.remap, minlength=len(load_C)).to(load_C.device)
        self.inner.after_step((load_C / members_C)[self.remap.to(load_C.device)])

    def _grouped(self, scores: Scores) -> Scores:
        """Scores of the new choices."""
        shape = (scores.logits_TC.shape[0], self.num_choices)
        index_TC = self.remap.expand(shape[0], -1)

        def total(old_TC: Tensor) -> Tensor:
            return old_TC.new_zeros(shape).scatter_add(1, index_TC, old_TC)

        top_TC = scores.logits_TC.new_full(shape, float("-inf"))
        top_TC = top_TC.scatter_reduce(1, index_TC, scores.logits_TC.detach(), "amax")
        logits_TC = top_TC + total((scores.logits_TC - top_TC.gather(1, index_TC)).exp()).log()
        select_TC = scores.select_TC.new_full(shape, float("-inf"))
        select_TC = select_TC.scatter_reduce(1, index_TC, scores.select_TC, "amax")
        probability_TC = None if scores.prob_TC is None else total(scores.prob_TC)
        return Scores(logits_TC, select_TC, total(scores.gate_TC), probability_TC)
