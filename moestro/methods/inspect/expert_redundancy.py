"""How badly tokens miss their best experts, and the shared one: the less others can stand in, the more specialised.

With L the next-token loss, a change is told as its relative rise (L' - L) / L. Of each layer's E experts

    top share p      each token's round(p E) highest ranked are closed; its router chooses again among the others and
                     weighs them as ever
    weight kept      the same, the new weights scaled until the token's sum is what it was: a router that does not
                     renormalise gives little to those it ranks low, and a smaller branch is harm of another kind
    random share p   as many are closed, drawn for each token without regard to its ranks; mean over ``draws``

and the slope of each over its shares, sum_p c_p rise_p / sum_p c_p^2, c the share that was closed after rounding.
Layers with a branch that all tokens run through (a shared expert) are also measured

    no shared            without it and with ``extra`` more routed experts, the next in rank
    full weight          the same, every one of these weighing 1, as the shared one did
    best, chosen swap    with the shared one, but ``extra`` routed ones (the best; any that were chosen) are closed and
                         the next in rank come in: what routed experts are missed

No routed expert, no shared expert: what either branch is worth in all.

Source: DeepSeekMoE (2401.06066, section 4.5: top experts disabled, the shared one traded for a routed one). Random
experts, weights kept or full, and swaps are ours.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError
from moestro.core.inputs import MeterInputs
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.report import Report, Table
from moestro.core.router import Router, topk_indices
from moestro.core.routing import Routing, Scores
from moestro.core.session import Edit, session
from moestro.methods.inspect._parts.next_token import Batch, loss


Kind = Literal["top", "random", "chosen"]


class Config(BaseConfig):
    """Settings.

    Attributes:
        shares: of a layer's experts that are closed, each in (0, 1). draws: of everything that is random.
        extra: routed experts that take the shared one's place; as many are swapped for comparison.
        layers: which mixture layers, by place from 0; None for all. The others stay as they are.
    """

    shares: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[0.0625, 0.125, 0.1875, 0.25], min_length=1)
    draws: int = Field(default=2, ge=1)
    extra: int = Field(default=1, ge=1)
    layers: list[int] | None = Field(default=None, min_length=1)


def scores_of(site: str, routing: Routing) -> Scores:
    """The scores behind a routing; ConfigError if the router has none."""
    if routing.scores is None:
        raise ConfigError(f"{site}: its router gives no scores, so its experts have no ranks; leave it out of layers")
    return routing.scores


def pick(routing: Routing, scores: Scores, kind: Kind, count: int, draw: torch.Generator | None) -> Tensor:
    """Which ``count`` experts each token loses, bool [T, C]; nulls stay.

    Args:
        kind: the highest ranked, any, or those that were chosen, in random order, before any other.
        draw: on the CPU; for the last two.
    """
    select_TE = scores.select_TC[:, : routing.num_experts]
    key_TE = select_TE
    if kind != "top":
        key_TE = torch.rand(select_TE.shape, generator=draw).to(select_TE.device)
    if kind == "chosen":
        chosen_TC = torch.zeros_like(scores.select_TC).index_put(
            (routing.token_N, routing.expert_N), key_TE.new_ones(())
        )
        key_TE = key_TE + 2 * chosen_TC[:, : routing.num_experts]
    closed_TC = torch.zeros_like(scores.select_TC, dtype=torch.bool)
    return closed_TC.scatter(1, topk_indices(key_TE, count), True)


def token_weights(routing: Routing) -> Tensor:
    """Sum of each token's weights [T]."""
    return routing.weight_N.new_zeros(routing.num_tokens).index_add(0, routing.token_N, routing.weight_N)


class Closed(Edit):
    """Closes ``counts[site]`` experts to every token and lets the router choose again."""

    def __init__(
        self, counts: Mapping[str, int], kind: Kind, draw: torch.Generator | None = None, keep_weight: bool = False
    ) -> None:
        self.counts, self.kind, self.draw, self.keep_weight = counts, kind, draw, keep_weight

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        """See Edit."""
        if not self.counts.get(site):
            return routing
        scores = scores_of(site, routing)
        closed_TC = pick(routing, scores, self.kind, self.counts[site], self.draw)
        again = router.choose(scores.replace(select_TC=scores.select_TC.masked_fill(closed_TC, float("-inf"))), ctx)
        if closed_TC[again.token_N, again.expert_N].any():
            raise ConfigError(f"{site}: {type(router).__name__} chose closed experts; leave it out of layers")
        if self.keep_weight:
            factor_T = token_weights(routing) / token_weights(again)
            factor_T = factor_T.where(factor_T.isfinite(), 1.0)
            again = again.replace(weight_N=again.weight_N * factor_T[again.token_N])
        return again


class Added(Edit):
    """Gives every token the ``extra`` experts next in rank; with ``full`` they weigh 1, and the others as before."""

    def __init__(self, sites: Sequence[str], extra: int, full: bool = False) -> None:
        self.sites, self.extra, self.full = sites, extra, full

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        """See Edit."""
        if site not in self.sites:
            return routing
        if routing.top_k is None or routing.kept_N is not None:
            raise ConfigError(f"{site}: its tokens have no fixed number of experts to add to; leave it out of layers")
        scores = scores_of(site, routing)
        taken_TC = scores.select_TC.scatter(1, routing.expert_TK, float("-inf"))
        extra_TX = topk_indices(taken_TC[:, : routing.num_experts], self.extra)
        expert_TK = torch.cat([routing.expert_TK, extra_TX], 1)
        weight_TK = router.weigh(scores.gate_TC.gather(1, expert_TK))
        if self.full:
            weight_TK = torch.cat([routing.weight_TK, torch.ones_like(extra_TX, dtype=weight_TK.dtype)], 1)
        return Routing.from_topk(
            expert_TK, weight_TK, num_experts=routing.num_experts, num_null=routing.num_null, scores=scores,
            causal=routing.causal,
        )  # fmt: skip


class Weightless(Edit):
    """Routed experts weigh nothing."""

    def __init__(self, sites: Container[str]) -> None:
        self.sites = sites

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        """See Edit."""
        return routing.replace(weight_N=torch.zeros_like(routing.weight_N)) if site in self.sites else routing


class Silent(nn.Sequential):
    """Answers zeros [T, O] where its part would answer."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.zeros_like(self[0](x_TD))


@contextmanager
def without_shared(layers: Sequence[MoELayer]) -> Iterator[None]:
    """Inside, the shared branches of ``layers`` answer 0; afterwards the same modules stand there again."""
    shared = [layer.shared for layer in layers]
    try:
        for layer, module in zip(layers, shared, strict=True):
            layer.shared = None if module is None else Silent(module)
        yield
    finally:
        for layer, module in zip(layers, shared, strict=True):
            layer.shared = module


def closed_counts(layers: Mapping[str, MoELayer], share: float) -> dict[str, int]:
    """Site -> round(share E), halves up.

    Raises:
        ConfigError: a token would have fewer experts left than it takes.
    """
    counts = {site: int(share * layer.router.num_experts + 0.5) for site, layer in layers.items()}
    for site, layer in layers.items():
        _check_left(site, layer.router, counts[site], f"share {share:g}")
    return counts


def _check_left(site: str, router: Router, closed: int, what: str) -> None:
    left, needed = router.num_choices - closed, router.top_k or 1
    if left < needed:
        raise ConfigError(
            f"{site}: {what} closes {closed} of {router.num_experts} experts; {left} are left, a token takes {needed}"
        )


def slope(share_P: Sequence[float], rise_P: Sequence[float]) -> float:
    """Least-squares slope through the origin; 0 when nothing was closed."""
    square = sum(share * share for share in share_P)
    return sum(share * rise for share, rise in zip(share_P, rise_P, strict=True)) / square if square else 0.0


@dataclass(frozen=True)
class Subject:
    """A model, what it reads, the layers that are measured, its plain loss, and the seed of what is random."""

    model: nn.Module
    batches: Sequence[Batch]
    layers: Mapping[str, MoELayer]
    plain: float
    seed: int

    def rise(self, *edits: Edit) -> float:
        """Relative rise of the loss under edits."""
        with session(edits=edits):
            return loss(self.model, self.batches) / self.plain - 1.0

    def closed(self, counts: Mapping[str, int], kind: Kind, draws: int = 1, keep_weight: bool = False) -> float:
        """Mean rise over ``draws`` with experts closed."""
        each = [torch.Generator().manual_seed(self.seed + number) for number in range(draws)]
        return sum(self.rise(Closed(counts, kind, draw, keep_weight)) for draw in each) / draws


def subject_of(inputs: MeterInputs, config: Config) -> Subject:
    """The layers that the settings name and the plain loss, or a ConfigError that says what is missing."""
    every = list(mixture_layers(inputs.model).values())
    batches = list(inputs.batches)
    if not every or not batches:
        raise ConfigError(f"expert_redundancy: {len(every)} mixture layers and {len(batches)} batches; both are needed")
    places = range(len(every)) if config.layers is None else config.layers
    if not set(places) <= set(range(len(every))) or len(set(places)) < len(places):
        raise ConfigError(f"layers={config.layers}; the model has {len(every)} mixture layers, from 0, each once")
    layers = {every[place].site: every[place] for place in places}
    return Subject(inputs.model, batches, layers, loss(inputs.model, batches), inputs.seed)


def shared_rises(subject: Subject, config: Config) -> dict[str, float]:
    """Rises without the shared branch and with routed experts swapped; empty for a model without such a branch.

    Raises:
        ConfigError: ``extra`` is more than a layer can add or swap.
    """
    layers = {site: layer for site, layer in subject.layers.items() if layer.shared is not None}
    if not layers:
        return {}
    sites, counts = list(layers), dict.fromkeys(layers, config.extra)
    for site, layer in layers.items():
        _check_left(site, layer.router, config.extra, f"extra={config.extra}")
    with without_shared(list(layers.values())):
        found = {
            "no shared": subject.rise(Added(sites, config.extra)),
            "no shared, full weight": subject.rise(Added(sites, config.extra, full=True)),
            "no shared, none added": subject.rise(),
        }
    found["best swap"] = subject.closed(counts, "top")
    found["chosen swap"] = subject.closed(counts, "chosen", config.draws)
    return found


def measure(subject: MeterInputs, config: Config) -> Report:
    """Run the model once for every share, control and draw.

    Raises:
        ConfigError: nothing to measure, layers that cannot be, too few experts left.
    """
    given = subject_of(subject, config)
    rows: list[list[Any]] = []
    for share, counts in [(share, closed_counts(given.layers, share)) for share in config.shares]:
        parts = [counts[site] / layer.router.num_experts for site, layer in given.layers.items()]
        top, kept = given.closed(counts, "top"), given.closed(counts, "top", keep_weight=True)
        rows.append([share, sum(parts) / len(parts), top, kept, given.closed(counts, "random", config.draws)])
    numbers, kinds = {"loss": given.plain}, ("top", "top, weight kept", "random")
    for place, kind in enumerate(kinds, 2):
        numbers |= {f"rise: {kind} {row[0]:g}": row[place] for row in rows}
        numbers[f"slope: {kind}"] = slope([row[1] for row in rows], [row[place] for row in rows])
    others = {"no routed": given.rise(Weightless(given.layers)), **shared_rises(given, config)}
    numbers |= {f"rise: {what}": rise for what, rise in others.items()}
    return Report(
        method="inspect.expert_redundancy",
        config=config.model_dump(mode="json"),
        subject=subject.name,
        numbers=numbers,
        tables={"closed": Table(columns=["share asked", "share closed", *kinds], rows=rows)},
        notes={"unit": "nats for the loss, parts of it for rises, parts for each whole share of experts for slopes"},
    )


CARD = MethodCard(
    title="DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
    year=2024,
    arxiv="2401.06066",
    paper="deepseekmoe",
    summary="The rise of the loss without each token's best experts or the shared one: how redundant experts are.",
    taxonomy="inspection/measurement",
    needs=("model", "data"),
    deviations=("relative rises of the loss instead of the loss", "random, weight and swap controls beside them"),
)
