"""MC-MoE, the pruning half: which of a token's lesser experts can be left out while it runs?

A float mixture is trained inside the job. All arms leave out the same share of second experts: by the ratio of the two
weights against each layer's median, with and without sparing the tokens that later ones attend to most, at random, or
all of them in half of the layers, those where that alone costs least on calibration data. Arms that choose by ratio
move their quantile from the median until the shares agree on the measured rows. Losses are of
held-out rows, in one pass over each.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.decoding import Route
from moestro.core.layer import mixture_layers
from moestro.core.router import Router
from moestro.core.routing import Routing
from moestro.core.session import Edit, session
from moestro.methods.planning import make_plan
from moestro.methods.serve._parts.pruning import loss_of_layers, pruning
from moestro.methods.serve.dynamic_pruning import Config, route_of, thresholds
from moestro.observe.calibrate import calibrate
from moestro.studies._framework import Arm, Beats, Budget, Claim, NotWorse, Study
from moestro.studies._mixture import Mixture, corpus_of, rows_of, size_of, trained
from moestro.studies._rows import row_losses


PROTECT, SHARE = 0.02, 0.5
CLOSE = 0.003
"""Shares of left-out experts that count as equal."""


def scale(budget: Budget) -> Mixture:
    """The mixture of the budget; an even number of layers, so that half of them are half."""
    full = {"layers": 4, "heldout": 128, "steps": 500}
    return size_of(budget, **budget.pick(ci={}, micro={"heldout": 32}, full=full))


def calibration(seed: int, budget: Budget) -> list[dict[str, Tensor]]:
    """Training rows."""
    size = scale(budget)
    return rows_of(corpus_of(size).train, size, seed + 7, limit=budget.pick(ci=4, micro=24, full=128))


def held(budget: Budget) -> list[dict[str, Tensor]]:
    """Held-out rows."""
    return rows_of(corpus_of(scale(budget)).heldout, scale(budget))


@functools.lru_cache(maxsize=2)
def histograms(seed: int, budget: Budget) -> dict[int, Tensor]:
    """Of w_1 / w_0 on calibration rows, by layer."""
    found = calibrate(trained(scale(budget), seed), calibration(seed, budget))
    return {layer: stats.ratios.histogram_RB for layer, stats in found.items()}


class RandomDrop(Edit):
    """Leaves out second experts by lot, as often in each layer as asked."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.draw = share, torch.Generator().manual_seed(seed)
        self.asked = self.dropped = 0

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: Any) -> Routing:
        """See Edit."""
        drop_TK = torch.rand(routing.num_tokens, routing.top_k or 0, generator=self.draw) < self.share
        drop_TK[:, 0] = False
        self.asked += drop_TK[:, 1:].numel()
        self.dropped += int(drop_TK.sum())
        return routing.without(drop_TK, router.weigh)


@contextmanager
def by_lot(share: float, seed: int) -> Iterator[RandomDrop]:
    """A context in which second experts are left out at random."""
    edit = RandomDrop(share, seed)
    with session(edits=[edit]):
        yield edit


@dataclass(frozen=True)
class Found:
    """Losses by row, and the share of second experts of all layers that was left out."""

    losses: Any
    share: float


def measured(model: nn.Module, route: Route, budget: Budget, protect: float = 0.0, kind: str = "attention") -> Found:
    """Held-out losses under a route."""
    with pruning(model, route, protect=protect, importance=kind) as edit:
        losses = row_losses(model, held(budget))
    return Found(losses, edit.dropped / max(1, edit.experts - edit.experts // 2))


@functools.lru_cache(maxsize=8)
def by_ratio(seed: int, budget: Budget, protect: float, kind: str) -> Found:
    """The ratio rule at the quantile that leaves out the share ``SHARE`` of the measured rows' second experts."""
    model, counts = trained(scale(budget), seed), histograms(seed, budget)
    quantile = SHARE / (1 - protect)
    for _ in range(6):
        ratios = {layer: thresholds(histogram, quantile) for layer, histogram in counts.items()}
        found = measured(model, route_of(Config(ratios=ratios, threshold=0.0)), budget, protect, kind)
        if abs(found.share - SHARE) <= CLOSE:
            break
        quantile = min(1.0, max(0.0, quantile + SHARE - found.share))
    return found


def static(seed: int, budget: Budget) -> Found:
    """No second experts at all in half of the layers, those where that alone costs least."""
    model = trained(scale(budget), seed)
    layers = range(len(mixture_layers(model)))
    routes = {layer: Route(kind="ratio", threshold=2.0, layers=(layer,)) for layer in layers}
    costs = loss_of_layers(model, calibration(seed, budget), routes, 0.0)
    chosen = sorted(sorted(layers, key=lambda layer: costs[layer])[: len(layers) // 2])
    return measured(model, Route(kind="ratio", threshold=2.0, layers=tuple(chosen)), budget)


def in_part(seed: int, budget: Budget) -> Found:
    """The method's own plan: the median in half of the layers, chosen by cost, tokens spared."""
    model = trained(scale(budget), seed)
    count = max(1, len(mixture_layers(model)) // 2)
    plan: Any = make_plan(
        "serve.dynamic_pruning", model, {"prune_layers": count, "protect": PROTECT}, batches=calibration(seed, budget)
    )
    config = Config(**plan.decoder.config)
    return measured(model, route_of(config), budget, PROTECT)


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Loss under one way of leaving experts out."""
    if arm == "whole":
        found = Found(row_losses(trained(scale(budget), seed), held(budget)), 0.0)
    elif arm == "random":
        model = trained(scale(budget), seed)
        with by_lot(by_ratio(seed, budget, 0.0, "attention").share, seed) as edit:
            losses = row_losses(model, held(budget))
        found = Found(losses, edit.dropped / edit.asked)
    elif arm == "static":
        found = static(seed, budget)
    elif arm == "part":
        found = in_part(seed, budget)
    else:
        protect, kind = {"ratio": (0.0, "attention"), "protected": (PROTECT, "attention"),
                         "recency": (PROTECT, "l1_recency")}[arm]  # fmt: skip
        found = by_ratio(seed, budget, protect, kind)
    loss = float(found.losses.mean())
    return {"loss": loss, "ppl": math.exp(loss), "pruned": found.share, "of_all": found.share / 2}


ALL = (
    "loss {whole} with all experts; without the share {ratio.pruned} of second experts: by ratio {ratio}, at random "
    "{random} ({random.pruned}), in half of the layers {static} ({static.pruned}); with tokens spared by attention "
    "{protected} ({protected.pruned}), by recency {recency} ({recency.pruned})."
)

STUDY = Study(
    paper="mc-moe",
    part="pruning",
    title="Which experts can be left out while a token runs",
    setting=(
        "A decoder of 4 layers, width 96, 8 experts of width 96 and 2 a token, trained for 500 steps of 768 tokens of "
        "the standard library's source files; thresholds from 128 training rows, losses on 128 held-out rows of 96 "
        "tokens, each in one pass: two tokens of a row are spared. Experts are floats. The paper prunes Mixtral "
        "8x7B at 2.05 bits, whose first tokens are attention sinks; a model as small as this one may have none."
    ),
    claims=(
        Claim(
            key="random",
            text="The ratio of the weights tells better than chance which second experts can go.",
            where="section 3.3; the control is ours",
            claimed="not measured in the paper",
            metric="loss",
            judge=Beats(method="ratio", control="random"),
            tells=ALL,
        ),
        Claim(
            key="static",
            text="Choosing by token is better than one expert for all tokens in some layers.",
            where="section 3.3; the control is ours",
            claimed="not measured in the paper",
            metric="loss",
            judge=Beats(method="ratio", control="static"),
            tells=ALL,
        ),
        Claim(
            key="protection",
            text="Sparing the 2 % of tokens with the most attention is better than the ratio alone, as many left out.",
            where="ablation of the pruning: WikiText2 at 2.05 bits",
            claimed="perplexity 6.48 to 6.22 at 15.2 and 14.9 % pruned",
            metric="loss",
            judge=Beats(method="protected", control="ratio"),
            tells=ALL,
        ),
        Claim(
            key="attention",
            text="Attention ranks tokens better than size and recency, which the paper's code comes down to.",
            where="equation 6 against the published code",
            claimed="not measured in the paper",
            metric="loss",
            judge=Beats(method="protected", control="recency"),
            tells=ALL,
        ),
        Claim(
            key="cost",
            text="With medians in half of the layers about an eighth of the experts' work goes for 5 % of perplexity.",
            where="ablation of the pruning: WikiText2 at 2.05 bits",
            claimed="perplexity 5.91 to 6.22 at 14.88 %",
            metric="ppl",
            judge=NotWorse(method="part", control="whole", tolerance=0.0525, relative=True),
            tells="perplexity {whole} whole, {part} without the share {part.of_all} of all experts; {ratio} by medians "
            "in all layers ({ratio.of_all}).",
        ),
    ),
    arms=(
        Arm(name="whole", text="two experts a token", role="control"),
        Arm(name="ratio", text="second experts below the median ratio are left out"),
        Arm(name="protected", text="the same, tokens with the most attention spared, as many left out"),
        Arm(name="recency", text="tokens spared by size and recency instead", role="control"),
        Arm(name="random", text="second experts left out at random, as many", role="control"),
        Arm(name="static", text="one expert for all tokens in the half of the layers where it costs least",
            role="control"),
        Arm(name="part", text="the method's plan: medians in half of the layers, tokens spared"),
    ),
    run=run,
    methods=("serve.dynamic_pruning",),
    units={"loss": "nats a token, held out", "ppl": "perplexity", "pruned": "share of second experts",
           "of_all": "share of all experts' work"},
)  # fmt: skip
