"""EvoMoE: is it worth running every expert early, at equal training FLOPs, against routers that are sparse all along?

All arms train the same Llama model with mixtures in every other layer; its initial weights and the order of its data
depend on the seed alone. An arm's clock is the share of its budget that is spent: training FLOPs, counted step by step
from the experts that really ran (``switch_steps`` counts steps instead). The method trains one expert until 0.15,
spawns eight masked copies, lets the gate sharpen until 0.6, and ends with one expert a token.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro import surgery
from moestro.core.context import RoutingContext
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.core.router import Router, topk_indices
from moestro.core.routing import Routing, Scores
from moestro.core.session import Edit, session
from moestro.data.dataset import Dataset
from moestro.methods.planning import make_plan
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, Study, Within
from moestro.studies._language import Scale, Text, batches, heldout, llama, loads, text
from moestro.training.objectives import Causal
from moestro.training.optimizer import follow, make_optimizer, set_lr
from moestro.training.recipe import OptimizerConfig
from moestro.training.schedule import ScheduleConfig
from moestro.training.size import size_of
from moestro.training.step import Stepper, StepReport


EXPERTS, RATE, AUX = 8, 0.1, 0.01
SPAWN, HARD = 0.15, 0.6  # shares of the budget: the copies are made, one expert a token
COOL = 0.3  # the temperature at which the active experts are counted
LOOKS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)  # shares at which held-out choices are compared

GATE_CONFIG = {"stage": "hard", "progress": 1.0, "tau_max": 2.0, "tau_min": 0.2}
GATE = {"method": "train.evomoe", "config": GATE_CONFIG}
SWITCH = {"method": "train.switch", "config": {}}
SOFTMAX = {"method": "train.softmax_topk", "config": {"renormalise": False}}
ACTIVE_BALANCE = {"balance": {"method": "train.dts_balance_loss"}}
BALANCE = {"balance": {"method": "train.balance_loss"}}


def tau_at(progress: float) -> float:
    """The gate's temperature."""
    gate = method("train.evomoe")
    return gate.module.temperature(progress, gate.configure(GATE_CONFIG))


class Widen(Edit):
    """The best k experts of a token by the router's own scores, k from the session's value ``experts``."""

    def on_routing(self, site: str, routing: Routing, router: Router, ctx: RoutingContext) -> Routing:
        """See Edit."""
        scores = routing.scores
        assert scores is not None
        expert_TK = topk_indices(scores.select_TC, int(ctx.value("experts", 1)))
        weight_TK = router.weigh(scores.gate_TC.gather(1, expert_TK))
        return Routing.from_topk(expert_TK, weight_TK, num_experts=routing.num_experts, scores=scores)


class Quiet(Edit):
    """The dense-to-sparse gate without noise."""

    def on_scores(self, site: str, scores: Scores, ctx: RoutingContext) -> Scores:
        """See Edit."""
        sharp_TC = (scores.logits_TC / tau_at(ctx.value("dts_progress", 1.0))).softmax(-1)
        return scores.replace(select_TC=sharp_TC.detach())


@dataclass(frozen=True)
class Setup:
    """What an arm is made of.

    ``spawn``: the share of the budget after which it is a mixture of copies; at 0 it is one of random experts from the
    start. ``edit`` changes what the router says. ``frozen``: a router that never learns.
    """

    router: Mapping[str, Any]
    losses: Mapping[str, Any] = field(default_factory=lambda: BALANCE)
    spawn: float = 0.0
    top_k: int = 1
    edit: Edit | None = None
    frozen: bool = False


SETUPS = {
    "evomoe": Setup(GATE, ACTIVE_BALANCE, spawn=SPAWN),
    "quiet": Setup(GATE, ACTIVE_BALANCE, spawn=SPAWN, edit=Quiet()),
    "dts": Setup(GATE, ACTIVE_BALANCE),
    "warm": Setup(SWITCH, spawn=SPAWN),
    "switch": Setup(SWITCH),
    "switch_steps": Setup(SWITCH),
    "top2": Setup(SOFTMAX, top_k=2),
    "anneal": Setup(SOFTMAX, edit=Widen()),
    "hash": Setup({"method": "train.hash_router", "config": {}}, losses={}),
    "fixed": Setup(SWITCH, frozen=True),
}


def scale(budget: Budget) -> Scale:
    """``steps`` is the budget in steps of a top-1 mixture."""
    return budget.pick(
        ci=Scale(layers=2, dim=32, inner=64, heads=2, vocabulary=512, length=32, batch=4, steps=5, heldout=8),
        micro=Scale(layers=2, dim=64, inner=128, heads=2, vocabulary=512, length=64, batch=8, steps=100, heldout=32),
        full=Scale(layers=4, dim=128, inner=256, vocabulary=512, batch=4, steps=400, heldout=64),
    )


# -- the model and what a step costs ----------------------------------------------------------------------------


def spawn(model: nn.Module, setup: Setup, seed: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Every other feed-forward becomes a mixture of masked copies, in place; the optimiser's moments come along."""
    config = {"layers": "every:2", "num_experts": EXPERTS, "rate": RATE, "top_k": setup.top_k}
    config |= {"router": setup.router, "losses": setup.losses}
    surgery.apply(model, make_plan("convert.diversify", model, config, seed=seed), optimizer=optimizer)
    for layer in mixture_layers(model).values():
        layer.router.requires_grad_(not setup.frozen)


def untie(model: nn.Module, seed: int) -> None:
    """Give each expert random weights of its own, as a mixture from scratch has."""
    torch.manual_seed(seed + 2000)
    for layer in mixture_layers(model).values():
        for parameter in layer.bank.parameters():
            nn.init.normal_(parameter, std=0.02)


def backbone_flops(model: nn.Module, length: int) -> int:
    """Forward operations of a token in all but the routed experts."""
    flops = size_of(model, length).forward_flops
    for layer in mixture_layers(model).values():
        flops -= (layer.router.top_k or EXPERTS) * layer.bank.flops_per_row(0)
    return flops


def step_flops(model: nn.Module, report: StepReport, length: int) -> int:
    """Training operations of a step, forward and backward: every expert evaluation counts once for each token."""
    rows = sum(int(report.load[s].sum()) * x.bank.flops_per_row(0) for s, x in mixture_layers(model).items())
    return 3 * (report.tokens * backbone_flops(model, length) + rows)


def budget_flops(size: Scale) -> int:
    """Training operations of ``size.steps`` steps of a top-1 mixture."""
    model = llama(size, 0, watch=False)
    spawn(model, SETUPS["switch"], 0)
    per_token = backbone_flops(model, size.length)
    per_token += sum(layer.bank.flops_per_row(0) for layer in mixture_layers(model).values())
    return 3 * size.steps * size.batch * size.length * per_token


# -- a run ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One arm in training and what was seen on the way. It ends at ``goal`` FLOPs, or steps with ``by_steps``."""

    model: nn.Module
    setup: Setup
    data: Text
    size: Scale
    seed: int
    goal: int
    by_steps: bool = False
    flops: int = 0
    steps: int = 0
    seen: dict[str, float] = field(default_factory=dict)
    tau: float = float("inf")
    choices: list[Tensor] = field(default_factory=list)

    @property
    def done(self) -> float:
        """The clock: 0 at the start, 1 or a little more at the end."""
        return (self.steps if self.by_steps else self.flops) / self.goal

    def values(self, done: float) -> dict[str, float]:
        """What the phases of a recipe would set at this share of the budget."""
        begin = self.setup.spawn
        progress = (done - begin) / (HARD - begin)
        if isinstance(self.setup.edit, Widen):
            return {"experts": max(1.0, float(EXPERTS - int(progress * EXPERTS)))}
        if self.setup.router is GATE:
            return {"dts_stage": 1.0 if done < HARD else 2.0, "dts_progress": min(1.0, max(0.0, progress))}
        return {}

    def look(self, values: Mapping[str, float], report: StepReport) -> None:
        """Keep the mean number of active experts at the first mixture step, once it is cool, and at the end."""
        if not report.load:
            return
        mean = float(np.mean([float(load_C.sum()) / report.tokens for load_C in report.load.values()]))
        self.seen.setdefault("active_start", mean)
        self.seen["active_end"] = mean
        if values.get("dts_stage") == 1.0 and self.tau > COOL:  # the last step counts where none is that cool
            self.tau = tau_at(values["dts_progress"])
            self.seen["active_cool"] = mean

    def train(self) -> None:
        """Train to the goal."""
        optimizer = make_optimizer(self.model, OptimizerConfig(lr=self.size.lr))
        stepper = Stepper(self.model, Causal(), optimizer)
        schedule = ScheduleConfig(kind="cosine", warmup=0.1)
        batch = batches(self.data.train, self.size, self.seed)
        looks = list(LOOKS)
        mixed = self.setup.spawn == 0.0
        with session(edits=[] if self.setup.edit is None else [self.setup.edit]):
            while (done := self.done) < 1.0:
                if not mixed and done >= self.setup.spawn:
                    mixed = True
                    spawn(self.model, self.setup, self.seed, optimizer)
                    follow(optimizer, self.model, OptimizerConfig(lr=self.size.lr))
                    self.seen["similarity_spawned"] = similarity(self.model)
                set_lr(optimizer, schedule.factor(int(1000 * done), 1000))
                self.model.train()
                values = self.values(done) if mixed else {}
                weights = {"causal": 1.0, **({"balance": AUX} if mixed and self.setup.losses else {})}
                report = stepper.run(self.steps, [batch(self.steps)], weights=weights, values=values)
                self.steps += 1
                self.flops += step_flops(self.model, report, self.size.length)
                self.look(values, report)
                while looks and self.done >= looks[0]:
                    looks.pop(0)
                    self.choices.append(first_choices(self.model, self.data.heldout, self.size))


def first_choices(model: nn.Module, data: Dataset, size: Scale) -> Tensor:
    """The first choice of every held-out token in every mixture layer, int64, one after another."""
    (rows,) = data.sources.values()
    found = []
    model.eval()
    with torch.no_grad(), session(collect=True) as opened:
        for at in range(0, len(rows), size.batch):
            examples = [rows[place] for place in range(at, min(at + size.batch, len(rows)))]
            Causal()(model, Causal().collate(examples, []), {})
        for ctx in opened.take():
            for routing in ctx.routings.values():
                assert routing is not None
                found.append(routing.expert_TK[:, 0])
    return torch.cat(found)


def fluctuation(choices: Sequence[Tensor]) -> float:
    """Mean share of first choices that change from one look to the next."""
    return float(np.mean([float((a != b).double().mean()) for a, b in itertools.pairwise(choices)]))


def similarity(model: nn.Module) -> float:
    """Mean cosine between the weights of two experts of a layer, over pairs and layers."""
    found = []
    for layer in mixture_layers(model).values():
        flat = torch.cat([p.detach().flatten(1) for p in layer.bank.parameters()], 1).double()
        flat = nn.functional.normalize(flat, dim=1)
        cosine_EE = flat @ flat.T
        found.append(float((cosine_EE.sum() - EXPERTS) / (EXPERTS * (EXPERTS - 1))))
    return float(np.mean(found))


@functools.cache
def outcome(arm: str, seed: int, name: str) -> Mapping[str, float]:
    """Train an arm and measure it; once a process, since ``switch_steps`` asks how far the method came."""
    budget = BUDGETS[name]
    size, setup = scale(budget), SETUPS[arm]
    model = llama(size, seed, watch=False)
    if setup.spawn == 0.0:
        spawn(model, setup, seed)
        untie(model, seed)
    by_steps = arm == "switch_steps"
    goal = int(outcome("evomoe", seed, name)["steps"]) if by_steps else budget_flops(size)
    data = text(size.vocabulary, size.length, size.heldout, limit=budget.pick(ci=6, micro=120, full=None))
    run = Run(model, setup, data, size, seed, goal, by_steps)
    run.train()
    found = {**run.seen, "steps": float(run.steps), "gigaflops": run.flops / 1e9}
    found["heldout_loss"] = heldout(model, data.heldout, size)
    if setup.router is GATE:
        with session(values={"dts_stage": 0}):
            found["heldout_dense"] = heldout(model, data.heldout, size)
    load = loads(model, data.heldout, size)
    return {
        **found,
        "fluctuation": fluctuation(run.choices),
        "load_cv": float(np.mean([float(c.double().std(correction=0) / c.double().mean()) for c in load.values()])),
        "similarity": similarity(model),
    }


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train one arm, then measure it with one expert a token (two for ``top2``) on held-out text."""
    return outcome(arm, seed, budget.name)


STUDY = Study(
    paper="evomoe",
    title="One expert, then many, then one a token",
    setting=(
        "A Llama model (4 layers, width 128) with 8 experts of inner width 256 in every other layer, trained on the "
        "standard library's source files. Arms spend the training FLOPs of 400 top-1 steps of 512 tokens, counted "
        "from the experts that ran; held-out loss is that of one expert a token. The paper trains RoBERTa, GPT and "
        "translation models on GPUs; its body and tables could not be read, so claims are those of the abstract."
    ),
    claims=(
        Claim(
            key="equal_flops", metric="heldout_loss", judge=Beats(method="evomoe", control="switch", by=0.01),
            text="It ends with a lower loss than Switch routing at equal training FLOPs.",
            where="abstract; version 1: 2.0x faster to the same perplexity on GPT-MoE 1.5B (recalled, unverified)",
            claimed="better than Switch (no number); 1.42x FLOPs efficiency (version 1, recalled, unverified)",
            tells="steps for the same FLOPs: {evomoe.steps} against {switch.steps}; Switch after equal steps "
            "{switch_steps}, experts annealed from 8 to 1 on a fixed schedule {anneal}.",
        ),
        Claim(
            key="equal_steps", metric="heldout_loss", judge=Beats(method="evomoe", control="switch_steps", by=0.01),
            text="The weaker statement: it ends with a lower loss than Switch routing after equally many steps.",
            where="abstract",
            claimed="better than Switch (no number)",
            tells="cosine of two experts: {evomoe.similarity_spawned} when spawned, {evomoe.similarity} at the end, "
            "{switch_steps.similarity} under Switch; loss without noise on the gate {quiet}.",
        ),
        Claim(
            key="hash", metric="heldout_loss", judge=Beats(method="evomoe", control="hash", by=0.01),
            text="It ends with a lower loss than a hash layer at equal training FLOPs.",
            where="abstract",
            claimed="better than Hash Layer (no number)",
            tells="Switch {switch}, a router that never learns {fixed}, top-2 {top2}.",
        ),
        Claim(
            key="expert_diversify", metric="heldout_loss", judge=Beats(method="evomoe", control="dts"),
            text="Training one expert first and spawning the others from it helps.",
            where="abstract, expert-diversify phase",
            claimed="part of what makes it better (no number)",
            tells="mixture steps are dearer while the gate is dense: {evomoe.steps} steps with the first phase, "
            "{dts.steps} without; copies under Switch {warm}, random experts under Switch {switch}; cosine of two "
            "experts at the end {evomoe.similarity} and {dts.similarity}.",
        ),
        Claim(
            key="gate_sparsify", metric="heldout_loss", judge=Beats(method="evomoe", control="warm"),
            text="A gate that starts dense and sharpens is better than a top-1 gate over the same spawned experts.",
            where="abstract, gate-sparsify phase",
            claimed="part of what makes it better (no number)",
            tells="{evomoe.steps} steps against {warm.steps}; two experts end at cosine {evomoe.similarity} and "
            "{warm.similarity}; loss without noise on the gate {quiet}.",
        ),
        Claim(
            key="stable", metric="fluctuation", judge=Beats(method="evomoe", control="switch"),
            text="Its routing is steadier than Switch's: fewer first choices change in the last 30 % of training.",
            where="abstract (mature experts before a sparse gate)",
            claimed="a more stable gate (no number)",
            tells="without noise on the gate {quiet}, over spawned experts with Switch {warm}, never learning {fixed}.",
        ),
        Claim(
            key="starts_dense", metric="active_start", judge=Within(arm="evomoe", low=7.92, high=8.0),
            text="At temperature 2 all 8 experts are active.",
            where="the gate's definition with threshold 0.001",
            claimed="dense at first",
            tells="active in the first mixture step {evomoe}, without noise {quiet}, over random experts {dts}.",
        ),
        Claim(
            key="sharpens", metric="active_cool", judge=Within(arm="evomoe", low=1.0, high=5.0),
            text="The falling temperature alone switches experts off: at 0.3 at most 5 of 8 are active.",
            where="the gate's definition with threshold 0.001",
            claimed="sparse in the end",
            tells="active at temperature 0.3 {evomoe}, without noise, so by logits alone, {quiet}, over random experts "
            "{dts}; at the end {evomoe.active_end}.",
        ),
        Claim(
            key="ends_sparse", metric="active_end", judge=Within(arm="evomoe", low=1.0, high=1.0),
            text="After the hard switch exactly one expert a token is active.",
            where="the gate's definition",
            claimed="top-1 in the end",
            tells="active in the last step {evomoe}, without noise {quiet}, over random experts {dts}.",
        ),
    ),
    arms=(
        Arm(name="evomoe", text="one expert to 15 %, eight masked copies, gate sharpens to 60 %, then top-1"),
        Arm(name="quiet", text="the method without noise on its gate", role="reference"),
        Arm(name="switch", text="Switch top-1 from scratch, the same FLOPs", role="control"),
        Arm(name="switch_steps", text="Switch top-1 from scratch, as many steps as the method took", role="control"),
        Arm(name="dts", text="the same gate and decay over random experts", role="control"),
        Arm(name="warm", text="one expert to 15 %, eight masked copies, Switch top-1", role="control"),
        Arm(name="hash", text="hash routing from scratch, the same FLOPs", role="control"),
        Arm(name="fixed", text="Switch top-1 with a random router that never learns", role="reference"),
        Arm(name="anneal", text="top-k over random experts, k falls from 8 to 1 on a fixed schedule", role="reference"),
        Arm(name="top2", text="softmax top-2 from scratch, the same training FLOPs", role="reference"),
    ),
    run=run,
    methods=(
        "train.evomoe", "train.dts_balance_loss", "convert.diversify", "train.switch", "train.softmax_topk",
        "train.hash_router", "train.balance_loss", "train.moe",
    ),
    units={
        "heldout_loss": "nats a token", "fluctuation": "share of choices", "active_start": "experts a token",
        "active_cool": "experts a token", "active_end": "experts a token",
    },
)  # fmt: skip
