"""What the routers did in a step: exact counts of every assignment, for bias updates and for the screen.

Only forwards in training mode count: neither evaluation, nor a teacher, nor a replay.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moestro.core.context import RoutingContext
from moestro.core.cost import RowCounter
from moestro.core.routing import Routing


@dataclass
class LoadCounter:
    """Recorder: assignments per site and choice, padding left out, dropped ones included (they are demand).

    Attributes:
        load: site -> int64 [C] on the CPU. entropy: site -> sum over valid tokens of the entropy of the router's
            softmax, in nats, and number of tokens; only when ``with_entropy``. rows: what experts computed.
    """

    with_entropy: bool = False
    load: dict[str, Tensor] = field(default_factory=dict)
    num_null: dict[str, int] = field(default_factory=dict)
    entropy: dict[str, tuple[float, int]] = field(default_factory=dict)
    rows: RowCounter = field(default_factory=RowCounter)

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """Take one layer's routing; forwards in evaluation mode (teachers among them) do not count."""
        if not ctx.training:
            return
        valid_T = None if ctx.tokens is None else ctx.tokens.valid_T
        counts_C = routing.counts_C(valid_T).cpu()
        self.load[site] = self.load[site] + counts_C if site in self.load else counts_C
        self.num_null[site] = routing.num_null
        self.rows.record(site, routing, ctx)
        if self.with_entropy and routing.scores is not None:
            with torch.no_grad():
                entropy_T = torch.special.entr(torch.softmax(routing.scores.logits_TC.float(), dim=-1)).sum(-1)
                if valid_T is not None:
                    entropy_T = entropy_T[valid_T]
                total, tokens = self.entropy.get(site, (0.0, 0))
                self.entropy[site] = (total + float(entropy_T.sum()), tokens + entropy_T.numel())


@dataclass(frozen=True)
class RouterReport:
    """One layer's load over a window of steps.

    Attributes:
        load: share of the assignments of each choice, real experts first, then nulls.
        assignments: how many there were.
        max_violation: max load / mean load - 1 over the real experts (2408.15664, eq. 4); 0 is even.
        load_entropy: entropy of the real experts' load over log E; 1 is even, 0 is one expert.
        dead: real experts without any assignment.
        token_entropy: mean entropy of the router's softmax per token, in nats; None where routers give no scores.
        real_per_token: assignments a token that experts computed, nulls and dropped ones left out; None if not counted.
    """

    load: list[float]
    assignments: int
    max_violation: float
    load_entropy: float
    dead: list[int]
    token_entropy: float | None
    real_per_token: float | None = None


def report(
    load_C: Tensor, num_null: int = 0, entropy: tuple[float, int] | None = None, rows_E: list[float] | None = None
) -> RouterReport:
    """Statistics of one layer's counts, int64 [C], and of the rows a token that its experts computed."""
    counts_C = load_C.double()
    total = float(counts_C.sum())
    real_E = counts_C[: len(counts_C) - num_null]
    mean = float(real_E.mean())
    share_E = real_E / real_E.sum().clamp(min=1)
    spread = -float(torch.special.xlogy(share_E, share_E).sum())
    even = float(torch.log(torch.tensor(float(len(real_E)))))
    return RouterReport(
        load=(counts_C / max(total, 1.0)).tolist(),
        assignments=int(total),
        max_violation=float(real_E.max()) / mean - 1.0 if mean > 0 else 0.0,
        load_entropy=spread / even if even > 0 else 1.0,
        dead=(real_E == 0).nonzero().flatten().tolist(),
        token_entropy=entropy[0] / entropy[1] if entropy and entropy[1] else None,
        real_per_token=None if rows_E is None else sum(rows_E),
    )


@dataclass
class Window:
    """Counts added up over the steps between two reports."""

    load: dict[str, Tensor] = field(default_factory=dict)
    num_null: dict[str, int] = field(default_factory=dict)
    entropy: dict[str, tuple[float, int]] = field(default_factory=dict)
    rows: RowCounter = field(default_factory=RowCounter)

    def add(self, load: dict[str, Tensor], counter: LoadCounter) -> None:
        """Add one step: ``load`` summed over ranks, the rest of the recorder as it is."""
        for site, counts_C in load.items():
            self.load[site] = self.load[site] + counts_C if site in self.load else counts_C
        self.num_null.update(counter.num_null)
        self.rows.add(counter.rows)
        self.entropy = dict(counter.entropy) or self.entropy

    def take(self) -> dict[str, RouterReport]:
        """The reports by site; the window starts anew."""
        rows = self.rows.per_token()
        reports = {
            site: report(counts_C, self.num_null.get(site, 0), self.entropy.get(site), rows.get(site))
            for site, counts_C in self.load.items()
        }
        self.load, self.entropy, self.rows = {}, {}, RowCounter()
        return reports
