"""AdaMoE: does a mixture whose tokens choose how many experts they use lose less than one that uses fewer by chance?

A small byte-level mixture is trained on source code. It then gets null experts and is fine-tuned on prose; the controls
are fine-tuned as they are, with the same number of experts drawn by chance, or as many as the router's confidence asks
for. All use the data, steps and loss weights of the method; the controls of equal load take it from the method's run.
"""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moestro.core.context import RoutingContext
from moestro.core.forward import logits_of
from moestro.core.layer import mixture_layers
from moestro.core.router import Router
from moestro.core.routing import Routing
from moestro.core.session import Edit, session
from moestro.data.dataset import DataConfig, build_dataset
from moestro.data.packing import IGNORE
from moestro.data.tokens import byte_tokenizer
from moestro.methods.train.adamoe import RandomDepth, keep, real_per_token
from moestro.models.swap import swap
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, NotWorse, Study, Within
from moestro.studies._language import Scale, Text, batches, llama, train
from moestro.training.objectives import Batch, Causal
from moestro.training.optimizer import make_optimizer, set_lr
from moestro.training.recipe import OptimizerConfig
from moestro.training.schedule import ScheduleConfig
from moestro.training.step import Stepper


EXPERTS, TOP_K, NULLS, CHOICES = 8, 2, 8, 3
ALPHA = (0.02, 1e-4)  # weight of the balance loss in the first and in the second half of fine-tuning
LOSS = "null_balance"
EQUAL_LOAD = {"random_depth": "adamoe", "top_p": "adamoe", "random_all": "normalise_all"}  # whose load an arm uses
NULL_ARMS = {"adamoe": {}, "separate": {}, "normalise_all": {"normalise": "all"}}


def scale(budget: Budget) -> Scale:
    """The run before fine-tuning, which itself takes ``tune_steps``."""
    small = {"vocabulary": 259, "length": 64}
    return budget.pick(
        ci=Scale(**{**small, "length": 32}, layers=2, dim=32, inner=32, heads=2, batch=4, steps=6, heldout=4),
        micro=Scale(**small, layers=2, dim=64, inner=128, heads=2, batch=8, steps=100, heldout=64),
        full=Scale(vocabulary=259, layers=4, dim=128, inner=256, batch=8, steps=400, heldout=256),
    )


def tune_steps(size: Scale) -> int:
    """Steps of fine-tuning."""
    return max(4, round(0.6 * size.steps))


@functools.cache
def text(corpus: str, length: int, rows: int, limit: int | None) -> Text:
    """A built-in corpus as rows of bytes; held-out rows at even distances."""
    parts = []
    for split in ("train", "heldout"):
        config = DataConfig.parse(
            {"source": f"builtin:{corpus}", "split": split, "limit": limit, "tokenizer": "bytes",
             "sequence_length": length}
        )  # fmt: skip
        parts.append(build_dataset(config, byte_tokenizer(), "packed"))
    (every,) = parts[1].sources.values()
    places = np.linspace(0, len(every) - 1, min(rows, len(every))).astype(int)
    return Text(parts[0], type(parts[0])({"data": [every[int(place)] for place in places]}))


def prose(size: Scale, name: str) -> Text:
    """What is fine-tuned on. Reading the standard library's prose takes longer than the ci budget."""
    return text("german" if name == "ci" else "stdlib-docs", size.length, size.heldout, None)


@functools.cache
def parent(seed: int, name: str, size: Scale) -> nn.Module:
    """The top-2 mixture of a seed, trained on source code; made once a process."""
    model = llama(size, seed)
    router = {"method": "train.softmax_topk", "config": {"top_k": TOP_K, "softmax": "chosen"}}
    losses = {"balance": {"method": "train.balance_loss", "config": {"scaling": "transformers"}}}
    config = {"num_experts": EXPERTS, "expert_size": size.inner, "router": router, "losses": losses}
    swap(model, "train.moe", config)
    code = text("stdlib-code", size.length, size.heldout, BUDGETS[name].pick(ci=4, micro=60, full=150))
    train(model, code.train, size, seed, losses={"balance": ALPHA[0]})
    for layer in mixture_layers(model).values():
        del layer.losses["balance"]
    return model


class TopP(Edit):
    """The second of two experts only where the first one's probability does not exceed a threshold of the site.

    While training, the threshold follows what gives the wanted mean on each batch; in evaluation it stands.

    Args:
        mean: experts a token by site, between 1 and 2.
    """

    def __init__(self, mean: Mapping[str, float]) -> None:
        self.mean = mean
        self.threshold: dict[str, float] = {}

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        """See Edit."""
        assert routing.scores is not None
        first_T = routing.scores.probabilities().detach().amax(-1)
        if ctx.training:
            share = min(1.0, max(0.0, self.mean[site] - 1))
            now = float(first_T.quantile(share))
            self.threshold[site] = 0.9 * self.threshold.get(site, now) + 0.1 * now
        both_T = first_T <= self.threshold[site]
        kept_TK = torch.stack([torch.ones_like(both_T), both_T], 1)
        alone_TK = torch.ones_like(routing.weight_TK)
        weight_TK = torch.where(both_T[:, None], routing.weight_TK, alone_TK)
        return keep(routing, kept_TK, weight_TK)


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned arm.

    Attributes:
        load: experts a token by site while training, over all steps. held: at the end of the first half, over all
            sites.
    """

    model: nn.Module
    load: Mapping[str, float]
    held: float


def prepare(arm: str, seed: int, name: str, size: Scale) -> nn.Module:
    """The arm before its first step: the parent with its router changed."""
    model = copy.deepcopy(parent(seed, name, size))
    if arm in NULL_ARMS:
        config = {"num_experts": EXPERTS, "num_null": NULLS, "top_k": CHOICES}
        swap(model, "train.adamoe", {**config, **NULL_ARMS[arm]})
    swap(model, "train.null_balance_loss", {"null_bucket": "separate" if arm == "separate" else "mean"})
    return model


def edits_of(arm: str, load: Mapping[str, float]) -> list[Edit]:
    """What makes a top-2 arm use fewer experts: ``load`` by site, or one."""
    load = {site: min(value, TOP_K) for site, value in load.items()}
    chance: list[Edit] = [RandomDepth(load)]
    made: dict[str, list[Edit]] = {"random_depth": chance, "random_all": chance, "top_p": [TopP(load)]}
    return [RandomDepth(1.0)] if arm == "top1" else made.get(arm, [])


@functools.cache
def tuned(arm: str, seed: int, name: str, size: Scale) -> Tuned:
    """Fine-tune an arm; once a process."""
    model = prepare(arm, seed, name, size)
    edits = edits_of(arm, tuned(EQUAL_LOAD[arm], seed, name, size).load if arm in EQUAL_LOAD else {})
    total = tune_steps(size)
    optimizer = make_optimizer(model, OptimizerConfig(lr=size.lr / 2, weight_decay=0.1))
    stepper = Stepper(model, Causal(), optimizer)
    schedule = ScheduleConfig(kind="cosine", warmup=max(1, total // 10))
    batch = batches(prose(size, name).train, size, seed)
    torch.manual_seed(seed)
    model.train()
    loads: list[dict[str, float]] = []
    with session(edits=edits):
        for step in range(total):
            set_lr(optimizer, schedule.factor(step, total))
            weights = {"causal": 1.0, LOSS: ALPHA[2 * step >= total]}
            report = stepper.run(step, [batch(step)], weights=weights)
            tokens = size.batch * size.length
            loads.append({site: float(load_C[:EXPERTS].sum()) / tokens for site, load_C in report.load.items()})
    mean = {site: float(np.mean([load[site] for load in loads])) for site in loads[0]}
    last = loads[total * 3 // 8 : total // 2]
    return Tuned(model, mean, float(np.mean([list(load.values()) for load in last])))


class Uses(dict[str, list[Tensor]]):
    """Recorder: experts of each token by site, one tensor a forward."""

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """See Recorder."""
        self.setdefault(site, []).append(real_per_token(routing))


@functools.cache
def measure(arm: str, seed: int, name: str, size: Scale) -> tuple[Tensor, dict[str, Tensor]]:
    """On held-out prose: loss of each target in nats [N], and by site how many experts its token used, int64 [N]."""
    model, data = tuned(arm, seed, name, size).model, prose(size, name)
    edits = edits_of(arm, loads(measure(EQUAL_LOAD[arm], seed, name, size)[1]) if arm in EQUAL_LOAD else {})
    objective, uses, losses, targets = Causal(), Uses(), [], []
    (rows,) = data.heldout.sources.values()
    torch.manual_seed(seed)
    with torch.no_grad(), session(edits=edits):
        batch_of = batches(data.train, size, seed)
        model.train()
        for step in range(20 if arm == "top_p" else 0):  # its threshold for that load, from text it was trained on
            logits_of(model, batch_of(step))
        model.eval()
        for at in range(0, len(rows), size.batch):
            batch: Batch = objective.collate([rows[i] for i in range(at, min(at + size.batch, len(rows)))], [])
            labels_T = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
            with session(recorder=uses):
                logits_TV = logits_of(model, batch).flatten(0, 1)
            losses.append(F.cross_entropy(logits_TV, labels_T, reduction="none"))
            targets.append(labels_T != IGNORE)
    target_T = torch.cat(targets)
    return torch.cat(losses)[target_T], {site: torch.cat(parts)[target_T] for site, parts in uses.items()}


def loads(uses: Mapping[str, Tensor]) -> dict[str, float]:
    """Experts a token by site."""
    return {site: float(count_N.double().mean()) for site, count_N in uses.items()}


def rank_correlation(one: Tensor, two: Tensor) -> float:
    """Spearman's coefficient; 0 where one of the two does not vary."""
    from scipy.stats import spearmanr

    if min(len(torch.unique(ranks)) for ranks in (one, two)) < 2:
        return 0.0
    return float(spearmanr(one.numpy(), two.numpy()).statistic)


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Fine-tune one arm, then measure loss, load and expert operations on held-out text."""
    size = scale(budget)
    losses_N, uses = measure(arm, seed, budget.name, size)
    layers, load = mixture_layers(tuned(arm, seed, budget.name, size).model), loads(uses)
    flops = [
        load[site] * layer.bank.flops_per_row(0) + 2 * size.dim * layer.router.num_choices
        for site, layer in layers.items()
    ]
    values = {
        "heldout_loss": float(losses_N.mean()),
        "load": float(np.mean(list(load.values()))),
        "load_least": min(load.values()),
        "load_most": max(load.values()),
        "without_expert": float(np.mean([float((count_N == 0).double().mean()) for count_N in uses.values()])),
        "with_one": float(np.mean([float((count_N == 1).double().mean()) for count_N in uses.values()])),
        "megaflops": sum(flops) / 1e6,
    }
    if arm in NULL_ARMS:
        settings: Any = next(iter(layers.values())).router.config
        values["held"] = tuned(arm, seed, budget.name, size).held / settings.even_load
        reference_N, _ = measure("top2", seed, budget.name, size)
        total_N = torch.stack(list(uses.values())).sum(0)
        values["count_by_difficulty"] = rank_correlation(total_N, reference_N)
    return values


STUDY = Study(
    paper="adamoe",
    title="Null experts",
    setting=(
        "A byte-level Llama model (4 layers of width 128, 8 experts of 256, top-2) is trained for 400 steps of 1024 "
        "bytes on the standard library's source files, then fine-tuned for 240 steps on its prose. The method adds 8 "
        "tiled nulls and takes 3 choices. The balance loss weighs 0.02 in the first half and 0.0001 in the second, in "
        "all arms. The controls of equal load use, layer by layer, as many experts as the arm they are held against "
        "did in training and on the held-out text. The paper fine-tunes Mixtral-8x7B with low-rank adapters on single "
        "tasks and measures accuracy."
    ),
    claims=(
        Claim(
            key="held",
            text="The balance loss holds the load at k n / (n + m) while its weight is 0.02.",
            where="load balancing with null experts; the LoRA runs with 4 experts",
            claimed="1.78 of 1.78 experts a token with 5 nulls and 4 choices",
            metric="held",
            judge=Within(arm="adamoe", low=0.85, high=1.15),
            tells=(
                "{adamoe} of it, {separate} with nulls balanced one by one, {normalise_all} with weights over all "
                "chosen; on held-out text, after the weight fell, {adamoe.load} experts a token."
            ),
        ),
        Claim(
            key="load",
            text="Fine-tuned with nulls, a top-2 mixture uses clearly fewer experts.",
            where="mean of six tasks, 8 nulls, 3 choices",
            claimed="2.00 to 1.66 experts a token",
            metric="load",
            judge=Within(arm="adamoe", high=1.75),
            tells=(
                "{adamoe} experts a token, {adamoe.load_least} to {adamoe.load_most} by layer; {adamoe.held} of the "
                "even load before the weight of the balance loss fell; {separate} with nulls balanced one by one, "
                "{normalise_all} with weights over all chosen."
            ),
        ),
        Claim(
            key="no_loss",
            text="It is as good as the mixture fine-tuned as it was.",
            where="mean of six tasks, 8 nulls, 3 choices",
            claimed="accuracy 84.64 to 85.35",
            metric="heldout_loss",
            judge=NotWorse(method="adamoe", control="top2", tolerance=0.01),
            tells=(
                "loss {top2} with {top2.load} experts a token, {adamoe} with {adamoe.load}. With one expert for every "
                "token it is {top1}; with the method's load dealt by chance {random_depth}, by the first expert's "
                "probability {top_p}. A share of {adamoe.with_one} of the method's tokens, mean over layers, had one "
                "expert and {adamoe.without_expert} none; their weights in that layer have no gradient. With weights "
                "over all chosen one expert has one: {normalise_all} with {normalise_all.load} experts."
            ),
        ),
        Claim(
            key="adaptive",
            text="It is the choice of the tokens that pays, not the smaller number alone.",
            where="the refuting control; the paper has none",
            claimed="tokens that need fewer experts use fewer",
            metric="heldout_loss",
            judge=Beats(method="adamoe", control="random_depth"),
            tells=(
                "with {adamoe.load} experts a token, loss {adamoe} by the method's choice, {random_depth} by chance, "
                "{top_p} by the first expert's probability. A share of {adamoe.with_one} of the tokens had one expert "
                "and {adamoe.without_expert} none; their weights in that layer have no gradient. With weights over all "
                "chosen, where nulls keep a share and one expert has a gradient, and {normalise_all.load} experts: "
                "{normalise_all} by choice, {random_all} by chance. Rank correlation of a token's experts and its loss "
                "under top-2: {adamoe.count_by_difficulty}, over all chosen {normalise_all.count_by_difficulty}."
            ),
        ),
    ),
    arms=(
        Arm(name="adamoe", text="8 nulls, 3 choices, nulls balanced as one bucket, weights over true experts"),
        Arm(name="top2", text="the mixture as it was, 2 experts a token", role="control"),
        Arm(name="random_depth", text="1 or 2 experts a token by chance, the method's load", role="control"),
        Arm(name="top_p", text="1 or 2 experts by the first one's probability, the method's load", role="reference"),
        Arm(name="top1", text="the best expert of every token", role="reference"),
        Arm(name="separate", text="the method with nulls balanced one by one", role="reference"),
        Arm(name="normalise_all", text="the method with weights over all chosen, nulls included", role="reference"),
        Arm(name="random_all", text="1 or 2 experts a token by chance, normalise_all's load", role="reference"),
    ),
    run=run,
    methods=("train.adamoe", "train.null_balance_loss", "train.softmax_topk", "train.balance_loss", "train.moe"),
    units={"heldout_loss": "nats a byte", "load": "experts a token", "held": "of k n / (n + m)"},
)
