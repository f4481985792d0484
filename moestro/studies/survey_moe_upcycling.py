"""Sparse upcycling: is a mixture grown from a trained dense model worth it, at equal tokens and at equal compute?

The dense parent is trained once per seed. Its feed-forward layers become mixtures of copies, which are trained on; the
controls get the same further tokens, or the same further compute, or the mixture's shape without the parent's weights.
This is the control that every later conversion is measured against.
"""

import copy
import functools
from collections.abc import Mapping

import torch
from torch import nn

from moestro import surgery
from moestro.core.inputs import PlanInputs
from moestro.core.registry import method
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, Study, Within
from moestro.studies._language import Scale, Text, batches, heldout, llama, text, train
from moestro.surgery.opened import OpenModel


EXPERTS, TOP_K = 8, 2
LONGER = 4  # times the further steps
AUX = {"balance": 0.01}


def scale(budget: Budget) -> Scale:
    """The parent's run; the conversion trains on for half as many steps."""
    return budget.pick(
        ci=Scale(layers=2, dim=32, inner=64, heads=2, vocabulary=512, length=32, batch=4, steps=8, heldout=8),
        micro=Scale(layers=2, dim=64, inner=128, heads=2, vocabulary=1024, length=64, batch=8, steps=80, heldout=32),
        full=Scale(layers=4, dim=96, inner=384, steps=300, heldout=128),
    )


def data_of(size: Scale, budget: Budget) -> Text:
    """The study's text."""
    return text(size.vocabulary, size.length, size.heldout, limit=budget.pick(ci=6, micro=120, full=None))


@functools.cache
def parent(seed: int, name: str, size: Scale) -> nn.Module:
    """The trained dense parent of a seed; made once a process."""
    model = llama(size, seed, watch=False)
    train(model, data_of(size, BUDGETS[name]).train, size, seed)
    return model


def upcycle(model: nn.Module, seed: int) -> None:
    """Every feed-forward layer becomes a mixture of copies, in place."""
    use = method("convert.upcycle")
    losses = {"balance": {"method": "train.balance_loss", "config": {"scope": "sequence"}}}
    config = use.configure({"num_experts": EXPERTS, "top_k": TOP_K, "losses": losses})
    surgery.apply(model, use.plan(PlanInputs(subject=OpenModel(model), seed=seed), config))


def extra_steps(size: Scale, model: nn.Module, steps: int) -> int:
    """Steps of the dense parent that cost what ``steps`` of the mixture cost, by active weights."""
    dense = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    ffn = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    router = size.layers * size.dim * EXPERTS
    return round(steps * (dense + (TOP_K - 1) * ffn + router) / dense)


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train one arm on from the parent, then measure held-out loss."""
    size = scale(budget)
    data = data_of(size, budget)
    more = size.steps // 2
    found: dict[str, float] = {}
    if arm == "scratch":
        model = llama(size, seed + 1000, watch=False)
        upcycle(model, seed)
        _untie(model, seed)
    else:
        model = copy.deepcopy(parent(seed, budget.name, size))
    if arm.startswith("upcycled"):
        batch = batches(data.train, size, seed)(0)["input_ids"]
        before = _logits(model, batch)
        upcycle(model, seed)
        found["step0_gap"] = float((_logits(model, batch) - before).abs().max())
    steps = extra_steps(size, model, more) if arm == "dense_compute" else more
    steps *= LONGER if arm.endswith("_long") else 1
    mixture = arm in ("upcycled", "upcycled_long", "scratch")
    train(model, data.train, size, seed, steps=steps, first=size.steps, losses=AUX if mixture else {})
    return {"heldout_loss": heldout(model, data.heldout, size), **found}


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids).logits
    return logits


def _untie(model: nn.Module, seed: int) -> None:
    """Give each expert random weights of its own: a mixture from scratch does not start from copies."""
    torch.manual_seed(seed + 2000)
    for name, parameter in model.named_parameters():
        if ".bank." in name:
            nn.init.normal_(parameter, std=0.02)


STUDY = Study(
    paper="survey-moe",
    part="upcycling",
    title="Sparse upcycling",
    setting=(
        "A Llama model (4 layers, width 96) is trained on the standard library's source files for 300 steps of 1024 "
        "tokens, then every feed-forward layer becomes 8 copies with 2 active and renormalised weights, and all arms "
        "train on for 150 steps. The paper trains encoder-decoders and vision models at a hundred times the size."
    ),
    claims=(
        Claim(
            key="exact_start",
            text="With weights that sum to 1 the mixture starts as the very function of its parent.",
            where="2212.05055, section 3 and 4.2.2 (router weights normalised)",
            claimed="no initial drop",
            metric="step0_gap",
            judge=Within(arm="upcycled", high=1e-4),
        ),
        Claim(
            key="equal_tokens",
            text="Upcycled and trained on, it is better than its parent trained on for the same tokens.",
            where="2212.05055, figure 2",
            claimed="better than dense continuation",
            metric="heldout_loss",
            judge=Beats(method="upcycled", control="dense"),
            tells=(
                "after the further steps of the study: upcycled {upcycled}, dense {dense}; after four times as many: "
                "{upcycled_long} and {dense_long}."
            ),
        ),
        Claim(
            key="equal_compute",
            text="It is better than its parent trained on for the same compute.",
            where="2212.05055, figure 2 (extra pretraining time)",
            claimed="better than dense continuation at equal time",
            metric="heldout_loss",
            judge=Beats(method="upcycled", control="dense_compute"),
            tells=(
                "the parent given the mixture's compute in more tokens reaches {dense_compute}, the mixture "
                "{upcycled}. On equal tokens mixture and parent stand at {upcycled} and {dense}; after four times the "
                "further steps at {upcycled_long} and {dense_long}."
            ),
        ),
        Claim(
            key="parent_helps",
            text="It is better than a mixture of its shape trained from scratch for the further tokens.",
            where="2212.05055, figure 4",
            claimed="from scratch needs more than the parent's own cost to catch up",
            metric="heldout_loss",
            judge=Beats(method="upcycled", control="scratch"),
        ),
    ),
    arms=(
        Arm(name="upcycled", text="8 copies of every feed-forward layer, 2 active, trained on"),
        Arm(name="dense", text="the parent trained on for the same tokens", role="control"),
        Arm(name="dense_compute", text="the parent trained on for the same compute", role="control"),
        Arm(name="upcycled_long", text="the copies, four times the further tokens", role="reference"),
        Arm(name="dense_long", text="the parent, four times the further tokens", role="reference"),
        Arm(name="scratch", text="the mixture's shape, random weights, the same further tokens", role="control"),
    ),
    run=run,
    methods=("convert.upcycle", "train.softmax_topk", "train.balance_loss", "train.moe"),
    units={"heldout_loss": "nats a token", "step0_gap": "largest difference of a logit"},
)
