"""Fewer experts for a token whose later choices weigh little beside its first, decided while it runs.

A token's chosen experts weigh w_0 >= w_1 >= ... With a threshold mu_{l,r} for layer l and rank r >= 1

    rank r is dropped   when   w_r / w_0 < mu_{l,r},

and the router weighs the others as it would have weighed them alone. mu is the median (or another quantile) of that
ratio over calibration tokens, or one number for all. Of a prompt, the tokens that later ones attend to most are spared:
with the head-averaged attention A [L, L] of the same block and the block's normalised input t_j of the mixture

    I_j = ||t_j||_1  *  1 / (L - j)  *  sum_{i >= j} A[i, j],

the share ``protect`` of tokens with the largest I_j keeps all experts. A single new token has nothing to be ranked
against: only the ratio counts. Outputs differ from the model's: this is off unless a request asks for it.

``pruning`` is the whole rule for Transformers models, as an edit of routing. Serving follows the ratio rule as a route;
its kernels keep no attention maps, so that there the first ``first`` positions of a text are spared, which models with
attention sinks look at most.

Source: MC-MoE (2410.06270), section 3.3, equations 5 to 7; ranks beyond the second are a generalisation.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.decoding import Decoder, Route
from moestro.core.errors import PlanError


if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from moestro.core.inputs import PlanInputs
    from moestro.core.plan import ServingPlan
    from moestro.methods.serve._parts.pruning import PruningEdit

Floats = npt.NDArray[np.float32]


class Config(BaseConfig):
    """Settings.

    Attributes:
        threshold: of layers that ``ratios`` does not name; 0 drops nothing, above 1 all but the first.
        ratios: layer -> thresholds of ranks from the second on; what a plan of this method fills in.
        layers: those that drop experts; None: all.
        protect: share of the tokens of a prompt that keep all experts (Transformers models).
        importance: what ranks them: ``attention``, or ``l1_recency``, ||t_j||_1 / (L - j), which the paper's code
            computes.
        first: positions at the beginning of a text that keep all experts (served models).
        quantile: of the ratios of calibration tokens, where a plan puts its thresholds.
        prune_layers: how many layers a plan lets drop experts, those where it alone costs least; None: all.
    """

    threshold: float = Field(default=0.4, ge=0, le=1e6, allow_inf_nan=False)
    ratios: dict[int, tuple[float, ...]] = Field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    protect: float = Field(default=0.02, ge=0, le=1)
    importance: Literal["attention", "l1_recency"] = "attention"
    first: int = Field(default=0, ge=0)
    quantile: float = Field(default=0.5, ge=0, le=1)
    prune_layers: int | None = Field(default=None, ge=0)


def route_of(config: Config) -> Route:
    """The rule as serving follows it."""
    ratios = tuple(sorted(config.ratios.items()))
    return Route(
        kind="ratio", threshold=config.threshold, ratios=ratios, layers=config.layers, first=config.first
    )  # fmt: skip


class DynamicPruning:
    """See Decoder."""

    name = "serve.dynamic_pruning"
    exact = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.routes: tuple[Route | None, ...] = (route_of(config),)

    def combine(self, logits: Any) -> Floats:
        """The only pass."""
        row: Floats = logits[0]
        return row


def pruning(model: Any, config: Config) -> "AbstractContextManager[PruningEdit]":
    """A context in which a Transformers model drops experts; what it gives counts them."""
    from moestro.methods.serve._parts import pruning as parts

    return parts.pruning(model, route_of(config), protect=config.protect, importance=config.importance)


def importance(attention: npt.ArrayLike, size: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """I [L] from the head-averaged attention [L, L] (query, key) and ||t||_1 [L] of one text."""
    given, length = np.asarray(attention, dtype=np.float64), len(np.asarray(size))
    later = np.tril(np.ones((length, length)))
    found: npt.NDArray[np.float64] = np.asarray(size) * (given * later).sum(0) / (length - np.arange(length))
    return found


def spared(score: npt.ArrayLike, share: float) -> npt.NDArray[np.bool_]:
    """Which of L tokens are the share with the largest scores: ceil(share L) of them, earlier ones first when equal."""
    values = np.asarray(score)
    found = np.zeros(len(values), dtype=bool)
    count = int(np.ceil(share * len(values) - 1e-9))
    found[np.argsort(-values, kind="stable")[:count]] = True
    return found


def thresholds(histogram: npt.ArrayLike, quantile: float) -> tuple[float, ...]:
    """For each rank the ratio below which this share of tokens lies, from histograms [ranks, bins] over [0, 1]."""
    counts = np.asarray(histogram, dtype=np.float64)
    seen = counts.cumsum(1)
    wanted = quantile * seen[:, -1:]
    place = (seen < wanted - 1e-9).sum(1) + (quantile > 0)
    return tuple(float(mu) for mu in np.where(seen[:, -1] > 0, place / counts.shape[1], 0.0))


def statistics(config: Config) -> Mapping[str, dict[str, object]]:
    """What a plan is made of."""
    return {"experts": {}}


def policy(config: Config, plan: Any = None) -> Decoder:
    """The decoder."""
    return DynamicPruning(config)


def plan(inputs: "PlanInputs", config: Config) -> "ServingPlan":
    """Thresholds for each layer of a model, on its calibration data; layers chosen by what dropping costs there alone.

    Raises:
        PlanError: no mixtures, or routers that do not choose two or more.
    """
    from moestro.core.plan import MethodUse, ServingPlan

    layers = sorted(inputs.statistics.get("experts", ()))  # packed experts too, which are no shape to others
    ratios = {}
    for layer in layers:
        histogram = inputs.statistic("experts", layer).ratios.histogram_RB.numpy()
        if not len(histogram):
            raise PlanError(f"layer {layer} never chose a second expert: there is nothing to drop")
        ratios[layer] = thresholds(histogram, config.quantile)
    if not ratios:
        raise PlanError(f"{inputs.shape.name} has no mixture of experts")
    settings = config.model_copy(update={"ratios": ratios, "threshold": 0.0})
    costs: dict[int, float] = {}
    if config.prune_layers is not None and config.prune_layers < len(layers):
        if inputs.model is None or inputs.batches is None:
            raise PlanError("choosing layers measures the loss; give an open model and calibration data")
        from moestro.methods.serve._parts.pruning import loss_of_layers

        routes = {layer: route_of(settings.model_copy(update={"layers": (layer,)})) for layer in layers}
        costs = loss_of_layers(inputs.model, inputs.batches, routes, config.protect, config.importance)
        settings = settings.model_copy(update={"layers": tuple(sorted(sorted(layers, key=lambda i: (costs[i], i))
                                                                       [: config.prune_layers]))})  # fmt: skip
    return ServingPlan(
        method="serve.dynamic_pruning",
        config=config.model_dump(mode="json"),
        seed=inputs.seed,
        model_hash=inputs.subject.fingerprint(),
        budget_bytes=0,
        tiers={},
        decoder=MethodUse(method="serve.dynamic_pruning", config=settings.model_dump(mode="json")),
        notes={"ratios": {str(layer): list(row) for layer, row in ratios.items()},
               "loss": {str(layer): cost for layer, cost in costs.items()}},
    )  # fmt: skip


CARD = MethodCard(
    title="MC-MoE: Mixture Compressor for Mixture-of-Experts LLMs Gains More",
    year=2024,
    arxiv="2410.06270",
    paper="mc-moe",
    summary="Drop a token's lesser experts by the ratio of their weights while it runs; important tokens are spared.",
    taxonomy="inference/model/algorithm/dynamic-gating",
    needs=("model", "data"),
    deviations=(
        "every rank behind the first has a threshold of its own; the paper has two experts a token",
        "importance sums the attention that later tokens pay; the paper's code sums over keys, which is 1 for each row",
        "serving spares the first positions of a text instead of those with the most attention",
        "where a router ranks by other scores than it weighs by, w_0 is the weight of the expert it ranks first",
    ),
)
