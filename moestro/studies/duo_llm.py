"""Duo-LLM: how much better could tokens be sent, how near comes a trained router, and how much of the gap is luck?

One model a seed is trained with random routing between a big and a small module in every layer. The oracle tries every
pattern of choices with the answer in hand. It is held against the same minimum over perturbed runs of the best fixed
pattern, which needs no routing at all to gain, against routers trained for three budgets, and against a dense model.
"""

import copy
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from moestro.core.inputs import MeterInputs
from moestro.core.layer import MoELayer, mixture_layers
from moestro.core.registry import method
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, NotWorse, Study, Within
from moestro.studies._language import Scale, Text, batches, heldout, llama, text, train
from moestro.training.objectives import Causal
from moestro.training.optimizer import make_optimizer
from moestro.training.recipe import OptimizerConfig
from moestro.training.step import Stepper


RATIO = 16
ALPHA = 1.0  # weight of the budget loss
TAU = (1.0, 0.1)


def scale(budget: Budget) -> Scale:
    """The random-routing run; a router's takes a quarter of its steps."""
    return budget.pick(
        ci=Scale(layers=2, dim=32, inner=64, heads=2, vocabulary=512, length=32, batch=4, steps=4, heldout=4),
        micro=Scale(layers=4, dim=64, inner=256, heads=2, vocabulary=1024, length=64, batch=8, steps=80, heldout=16),
        full=Scale(layers=8, dim=128, inner=512, heads=4, steps=240, heldout=16),
    )


def data_of(size: Scale, budget: Budget) -> Text:
    """The study's text."""
    return text(size.vocabulary, size.length, size.heldout, limit=budget.pick(ci=6, micro=120, full=None))


def route(model: Any, size: Scale, **config: Any) -> nn.Module:
    """Give every layer a route; modules that are there stay."""
    use = method("train.duo_llm")
    for number, block in enumerate(model.model.layers):
        path = f"model.layers.{number}.mlp"
        site = Site(path=path, kind="mlp", module=nn.Identity(), dim=size.dim, out=size.dim, layer=number)
        layer: MoELayer = use.build(site, use.configure({"big": size.inner, "small_ratio": RATIO, **config}), Shared())
        if isinstance(block.mlp, MoELayer):
            layer.bank = block.mlp.bank
        block.mlp = layer
    return model


@functools.cache
def duo(seed: int, name: str, size: Scale) -> nn.Module:
    """The model of a seed after random routing; made once a process."""
    model = route(llama(size, seed), size)
    train(model, data_of(size, BUDGETS[name]).train, size, seed)
    return model.eval()


def routed(seed: int, name: str, size: Scale, share: float) -> nn.Module:
    """The model with routers trained for a share of big modules, all else at rest."""
    model = copy.deepcopy(duo(seed, name, size))
    torch.manual_seed(seed)  # whether the model was at hand or trained just now, the routers start alike
    route(model, size, route="learned", budget=share)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in mixture_layers(model).values():
        layer.router.weight.requires_grad_(True)
    stepper = Stepper(model, Causal(), make_optimizer(model, OptimizerConfig(lr=2e-2, weight_decay=0.0)))
    steps = max(2, size.steps // 4)
    batch = batches(data_of(size, BUDGETS[name]).train, size, seed + 1)
    model.train()
    for step in range(steps):
        tau = TAU[0] * (TAU[1] / TAU[0]) ** (step / max(steps - 1, 1))
        with session(values={"duo_tau": tau}):
            stepper.run(step, [batch(step)], weights={"causal": 1.0, "budget": ALPHA})
    return model.eval()


def held(size: Scale, budget: Budget) -> list[dict[str, torch.Tensor]]:
    """The held-out rows as batches."""
    (rows,) = data_of(size, budget).heldout.sources.values()
    count = min(size.heldout, len(rows))
    parts = []
    for at in range(0, count, size.batch):
        batch = Causal().collate([rows[i] for i in range(at, min(at + size.batch, count))], [])
        parts.append({"input_ids": batch["input_ids"]})
    return parts


@functools.cache
def oracle(seed: int, name: str, size: Scale) -> tuple[dict[str, float], tuple[tuple[float, ...], ...]]:
    """Numbers and the table of budgets of the oracle, with the null; made once a process."""
    budget = BUDGETS[name]
    use = method("inspect.route_oracle")
    config = use.configure({"sequential": budget.pick(ci=2, micro=16, full=64)})
    subject = MeterInputs(model=duo(seed, name, size), batches=held(size, budget), seed=seed)
    report = use.entry("measure")(subject, config)
    return report.numbers, tuple(tuple(row) for row in report.tables["budgets"].rows)


def evaluate(model: nn.Module, size: Scale, budget: Budget) -> tuple[float, float]:
    """(loss, share of big modules) on the held-out rows, routes hard."""
    losses, big, total = [], 0, 0
    for batch in held(size, budget):
        with torch.no_grad(), session(collect=True) as opened:
            losses.append(method("inspect.route_oracle").module.next_token(model, batch)[0])
        for ctx, routing in itertools.chain.from_iterable(
            ((ctx, routing) for routing in ctx.routings.values()) for ctx in opened.take()
        ):
            assert routing is not None
            assert ctx.tokens is not None
            counts = routing.counts_C(ctx.tokens.valid_T)
            big, total = big + int(counts[0]), total + int(counts.sum())
    return float(torch.cat(losses).mean()), big / total


def chosen_budgets(layers: int) -> tuple[int, ...]:
    """A quarter, half and three quarters of the layers."""
    return tuple(sorted({max(1, round(layers * share)) for share in (0.25, 0.5, 0.75)}))


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Measure one arm on the model of the seed."""
    size, name = scale(budget), budget.name
    numbers, table = oracle(seed, name, size)
    every = range(size.layers + 1)
    columns = {"oracle": 2, "null": 3, "by_entropy": 4, "fixed": 5, "random": 6}
    if arm == "big":
        return {"loss_at_1": numbers["first choice everywhere"], "loss": numbers["first choice everywhere"]}
    if arm == "small":
        return {"loss": numbers["last choice everywhere"]}
    if arm == "dense":
        data = data_of(size, budget)
        model = llama(size, seed)
        train(model, data.train, size, seed)
        return {"loss": heldout(model, data.heldout, size)}
    if arm == "router":
        return measure_router(seed, name, size, budget)
    losses = [table[b][columns[arm]] for b in every]
    best = min(every, key=lambda b: losses[b])
    found = {"loss": losses[best], "best_budget": float(best), "loss_at_1": losses[1]}
    found |= {f"loss_at_{b}": losses[b] for b in chosen_budgets(size.layers)}
    if arm in ("oracle", "null"):
        found["gain_over_ends"] = min(losses[0], losses[-1]) - min(losses[1:-1])
    if arm == "oracle":
        ones = table[1]
        found["surviving_share_at_1"] = (ones[3] - ones[2]) / max(ones[5] - ones[2], 1e-9)
        fixed = min(row[5] for row in table)
        luck = min(row[3] for row in table)
        found["surviving_share"] = (luck - losses[best]) / max(fixed - losses[best], 1e-9)
        found["hard_tokens_gaining_little"] = numbers["share of hard tokens that gain little"]
        found["sequential_gain"] = numbers["sequential router"] - numbers["sequential oracle"]
    return found


def measure_router(seed: int, name: str, size: Scale, budget: Budget) -> dict[str, float]:
    """Loss and share of big modules of routers for three budgets; how much nearer they are to a fixed pattern.

    A router that misses its budget is held against oracle and pattern at the share it uses, not at the one it was
    asked for; between whole numbers of layers these are interpolated. A random route has the router's share too.
    """
    _, table = oracle(seed, name, size)
    found: dict[str, float] = {}
    rows: list[dict[str, float]] = []
    for number, layers in enumerate(chosen_budgets(size.layers)):
        loss, share = evaluate(routed(seed, name, size, layers / size.layers), size, budget)
        best, fixed = (at_share(table, column, share) for column in (2, 5))
        torch.manual_seed(seed + number)
        tokens = route(
            copy.deepcopy(duo(seed, name, size)), size, route="random", probabilities=[share, 1 - share]
        ).eval()
        random, _ = evaluate(tokens, size, budget)
        found |= {f"loss_at_{layers}": loss, f"share_at_{layers}": share}
        rows.append({"share": share, "asked": layers / size.layers, "oracle": best, "fixed": fixed, "random": random})
        rows[-1] |= {"loss": loss, "nearer_to_fixed": abs(loss - best) - abs(loss - fixed)}
    worst = min(rows, key=lambda row: row["nearer_to_fixed"])
    found |= {f"worst_{name}": value for name, value in worst.items() if name != "nearer_to_fixed"}
    return {**found, "nearer_to_fixed": worst["nearer_to_fixed"], "loss": min(row["loss"] for row in rows)}


def at_share(table: tuple[tuple[float, ...], ...], column: int, share: float) -> float:
    """A column of the table of budgets at a share of big modules, linear between whole numbers of layers."""
    return float(np.interp(share * (len(table) - 1), [row[0] for row in table], [row[column] for row in table]))


STUDY = Study(
    paper="duo-llm",
    title="Oracle, router and luck",
    setting=(
        "A Llama model (8 layers, width 128, modules of 512 and 32) trained with random routing for 240 steps of 1024 "
        "tokens on the standard library's source files; all 256 patterns, and as many perturbed runs, on 2048 held-out "
        "tokens; routers trained for 60 steps at a quarter, half and three quarters big. The paper trains 12 layers of "
        "width 2560 on 300 billion tokens. Oracle losses know the answer and are no quality a model has."
    ),
    claims=(
        Claim(
            key="one_big_layer",
            text="One big layer chosen by the oracle is as good as big modules in all layers.",
            where="abstract",
            claimed="one big layer beats all 12",
            metric="loss_at_1",
            judge=NotWorse(method="oracle", control="big", tolerance=0.0),
            tells=(
                "with one big layer oracle {oracle}, null {null}, best fixed pattern {fixed}; big everywhere {big}, "
                "small everywhere {small.loss}, a dense model {dense.loss}."
            ),
        ),
        Claim(
            key="intermediate_optimum",
            text="The oracle does best at an intermediate budget.",
            where="figure 3",
            claimed="6 of 12 big layers",
            metric="gain_over_ends",
            judge=Within(arm="oracle", low=0.0),
            tells=(
                "the best budget between is {oracle} better than the better end, that of the null {null}; best budgets "
                "{oracle.best_budget}, null {null.best_budget}, fixed {fixed.best_budget}."
            ),
        ),
        Claim(
            key="router_is_far",
            text="A trained router is nearer to the best fixed pattern than to the oracle, at every budget.",
            where="figure 4",
            claimed="near the best of 100 random patterns",
            metric="nearer_to_fixed",
            judge=Within(arm="router", low=0.0),
            tells=(
                "at the budget where it is least so, asked for {router.worst_asked} big it uses "
                "{router.worst_share} and has {router.worst_loss}; there oracle {router.worst_oracle}, best fixed "
                "pattern {router.worst_fixed}, modules at random {router.worst_random}."
            ),
        ),
        Claim(
            key="more_than_luck",
            text="The oracle gains more than the same minimum over perturbed runs that route nothing.",
            where="the control the paper lacks",
            claimed="not measured in the paper",
            metric="loss",
            judge=Beats(method="oracle", control="null", by=0.0),
            tells=(
                "the best budget of the null is {null.best_budget}, that of the oracle {oracle.best_budget}; the share "
                "of the oracle's gain over the best fixed pattern that the null misses is {oracle.surviving_share}, "
                "with one big layer {oracle.surviving_share_at_1}."
            ),
        ),
        Claim(
            key="not_explained_by_luck",
            text="More than a fifth of the oracle's gain over the best fixed pattern is beyond luck.",
            where="the control the paper lacks",
            claimed="not measured in the paper",
            metric="surviving_share",
            judge=Within(arm="oracle", low=0.2),
            tells=(
                "oracle {oracle.loss}, the null's minimum over as many perturbed runs {null.loss}, best fixed pattern "
                "{fixed.loss}, the pattern of least entropy {by_entropy.loss}."
            ),
        ),
    ),
    arms=(
        Arm(name="oracle", text="the best pattern of every token, the answer known"),
        Arm(name="router", text="trained routers, hard, for three budgets"),
        Arm(name="null", text="the best fixed pattern perturbed as often, the same minimum", role="control"),
        Arm(name="fixed", text="the best pattern for all tokens, chosen on other tokens", role="control"),
        Arm(name="random", text="mean over all patterns of a budget", role="control"),
        Arm(name="by_entropy", text="the pattern of least entropy for every token, no answer needed", role="reference"),
        Arm(name="big", text="big modules everywhere", role="control"),
        Arm(name="small", text="small modules everywhere", role="reference"),
        Arm(name="dense", text="a dense model of the big width, trained as long", role="reference"),
    ),
    run=run,
    methods=("train.duo_llm", "inspect.route_oracle"),
    units={"loss": "nats a token", "loss_at_1": "nats a token", "best_budget": "big layers"},
)
