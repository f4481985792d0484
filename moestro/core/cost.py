"""What a forward costs in operations, from shapes and numbers of assignments alone: works on the meta device.

An operation is a multiplication or an addition of a matrix product, so that a matrix of n weights costs 2 n a row, as
``torch.utils.flop_counter`` counts. A module that knows better than the general rule says so:

    def flops_per_token(self, work: Work) -> float: ...

The general rule: two operations for every number of the matrices that a module holds itself (tables of embeddings and
scales of norms are none), what its children cost, and what the parts cost that it borrows. It is right for whatever
multiplies each token by each of its matrices once. A module that does otherwise (a matrix at some tokens only, or
weights of others, or a product of activations) answers itself, and asks ``cost`` about the parts inside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moestro.core.routing import Routing
from moestro.core.site import Borrowed


if TYPE_CHECKING:
    from moestro.core.context import RoutingContext
    from moestro.core.router import Router


@dataclass
class Work:
    """What is known of the forward that is counted.

    Attributes:
        length: tokens of a sequence. training: the mode; some routers do more while training.
        rows: site -> assignments a token that each real expert computed, as ``RowCounter`` measures them. "A token" is
            one that reaches the site.
        by_length: modules that cost more in longer sequences -> their operations a token at that length (attention).
        guessed: sites whose number of assignments depends on data and was not given; filled while counting.
    """

    length: int
    training: bool = True
    rows: Mapping[str, Sequence[float]] = field(default_factory=dict)
    by_length: Mapping[nn.Module, Callable[[int], float]] = field(default_factory=dict)
    guessed: set[str] = field(default_factory=set)

    def rows_of(self, site: str, router: "Router") -> Sequence[float]:
        """Assignments a token that each expert of ``site`` computes, [E].

        Measured; else even over the experts, as many as the settings say; else (noted in ``guessed``) as many as an
        even load over real and null experts gives, or all where not even a maximum is known.
        """
        if site in self.rows:
            return self.rows[site]
        count = router.real_per_token(self.length)
        if count is None:
            self.guessed.add(site)
            count = (router.top_k or router.num_choices) * router.num_experts / router.num_choices
        return [count / router.num_experts] * router.num_experts


@runtime_checkable
class Counted(Protocol):
    """A module that says itself what it costs."""

    def flops_per_token(self, work: Work) -> float:
        """Operations of a forward for one token that reaches the module; all tokens of a sequence share what is done
        once for them.
        """


def cost(module: nn.Module, work: Work) -> float:
    """Operations of a forward of ``module`` for one token: what the module says, else the general rule."""
    return module.flops_per_token(work) if isinstance(module, Counted) else cost_inside(module, work)


def cost_inside(module: nn.Module, work: Work) -> float:
    """The general rule, for modules whose own answer adds something to it."""
    flops = 2.0 * sum(matrix.numel() for matrix in matrices(module))
    if module in work.by_length:
        flops += work.by_length[module](work.length)
    borrowed = [part.module for part in vars(module).values() if isinstance(part, Borrowed)]
    return flops + sum(cost(part, work) for part in (*module.children(), *borrowed))


def over_experts(rows_E: Sequence[float], each: Sequence[float]) -> float:
    """sum over experts of rows times ``each``. A rank that holds some of the experts has its own stand for all."""
    if len(rows_E) == len(each):
        return sum(rows * value for rows, value in zip(rows_E, each, strict=True))
    return sum(rows_E) * sum(each) / len(each)


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of the module itself, not of its children, that multiply each token by the general rule."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or "norm" in type(module).__name__.lower():
        return []
    return [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]


@dataclass
class RowCounter:
    """Recorder: how many rows the experts of each site computed. Padding that was routed counts, it is computed too.
    Where depth routing lets some tokens through, the rows are those of a token that came, not of what fills rows up.

    Attributes:
        counts: site -> assignments of each real expert, [E] on the CPU. tokens: site -> tokens that came by.
    """

    counts: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def record(self, site: str, routing: Routing, ctx: "RoutingContext") -> None:
        """Take one layer's routing."""
        counts_E = torch.bincount(routing.real().expert_N, minlength=routing.num_experts).double().cpu()
        tokens = ctx.tokens
        came = routing.num_tokens if tokens is None or tokens.whole else int(tokens.valid_T.sum())
        self.add(RowCounter({site: counts_E}, {site: came}))

    def add(self, other: "RowCounter") -> None:
        """Add what another counter saw."""
        for site, counts_E in other.counts.items():
            self.counts[site] = self.counts[site] + counts_E if site in self.counts else counts_E
            self.tokens[site] = self.tokens.get(site, 0) + other.tokens[site]

    def per_token(self) -> dict[str, list[float]]:
        """Site -> assignments a token of each expert, for ``Work.rows``."""
        return {site: (n / max(1, self.tokens[site])).tolist() for site, n in self.counts.items()}
