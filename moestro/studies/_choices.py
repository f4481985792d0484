"""Edits for studies of choices over a batch: other choices, wrong ones, and what auxiliary routers would have said."""

from typing import Any

import torch
from torch import Tensor

from moestro.core.router import Router, topk_indices
from moestro.core.routing import Routing
from moestro.core.session import Edit


def chosen(routing: Routing) -> Tensor:
    """The choices as bool [T, C]."""
    found_TC = torch.zeros(routing.num_tokens, routing.num_choices, dtype=torch.bool)
    found_TC[routing.token_N, routing.expert_N] = True
    return found_TC


class TopOne(Edit):
    """The causal control: each token goes to the expert of its group that it scores highest."""

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: Any) -> Routing:
        """See Edit."""
        scores = routing.scores
        assert scores is not None
        best_TK = topk_indices(scores.logits_TC, 1)
        weight_TK = scores.gate_TC.gather(1, best_TK)
        return Routing.from_topk(best_TK, weight_TK, num_experts=routing.num_experts, scores=scores)


class Flipped(Edit):
    """Turns a share of a kind of decisions around: who was chosen is not, and the other way round.

    Attributes:
        flips: how many decisions were turned.
    """

    def __init__(self, share: float, depth: bool, seed: int) -> None:
        self.share, self.depth, self.flips = share, depth, 0
        self.draw = torch.Generator().manual_seed(seed)

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: Any) -> Routing:
        """See Edit."""
        if site.endswith(".mlp") == self.depth:
            return routing
        scores, chosen_TC = routing.scores, chosen(routing)
        assert scores is not None
        turned_TC = torch.rand(chosen_TC.shape, generator=self.draw) < self.share
        turned_TC &= scores.logits_TC > float("-inf")
        self.flips += int(turned_TC.sum())
        found_TC = chosen_TC ^ turned_TC
        return Routing.from_mask(
            found_TC, scores.gate_TC, num_experts=routing.num_experts, scores=scores, causal=routing.causal
        )


class Answers(Edit):
    """Compares, without changing anything, the choice over the batch with what auxiliary routers say of it.

    Attributes:
        counts: site -> int64 [5, C], for each choice: decisions, chosen, chosen by the auxiliary routers, by both, by
            neither.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: Any) -> Routing:
        """See Edit."""
        logits_TC, chosen_TC = ctx.get(site, "auxiliary"), chosen(routing)
        open_TC = logits_TC > float("-inf")
        auxiliary: Any = router.auxiliary
        said_TC = logits_TC > auxiliary.threshold
        kinds = (open_TC, chosen_TC, said_TC, chosen_TC & said_TC, open_TC & ~(chosen_TC | said_TC))
        found = torch.stack([kind.sum(0) for kind in kinds])
        self.counts[site] = self.counts.get(site, torch.zeros_like(found)) + found
        return routing

    def told(self) -> dict[str, float]:
        """Shares of all decisions: accuracy, what it gains over the commoner answer to each choice, and F1."""
        total_N, took_N, said_N, both_N, neither_N = torch.cat(list(self.counts.values()), 1).double()
        accuracy = float((both_N + neither_N).sum() / total_N.sum())
        return {
            "auxiliary_accuracy": accuracy,
            "auxiliary_gain": accuracy - float(torch.maximum(took_N, total_N - took_N).sum() / total_N.sum()),
            "auxiliary_f1": float(2 * both_N.sum() / (took_N + said_N).sum().clamp(min=1)),
        }
