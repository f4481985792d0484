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
        gate_TC = scores.gate_TC
        return Routing.from_mask(chosen_TC ^ turned_TC, gate_TC, num_experts=routing.num_experts, scores=scores)


class Answers(Edit):
    """Compares, without changing anything, the choice over the batch with what auxiliary routers say of it.

    Attributes:
        counts: decisions, chosen, chosen by the auxiliary routers, by both, by neither.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(5, dtype=torch.int64)

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: Any) -> Routing:
        """See Edit."""
        logits_TC = ctx.get(site, "auxiliary")
        open_TC = logits_TC > float("-inf")
        chosen_TC = chosen(routing)[open_TC]
        auxiliary: Any = router.get_submodule("auxiliary")
        said_TC = (logits_TC > auxiliary.threshold)[open_TC]
        kinds = (open_TC[open_TC], chosen_TC, said_TC, chosen_TC & said_TC, ~(chosen_TC | said_TC))
        self.counts += torch.stack([kind.sum() for kind in kinds])
        return routing
