"""How experts and domains of text hang together: counts of first choices, and what of them is shared."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moestro.core.context import RoutingContext
from moestro.core.routing import Routing


@dataclass
class FirstExperts:
    """A recorder of the first expert of every real token, by domain and mixture of several experts.

    Attributes:
        domains: how many. domain: of the tokens to come. counts: site -> tokens of a domain that an expert was first
            for, [domain, E].
    """

    domains: int
    domain: int = 0
    counts: dict[str, Tensor] = field(default_factory=dict)

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """See Recorder."""
        if routing.num_experts > 1 and routing.scores is not None and ctx.tokens is not None:
            first_T = routing.scores.select_TC.argmax(-1)[ctx.tokens.valid_T]
            empty = torch.zeros(self.domains, routing.num_experts)
            self.counts.setdefault(site, empty)[self.domain] += torch.bincount(first_T, minlength=routing.num_experts)


def normalised_information(count: np.ndarray) -> float:
    """2 I(row, column) / (H(row) + H(column)) of a table of counts; 0 where a side has no entropy."""
    joint = count / count.sum()
    rows, columns = joint.sum(1), joint.sum(0)

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    if min(entropy(rows), entropy(columns)) <= 0:
        return 0.0
    return 2 * (entropy(rows) + entropy(columns) - entropy(joint)) / (entropy(rows) + entropy(columns))
