"""Mixture-of-supernets: how much of what weight sharing costs do mixed weights win back, and is it the architecture?

One run trains 18 sizes of a Llama model at once: a plain supernet slices them out of one set of weights, the method
mixes two copies of the feed-forward weights for each size. Six sizes are then compared with the same networks trained
alone for as many updates. Initial weights, order of the data and drawn architectures depend on the seed alone.
"""

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moestro.core.registry import method
from moestro.core.session import session
from moestro.models.swap import swap
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, NotWorse, Study, Within
from moestro.studies._hypernetwork import correct
from moestro.studies._language import Scale, Text, batches, heldout, llama, text, train, updates_until
from moestro.training.objectives import make_objective
from moestro.training.optimizer import make_optimizer, set_lr
from moestro.training.recipe import ObjectiveConfig, OptimizerConfig
from moestro.training.schedule import ScheduleConfig
from moestro.training.size import size_of
from moestro.training.step import Stepper


ID = "train.mixture_of_supernets"
COPIES = 2
LONGER = 1.3  # more steps for the plain supernet: what mixing may cost at most
GAP = 0.02  # nats: the least gap between a slice and the network trained alone that counts as one
SHARE = 0.15  # of the plain gap, to be closed
LEAST = SHARE * GAP  # nats: no smaller difference of losses counts as one
LATER = 0.2  # of the peak learning rate, for updates after the collapse
FIXED = ((-1, -1, -1), (-1, 0, 0), (-2, -1, 0), (-2, 1, -1), (0, -1, -1), (0, 0, 0))  # places in hidden, ratio, layers


@dataclass(frozen=True)
class Setup:
    """A supernet arm: how copies are mixed; ``longer`` times the steps; ``blind``: routers that never see the
    architecture; ``upcycled`` from the trained largest network; ``corrected`` by a hypernetwork.
    """

    routing: str = "none"
    longer: float = 1.0
    blind: bool = False
    init: str = "scaled"  # an even mixture is as large as the plain weights, so that arms differ in the mixing alone
    upcycled: bool = False
    corrected: bool = False


SETUPS = {
    "plain": Setup(),
    "plain_longer": Setup(longer=LONGER),
    "layer": Setup("layer"),
    "neuron": Setup("neuron"),
    "blind": Setup("neuron", blind=True),
    "equal": Setup("neuron", init="copies"),
    "unscaled": Setup("neuron", init="random"),
    "hypernetwork": Setup(corrected=True),
    "plain_upcycled": Setup(upcycled=True),
    "neuron_upcycled": Setup("neuron", init="copies", upcycled=True),
}


def scale(budget: Budget) -> Scale:
    """The largest network; one step is a batch of every network in a sandwich."""
    return budget.pick(
        ci=Scale(layers=2, dim=24, inner=48, heads=3, vocabulary=512, length=16, batch=2, steps=2, heldout=2),
        micro=Scale(layers=3, dim=48, inner=192, heads=3, vocabulary=512, length=32, batch=4, steps=40, heldout=32),
        full=Scale(layers=3, dim=96, inner=384, heads=6, vocabulary=512, length=64, batch=8, steps=320, heldout=64),
    )


def space_of(size: Scale, layers: list[int] | None = None) -> dict[str, Any]:
    """Three widths, three inner widths, two depths: 18 architectures (fewer at the smallest budget)."""
    top = size.inner // size.dim
    return {
        "hidden": [size.dim // 3, 2 * size.dim // 3, size.dim],
        "head_dim": size.dim // size.heads,
        "ratio": sorted({1, max(1, top // 2), top}),
        "layers": layers or [size.layers - 1, size.layers],
    }


def settings(size: Scale, setup: Setup, layers: list[int] | None = None) -> dict[str, Any]:
    """The method's settings in an arm."""
    return {
        "space": space_of(size, layers),
        "routing": setup.routing,
        "experts": 1 if setup.routing == "none" else COPIES,
        "router_hidden": max(4, size.dim // 6),  # 128 of 768 in the paper
        "init": setup.init,
    }


def measured_archs(size: Scale) -> list[Any]:
    """The six architectures that are compared, the largest and the smallest among them."""
    space = method(ID).module.Space(**space_of(size))
    hidden, ratio, _, layers = space.genes
    found = [space.decode((hidden[h], ratio[r], None, layers[n])) for h, r, n in FIXED]
    assert len(set(found)) == len(FIXED)
    assert {space.largest, space.smallest} <= set(found)
    return found


def data_of(size: Scale, name: str) -> Text:
    """The study's text."""
    return text(size.vocabulary, size.length, size.heldout, limit=BUDGETS[name].pick(ci=6, micro=120, full=None))


# -- networks trained alone -------------------------------------------------------------------------------------


def alone_scale(size: Scale, arch: Any) -> Scale:
    """The size of one architecture."""
    sizes = {"layers": arch.layers, "dim": arch.hidden, "inner": arch.inner, "heads": arch.heads}
    return size.model_copy(update=sizes)


@functools.cache
def alone(arch: Any, seed: int, name: str, steps: int | None = None) -> tuple[nn.Module, float]:
    """A network of one architecture trained by itself, and its held-out loss; once a process."""
    size = alone_scale(scale(BUDGETS[name]), arch)
    data = data_of(size, name)
    model = llama(size, seed, watch=False)
    train(model, data.train, size, seed, steps=steps)
    return model, heldout(model, data.heldout, size)


def step_flops(size: Scale, arch: Any) -> int:
    """Training operations a token of one architecture."""
    return size_of(llama(alone_scale(size, arch), 0, watch=False), size.length).train_flops


def shared_steps(size: Scale, arch: Any) -> int:
    """Updates that one of all architectures gets for its equal part of a supernet's training operations."""
    space = method(ID).module.Space(**space_of(size))
    each = {one: step_flops(size, one) for one in space.archs}
    sandwich = each[space.largest] + each[space.smallest] + sum(each.values()) / len(each)
    return max(1, round(size.steps * sandwich / len(each) / each[arch]))


# -- supernets --------------------------------------------------------------------------------------------------


def supernet(size: Scale, setup: Setup, seed: int, name: str, layers: list[int] | None = None) -> nn.Module:
    """A fresh supernet."""
    deep = size if layers is None else size.model_copy(update={"layers": max(layers)})
    model = llama(deep, seed)
    if setup.upcycled:
        largest = measured_archs(size)[0]
        model.load_state_dict(alone(largest, seed, name)[0].state_dict())
    torch.manual_seed(seed + 1000)
    for kind in ("embedding", "norm", "attention", "mlp", "head"):
        swap(model, ID, settings(size, setup, layers), kind=kind)
    for part in list(model.modules()):
        if setup.blind and isinstance(part, method(ID).module.ArchRouter):
            nn.init.zeros_(part.first.weight).requires_grad_(False)
            nn.init.uniform_(part.first.bias)
        if setup.corrected and isinstance(part, method(ID).module.ElasticFFN):
            correct(part, settings(size, setup)["router_hidden"])
    return model


def train_supernet(model: nn.Module, config: dict[str, Any], size: Scale, seed: int, name: str, steps: int) -> float:
    """Sandwich steps with AdamW and a cosine schedule. Returns milliseconds of processor time a step."""
    optimizer = make_optimizer(model, OptimizerConfig(lr=size.lr))
    stepper = Stepper(model, make_objective(ObjectiveConfig(method=ID, config=config)), optimizer)
    schedule = ScheduleConfig(kind="cosine", warmup=max(1, steps // 10))
    batch = batches(data_of(size, name).train, size, seed)
    model.train()
    torch.manual_seed(seed)  # the same architectures in every arm
    started = time.process_time()
    for step in range(steps):
        set_lr(optimizer, schedule.factor(step, steps))
        stepper.run(step, [batch(step)], weights={})
    return 1000 * (time.process_time() - started) / steps


def losses_of(model: nn.Module, archs: list[Any], size: Scale, name: str) -> dict[Any, float]:
    """Held-out loss of each architecture, as it is in the supernet."""
    found = {}
    for arch in archs:
        with session(arch=arch):
            found[arch] = heldout(model, data_of(size, name).heldout, size)
    return found


def retraining(model: nn.Module, goals: Mapping[Any, float], size: Scale, seed: int, name: str) -> dict[str, float]:
    """Updates that the collapsed networks need to reach those trained alone, the gap left then, and how many did."""
    data, most = data_of(size, name), max(1, size.steps // 5)
    later = size.model_copy(update={"lr": LATER * size.lr})
    found = []
    for arch, goal in goals.items():
        plain = method(ID).module.collapse(model, arch)
        done, loss = updates_until(plain, goal, data, later, seed, first=size.steps, most=most)
        found.append((done, loss - goal, loss <= goal))
    updates, left, reached = zip(*found, strict=True)
    return {"extra_updates": float(np.mean(updates)), "gap_later": float(np.mean(left)), "reached": float(sum(reached))}


def spread(model: nn.Module, archs: list[Any]) -> float:
    """How far the neurons' shares differ between architectures: standard deviation, mean over layers and neurons."""
    found = []
    for part in model.modules():
        if isinstance(part, method(ID).module.ElasticFFN) and part.config.routing != "none":
            with torch.no_grad():
                rows = min(part.shares(arch)[0].shape[0] for arch in archs)
                shares = torch.stack([part.shares(arch)[0][:rows] for arch in archs])
            found.append(float(shares.std(0).mean()))
    return float(np.mean(found)) if found else 0.0


@functools.cache
def outcome(arm: str, seed: int, name: str) -> Mapping[str, float]:
    """Train a supernet arm and measure it; once a process, since others are compared with the plain one."""
    size = scale(BUDGETS[name])
    archs = measured_archs(size)
    goals = {arch: alone(arch, seed, name)[1] for arch in archs}
    found: dict[str, float] = {}
    if arm == "separate":
        losses: dict[Any, float] = {}
        for layers in (size.layers - 1, size.layers):
            config = settings(size, SETUPS["plain"], [layers])
            model = supernet(size, SETUPS["plain"], seed, name, [layers])
            train_supernet(model, config, size, seed, name, max(1, size.steps // 2))
            losses |= losses_of(model, [arch for arch in archs if arch.layers == layers], size, name)
    else:
        setup = SETUPS[arm]
        model = supernet(size, setup, seed, name)
        steps = round(size.steps * setup.longer)
        found["step_ms"] = train_supernet(model, settings(size, setup), size, seed, name, steps)
        losses = losses_of(model, archs, size, name)
        counted = size_of(model, size.length)
        found["train_mb"] = (counted.weight_bytes + counted.gradient_bytes + counted.optimizer_bytes) / 2**20
        found["copy_distance"] = float(np.mean(list(method(ID).module.copy_distance(model).values())))
        found["spread"] = spread(model, archs)
        if arm in ("plain", "neuron"):
            found |= retraining(model, goals, size, seed, name)
    gaps = {arch: losses[arch] - goals[arch] for arch in archs}
    found |= {f"loss_{arch.hidden}_{arch.inner}_{arch.layers}": loss for arch, loss in losses.items()}
    found |= {"heldout_loss": float(np.mean(list(losses.values()))), "gap": float(np.mean(list(gaps.values())))}
    return found | {"gap_largest": gaps[archs[0]], "gap_smallest": gaps[archs[-1]]}


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train one arm; held-out losses of six architectures, and what was won against the plain supernet of its start.

    ``closed`` is a share of the plain gap; where there is none that counts, nothing was closed, whatever noise says.
    """
    size = scale(budget)
    archs = measured_archs(size)
    if arm in ("standalone", "standalone_share"):
        steps = {arch: shared_steps(size, arch) if arm == "standalone_share" else None for arch in archs}
        losses = {arch: alone(arch, seed, budget.name, steps[arch])[1] for arch in archs}
        each = {f"loss_{arch.hidden}_{arch.inner}_{arch.layers}": loss for arch, loss in losses.items()}
        updates = float(np.mean([steps[arch] or size.steps for arch in archs]))
        return {**each, "heldout_loss": float(np.mean(list(losses.values()))), "updates": updates}
    rival = "plain_upcycled" if arm in SETUPS and SETUPS[arm].upcycled else "plain"
    found, plain = outcome(arm, seed, budget.name), outcome(rival, seed, budget.name)
    better = [name for name in found if name.startswith("loss_") and plain[name] - found[name] >= LEAST]
    closed = (plain["gap"] - found["gap"]) / plain["gap"] if plain["gap"] >= GAP else 0.0
    return {**found, "closed": closed, "improved": float(len(better))}


STUDY = Study(
    paper="mixture-of-supernets",
    title="What weight sharing costs, and what mixing wins back",
    setting=(
        "A menu of 18 Llama models (widths 32, 64, 96; inner widths 1, 2, 4 times that; 2 or 3 blocks) on the standard "
        "library's source files, 320 sandwich steps of 8 x 64 tokens with two copies, from scratch; six sizes are "
        "compared with networks trained alone for 320 updates. Small, so that a seed takes minutes on one "
        "core. Mixed copies start sqrt(2) larger, so that an even mixture is as large as plain weights. The paper "
        "trains BERT-base supernets for 125k steps and translation models on GPUs; its tables could not be read, so "
        "claims are those of the abstract."
    ),
    claims=(
        Claim(
            key="premise",
            text="A slice of a plain supernet is worse than the same network trained alone.",
            where="abstract",
            claimed="a large performance gap (no number)",
            metric="gap",
            judge=Within(arm="plain", low=GAP),
            tells="held-out loss {plain.heldout_loss} in the supernet, {standalone.heldout_loss} alone; gap of the "
            "largest {plain.gap_largest}, of the smallest {plain.gap_smallest}. Alone on an equal part of the "
            "operations: {standalone_share.heldout_loss}.",
        ),
        Claim(
            key="closes",
            text="Neuron-wise mixing closes at least 15 % of the plain supernet's mean gap.",
            where="abstract",
            claimed="minimises retraining (no number)",
            metric="closed",
            judge=Within(arm="neuron", low=SHARE),
            tells="gap {plain.gap} plain, {neuron.gap} mixed, {blind.gap} mixed without seeing the architecture, "
            "{separate.gap} with two separate supernets at the same compute. Copies that start equal: {equal.gap}; "
            "as large as plain weights, so that their even mixture is smaller: {unscaled.gap}. One copy with low-rank "
            "corrections by a hypernetwork: {hypernetwork.gap}. Plain, after 30 % more steps: {plain_longer.gap}.",
        ),
        Claim(
            key="improves",
            text="Neuron-wise mixing improves at least 5 of 6 architectures.",
            where="abstract",
            claimed="better at various sizes (no number)",
            metric="improved",
            judge=Within(arm="neuron", low=5.0),
            tells="gap of the largest {plain.gap_largest} plain, {neuron.gap_largest} mixed; of the smallest "
            "{plain.gap_smallest} and {neuron.gap_smallest}.",
        ),
        Claim(
            key="equal_time",
            text="It still wins against a plain supernet that trains for 30 % more steps.",
            where="abstract (negligible training overhead)",
            claimed="better at equal cost (no number)",
            metric="gap",
            judge=Beats(method="neuron", control="plain_longer", by=LEAST),
            tells="gap {neuron.gap} mixed, {plain_longer.gap} longer; a step takes {neuron.step_ms} ms mixed, "
            "{plain.step_ms} ms plain.",
        ),
        Claim(
            key="layer_wise",
            text="Layer-wise mixing has a smaller gap than the plain supernet.",
            where="abstract",
            claimed="better than the plain supernet (no number)",
            metric="gap",
            judge=Beats(method="layer", control="plain", by=LEAST),
            tells="shares differ by {layer.spread} between architectures, {neuron.spread} neuron-wise.",
        ),
        Claim(
            key="architecture",
            text="It is the architecture that matters: routers that do not see it win less.",
            where="method section (architecture-based routing)",
            claimed="architecture-specific weights (no number)",
            metric="gap",
            judge=Beats(method="neuron", control="blind", by=LEAST),
            tells="shares differ by {neuron.spread} between architectures; two copies differ by {neuron.copy_distance} "
            "standard deviations at most, {blind.copy_distance} with blind routers.",
        ),
        Claim(
            key="retraining",
            text="A collapsed network needs fewer updates to reach the one trained alone.",
            where="abstract",
            claimed="minimises retraining (no number)",
            metric="extra_updates",
            judge=Beats(method="neuron", control="plain"),
            tells="gap before those updates {neuron.gap} mixed, {plain.gap} plain; after them {neuron.gap_later} and "
            "{plain.gap_later}, with {neuron.reached} and {plain.reached} of 6 there.",
        ),
        Claim(
            key="upcycled",
            text="From a trained network, too, mixing has a smaller gap than the plain supernet.",
            where="initialisation from a pretrained model",
            claimed="better than the plain supernet (no number)",
            metric="gap",
            judge=Beats(method="neuron_upcycled", control="plain_upcycled", by=LEAST),
            tells="copies that started equal differ by {neuron_upcycled.copy_distance} standard deviations at most, "
            "random ones by {neuron.copy_distance}.",
        ),
        Claim(
            key="overhead",
            text="A training step takes at most 10 % longer.",
            where="abstract",
            claimed="negligible training overhead (no number)",
            metric="step_ms",
            judge=NotWorse(method="neuron", control="plain", tolerance=0.1, relative=True),
            tells="layer-wise {layer.step_ms} ms; weights, gradients and moments take {neuron.train_mb} MB against "
            "{plain.train_mb} MB.",
        ),
    ),
    arms=(
        Arm(name="standalone", text="each of the six networks alone, as many updates", role="reference"),
        Arm(name="plain", text="plain weight sharing", role="control"),
        Arm(name="plain_longer", text="plain weight sharing, 1.3 times the steps", role="control"),
        Arm(name="neuron", text="two copies, mixed for each neuron"),
        Arm(name="layer", text="two copies, mixed for each matrix"),
        Arm(name="blind", text="two copies, mixed by routers that do not see the architecture", role="control"),
        Arm(name="equal", text="neuron-wise mixing, copies that start equal", role="reference"),
        Arm(name="unscaled", text="copies as large as plain weights, so mixtures start smaller", role="reference"),
        Arm(name="hypernetwork", text="one copy, corrected by a hypernetwork of as many weights", role="reference"),
        Arm(name="separate", text="a plain supernet for each depth, half the steps each", role="reference"),
        Arm(name="plain_upcycled", text="plain weight sharing, from the trained largest network", role="control"),
        Arm(name="neuron_upcycled", text="neuron-wise mixing, from the trained largest network"),
        Arm(name="standalone_share", text="each alone, an 18th of the supernet's operations", role="reference"),
    ),
    run=run,
    methods=(ID,),
    units={"gap": "nats a token", "closed": "share of the plain gap", "improved": "of 6", "step_ms": "ms"},
)
