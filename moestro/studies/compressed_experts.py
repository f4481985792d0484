"""Compressed experts: does a vector for each expert that no longer computes make up for it, and is it the routing?

One mixture is trained on source files once a seed and shared by all arms; then each arm is fine-tuned on documentation
with the same steps, rate and rows. Every arm that lets fewer experts compute is the same layer: with vectors that
learn, that stay zero, that are drawn at random and stay, or whose mean is the same for every token. So what an arm has
over another is what its vectors say, and nothing else differs.

Times are taken inside one job, by turns, and the shortest of each model counts.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.context import RoutingContext
from moestro.core.layer import mixture_layers
from moestro.core.routing import Routing
from moestro.core.session import session
from moestro.data.dataset import Dataset
from moestro.methods.compress._parts.compressed_bank import CompressedFFN
from moestro.models.swap import swap
from moestro.studies._framework import Arm, Beats, Budget, Claim, Recovers, Study, Within
from moestro.studies._mixture import Mixture, corpus_of, loss_of, rows_of, size_of, task_of, trained, tune
from moestro.training.size import size_of as count


METHOD = "compress.compressed_experts"
TOP_K, TUNE_LR = 4, 0.3
SPREAD = 0.05  # standard deviation of vectors that are drawn and stay
TOKENS, REPEATS = 512, 20  # of a timed forward
# Arm -> settings of the layer, and what becomes of its vectors.
ARMS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "half": ({"n_main": 2}, "zero"),
    "renormalised": ({"n_main": 2, "renormalise_main": True}, "zero"),
    "compressed": ({"n_main": 2}, "learned"),
    "compressed_renormalised": ({"n_main": 2, "renormalise_main": True}, "learned"),
    "unrouted": ({"n_main": 2}, "unrouted"),
    "frozen": ({"n_main": 2}, "frozen"),
    "one": ({"n_main": 1}, "zero"),
    "one_compressed": ({"n_main": 1}, "learned"),
    "three": ({"n_main": 3}, "zero"),
    "three_compressed": ({"n_main": 3}, "learned"),
}


def scale(budget: Budget) -> Mixture:
    """The mixture: 16 experts (8 for short budgets), 4 of them a token."""
    more = budget.pick(ci={"experts": 6}, micro={"experts": 8, "steps": 60}, full={"experts": 16, "steps": 1600})
    return size_of(budget, top_k=TOP_K, **more)


def steps(budget: Budget) -> int:
    """Of fine-tuning."""
    return budget.pick(ci=1, micro=12, full=150)


class Unrouted(CompressedFFN):
    """Made of a compressed bank: the same vectors, but every token gets the mean of all."""

    def theta(self, expert_TA: Tensor, weight_TA: Tensor) -> Tensor:
        """1 + mean of the deltas, [T, V]."""
        return (1.0 + self.deltas.float().mean(0)).expand(len(expert_TA), -1)


def change(model: nn.Module, arm: str, seed: int) -> nn.Module:
    """Make a trained mixture the model of an arm, in place."""
    if arm not in ARMS:
        return model
    settings, vectors = ARMS[arm]
    swap(model, METHOD, settings)
    draw = torch.Generator().manual_seed(seed)
    for layer in mixture_layers(model).values():
        bank = layer.bank
        assert isinstance(bank, CompressedFFN)
        bank.deltas.requires_grad_(vectors in ("learned", "unrouted"))
        if vectors == "frozen":
            with torch.no_grad():
                bank.deltas.normal_(std=SPREAD, generator=draw)
        if vectors == "unrouted":
            bank.__class__ = Unrouted
    return model


class Touched:
    """Recorder: distinct experts that compute, in a layer: for a token and for a row."""

    def __init__(self) -> None:
        self.tokens: list[float] = []
        self.rows: list[float] = []

    def record(self, site: str, routing: Routing, ctx: RoutingContext) -> None:
        """Take one layer's routing of one row."""
        real = routing.real()
        self.tokens.append(len(real.expert_N) / routing.num_tokens)
        self.rows.append(len(torch.unique(real.expert_N)))


@torch.no_grad()
def touched(model: nn.Module, data: Dataset, size: Mixture) -> dict[str, float]:
    """Experts, and bytes of experts, that a token and a held-out row ask for in a layer."""
    seen = Touched()
    model.eval()
    with session(recorder=seen):
        for batch in rows_of(data, size.model_copy(update={"batch": 1}), limit=16):
            model(**batch)
    bank: Bank = next(iter(mixture_layers(model).values())).bank
    mean = float(np.mean(seen.tokens))
    vector = used = 0
    if isinstance(bank, CompressedFFN):
        vector = bank.deltas[0].nbytes
        used = vector if bool(bank.deltas.any()) else 0
    return {
        "experts_a_token": mean,
        "experts_a_row": float(np.mean(seen.rows)),
        "expert_bytes_a_token": mean * (bank.nbytes(0) - vector) + (size.top_k - mean) * used,
    }


@torch.no_grad()
def times(models: Mapping[str, nn.Module], vocabulary: int, tokens: int, repeats: int) -> dict[str, float]:
    """Shortest time of a forward of each model in seconds, taken by turns."""
    ids = torch.randint(3, vocabulary, (max(1, tokens // 64), 64), generator=torch.Generator().manual_seed(0))
    best = dict.fromkeys(models, float("inf"))
    for turn in range(repeats + 2):
        for name, model in models.items():
            started = time.perf_counter()
            model(input_ids=ids)
            if turn >= 2:  # the first ones warm up
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Change the trained mixture, fine-tune it, measure it on and off the task."""
    size = scale(budget)
    task, code = task_of(size), corpus_of(size)
    model = change(trained(size, seed), arm, seed)
    found = {"loss_before": loss_of(model, task.heldout, size)}
    tune(model, task.train, size, seed + 1, steps(budget), lr=TUNE_LR)
    found |= {
        "loss": loss_of(model, task.heldout, size),
        "off_task_loss": loss_of(model, code.heldout, size),
        "active_parameters": float(count(model, size.length).active),
        **touched(model, task.heldout, size),
    }
    banks = [layer.bank for layer in mixture_layers(model).values()]
    spreads = [float(bank.deltas.detach().square().mean().sqrt()) for bank in banks if isinstance(bank, CompressedFFN)]
    if spreads:
        found["vector_size"] = float(np.mean(spreads))
    if arm == "compressed":
        models = {name: change(trained(size, seed), name, seed) for name in ("full", "half")}
        tokens, repeats = budget.pick(ci=(64, 1), micro=(TOKENS, 5), full=(TOKENS, REPEATS))
        best = times({**models, "compressed": model}, size.vocabulary, tokens, repeats)
        found["time_over_full"] = best["compressed"] / best["full"]
        found["time_over_half"] = best["compressed"] / best["half"]
        found["half_time_over_full"] = best["half"] / best["full"]
    return found


TELLS = (
    "loss after fine-tuning (before): all 4 {full} ({full.loss_before}); 2 of 4 {half} ({half.loss_before}), with "
    "vectors {compressed}; main weights renormalised {renormalised} ({renormalised.loss_before}), with vectors "
    "{compressed_renormalised}; unrouted vectors {unrouted}, random ones {frozen}; 1 of 4 {one}, with vectors "
    "{one_compressed}; 3 of 4 {three}, with vectors {three_compressed}. Vectors end {compressed.vector_size} from 1, "
    "random ones are {frozen.vector_size} from it. What is missing here: vectors can bring back no more than halving "
    "costs, the distance of the first two numbers, and that grows with a pretraining longer than these five minutes; "
    "they have 150 steps to move in, the paper's two epochs."
)
COSTS = (
    "Vectors take {compressed.time_over_half} times the forward of 2 of 4 without them, which takes "
    "{compressed.half_time_over_full} of all 4's: at this width the products of a layer are too small to pay for it."
)

STUDY = Study(
    paper="compressed-experts",
    title="Vectors for experts that do not compute",
    setting=(
        "Decoders of 3 layers, width 96, 16 experts of width 96 with 4 a token under weights that sum to 1, trained "
        "for 1600 steps of 768 tokens of the standard library's source files, then fine-tuned on its documentation for "
        "150 steps at three tenths of the rate, everything together. The paper tunes OLMoE (8 of 64) and Phi-MoE (2 of "
        "16) on instructions for two epochs and measures task scores; here it is held-out loss."
    ),
    claims=(
        Claim(
            key="recovers",
            text="Vectors bring back more than a quarter of what halving the experts that compute loses.",
            where="tables of instruction tuning; OLMoE, mean of five tasks",
            claimed="37.9 in full, 34.8 with half, 36.5 with half and vectors: 55 % recovered",
            metric="loss",
            judge=Recovers(method="compressed", cut="half", whole="full", share=0.25),
            tells=TELLS,
        ),
        Claim(
            key="not_scale",
            text="They do more than give main experts the weight that auxiliary ones had.",
            where="no such control in the paper",
            claimed="not compared",
            metric="loss",
            judge=Beats(method="compressed", control="renormalised"),
            tells=TELLS,
        ),
        Claim(
            key="on_top_of_scale",
            text="Where main experts have that weight already, vectors still lower the loss.",
            where="no such control in the paper",
            claimed="not compared",
            metric="loss",
            judge=Beats(method="compressed_renormalised", control="renormalised"),
            tells=TELLS,
        ),
        Claim(
            key="routed",
            text="That vectors follow the auxiliary choices matters: the same number without routing does less.",
            where="method: compressed experts are chosen by the router",
            claimed="not compared",
            metric="loss",
            judge=Beats(method="compressed", control="unrouted"),
            tells=TELLS,
        ),
        Claim(
            key="learned",
            text="Learned vectors are better than random ones that stay.",
            where="method: compressed experts are trained with the model",
            claimed="not compared",
            metric="loss",
            judge=Beats(method="compressed", control="frozen"),
            tells=TELLS,
        ),
        Claim(
            key="below_half",
            text="Cutting below half does not work: a quarter with vectors is worse than half without.",
            where="ablation of the number of experts, OLMoE on GSM8K",
            claimed="20.6 for 2 of 8 with vectors, 26.8 for 4 of 8 without",
            metric="loss",
            judge=Beats(method="half", control="one_compressed"),
            tells=TELLS,
        ),
        Claim(
            key="faster",
            text="A forward of 512 tokens is faster than with all experts.",
            where="table of latencies",
            claimed="18 % (OLMoE) and 22 % (Phi-MoE) faster than in full",
            metric="time_over_full",
            judge=Within(arm="compressed", high=0.97),
            tells=COSTS,
        ),
    ),
    arms=(
        Arm(name="full", text="all 4 chosen experts compute", role="control"),
        Arm(name="half", text="2 of 4 compute under their weights among the 4", role="control"),
        Arm(name="renormalised", text="2 of 4 compute, weights sum to 1", role="control"),
        Arm(name="compressed", text="2 of 4 compute, vectors of the other 2 scale what they see"),
        Arm(name="compressed_renormalised", text="the same with weights that sum to 1"),
        Arm(name="unrouted", text="2 of 4 compute, the mean of all vectors scales every token", role="control"),
        Arm(name="frozen", text="2 of 4 compute, random vectors of the other 2 that stay", role="control"),
        Arm(name="one", text="1 of 4 computes", role="reference"),
        Arm(name="one_compressed", text="1 of 4 computes, with vectors of the other 3", role="control"),
        Arm(name="three", text="3 of 4 compute", role="reference"),
        Arm(name="three_compressed", text="3 of 4 compute, with the vector of the last", role="reference"),
    ),
    run=run,
    methods=(METHOD, "train.softmax_topk", "train.balance_loss"),
    units={
        "loss": "nats a token",
        "loss_before": "nats a token",
        "off_task_loss": "nats a token",
        "active_parameters": "parameters",
        "experts_a_token": "experts a layer",
        "experts_a_row": "experts a layer",
        "expert_bytes_a_token": "bytes a layer",
        "vector_size": "root mean square",
        "time_over_full": "of the time",
        "time_over_half": "of the time",
        "half_time_over_full": "of the time",
    },
)
