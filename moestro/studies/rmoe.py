"""RMoE: does a state that routers hand up make routing depend on the routing below, and does it help?

Every arm is the same Llama model over bytes with the same experts, first weights and data; only the routers differ. The
deciding control is the same recurrent router whose state is not passed on: it has the same parameters and does the same
work. Choices of two layers are compared by the mutual information of their best experts over held-out tokens, less what
remains of it when the tokens of one layer are shuffled; shuffled among equal bytes only, it is what ties the layers
beyond the byte they both see.

With weights from N(0, 0.02) a recurrent router of this width starts with logits that hardly differ between tokens; a
linear one does not, and a run of some hundred steps would measure that difference above all. So routers with a hidden
layer start with a first matrix that keeps the size of its input and a last one that makes the logits vary over tokens
as those of the linear router do. The arm ``flat_start`` is the recurrent router without this.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.context import RoutingContext
from moestro.core.layer import mixture_layers
from moestro.core.registry import method
from moestro.core.router import Router
from moestro.core.routing import Routing, Scores
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.data.dataset import Dataset
from moestro.studies._framework import (
    Arm,
    Beats,
    Budget,
    Claim,
    Judgement,
    Measured,
    NotWorse,
    Study,
    Verdict,
    interval,
)
from moestro.studies._language import Scale, batches, heldout, llama, text, train
from moestro.training.objectives import Batch, Causal


EXPERTS, TOP_K, BALANCE = 8, 2, 0.01
STD = 0.02  # of a linear router's first weights
EMBEDDING, TAU = 16, 0.3  # of the cosine router
FAR = 3  # layers apart
SHUFFLES = 5
BYTES = 259  # a BPE of this size has no merges: 256 bytes and three specials
RECURRENT: dict[str, dict[str, Any]] = {
    "recurrent": {},
    "flat_start": {},
    "not_passed": {"pass_state": False},
    "detached": {"detach_state": True},
}
SPREAD = ("recurrent", "not_passed", "detached", "mlp")


def scale(budget: Budget) -> Scale:
    """Experts are as wide as the model, states half as wide."""
    return budget.pick(
        ci=Scale(vocabulary=BYTES, layers=4, dim=16, inner=16, heads=2, length=32, batch=2, steps=3, heldout=4),
        micro=Scale(vocabulary=BYTES, layers=4, dim=64, inner=64, length=64, batch=4, steps=60, heldout=32),
        full=Scale(vocabulary=BYTES, layers=8, dim=64, inner=64, length=128, batch=8, steps=260, heldout=128),
    )


# -- models -------------------------------------------------------------------------------------------------------


class Behind(Router):
    """A plain router behind a hidden layer."""

    def __init__(self, first: nn.Linear, after: nn.Module, inner: Router) -> None:
        super().__init__(inner.num_experts, top_k=inner.top_k)
        self.first = first
        self.after = after
        self.inner = inner

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router."""
        return self.inner.score(self.after(self.first(x_TD)), bank, ctx)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        return self.inner.choose(scores, ctx)


class Unit(nn.Module):
    """Rows of length 1, over tau where it is learned."""

    def __init__(self, *, learned: bool = False) -> None:
        super().__init__()
        self.log_tau = nn.Parameter(torch.full((1,), math.log(TAU))) if learned else None

    def forward(self, x_TR: Tensor) -> Tensor:
        """[T, R]."""
        unit_TR = nn.functional.normalize(x_TR, dim=-1, eps=1e-4)
        return unit_TR if self.log_tau is None else unit_TR * torch.exp(-self.log_tau)


def mlp_width(size: Scale) -> int:
    """Hidden width at which the MLP routers of all layers have as many parameters as the recurrent ones."""
    state = size.dim // 2
    cell = 6 * state * state + 6 * state
    return state + round(cell / (size.layers * (size.dim + EXPERTS)))


def router_of(arm: str, size: Scale, site: Site, shared: Shared) -> Router:
    """The router of an arm for one layer."""
    plain, recurrent = method("train.softmax_topk"), method("train.rmoe")
    config: dict[str, Any] = {"num_experts": EXPERTS, "top_k": TOP_K}
    if arm in RECURRENT:
        settings = recurrent.configure({**config, "state_size": size.dim // 2, **RECURRENT[arm]})
        made: Router = recurrent.build(site, settings, shared)
        return made
    hidden = {"mlp": mlp_width(size), "cosine": EMBEDDING}.get(arm)
    where = Site(path=site.path, kind="mlp", module=site.module, dim=hidden or size.dim)
    inner: Router = plain.build(where, plain.configure(config), shared)
    if hidden is None:
        return inner.requires_grad_(arm != "random")
    if arm == "cosine":
        nn.utils.parametrize.register_parametrization(inner, "weight", Unit())
    after = Unit(learned=True) if arm == "cosine" else nn.SiLU()
    return Behind(nn.Linear(size.dim, hidden, bias=False), after, inner)


def build(arm: str, size: Scale, seed: int) -> nn.Module:
    """A model whose feed-forwards are mixtures; all but the routers starts alike in every arm."""
    model = llama(size, seed)
    layer_of, shared = method("train.moe"), Shared()
    losses = {} if arm == "random" else {"balance": {"method": "train.balance_loss"}}
    config = layer_of.configure({"num_experts": EXPERTS, "expert_size": size.inner, "losses": losses})
    sites = [
        Site(path=f"model.layers.{number}.mlp", kind="mlp", module=block.mlp, dim=size.dim, layer=number)
        for number, block in enumerate(model.model.layers)
    ]
    for site, block in zip(sites, model.model.layers, strict=True):
        block.mlp = layer_of.build(site, config, shared)
    torch.manual_seed(seed + 1000)
    for site, block in zip(sites, model.model.layers, strict=True):
        block.mlp.router = router_of(arm, size, site, shared)
    model.add_module("shared", shared.modules)
    return model


@torch.no_grad()
def spread(model: nn.Module, batch: Batch) -> None:
    """Let routers with a hidden layer tell tokens apart at the start as a linear router does; changes them in place."""
    parts = {
        site: [
            layer.router.get_parameter(f"{name}weight")
            for name in (("first.", "inner.") if isinstance(layer.router, Behind) else ("projector.", ""))
        ]
        for site, layer in mixture_layers(model).items()
    }
    for first, _ in parts.values():
        nn.init.normal_(first, std=first.shape[1] ** -0.5)
    with session(collect=True, keeps=["input"]) as opened:
        model(input_ids=batch["input_ids"])
    (ctx,) = opened.take()
    for site, (_, last) in parts.items():
        routing = ctx.routings[site]
        assert routing is not None
        assert routing.scores is not None
        wanted = STD * ctx.kept[site, "input"].var(0).sum().sqrt()
        last.mul_(wanted / routing.scores.logits_TC.var(0).mean().sqrt())


# -- measurements -------------------------------------------------------------------------------------------------


def information(first_T: Tensor, second_T: Tensor) -> float:
    """Mutual information in bits of two choices among the experts, from their counts over tokens."""
    count = torch.bincount(first_T * EXPERTS + second_T, minlength=EXPERTS**2).view(EXPERTS, EXPERTS).double()
    joint = count / count.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    there = joint > 0
    return float((joint[there] * (joint[there] / apart[there]).log2()).sum())


def shuffled(value_T: Tensor, group_T: Tensor, draw: torch.Generator) -> Tensor:
    """The values in random order within each group."""
    mixed_T = torch.randperm(len(value_T), generator=draw)
    from_T = mixed_T[torch.sort(group_T[mixed_T], stable=True).indices]
    found_T = torch.empty_like(value_T)
    found_T[torch.sort(group_T, stable=True).indices] = value_T[from_T]
    return found_T


def tie(first_T: Tensor, second_T: Tensor, group_T: Tensor) -> float:
    """``information`` less its mean when one choice is shuffled within groups: 0 if only the group ties the two."""
    draw = torch.Generator().manual_seed(0)
    null = [information(first_T, shuffled(second_T, group_T, draw)) for _ in range(SHUFFLES)]
    return information(first_T, second_T) - sum(null) / SHUFFLES


@torch.no_grad()
def look(model: nn.Module, data: Dataset, size: Scale) -> tuple[Tensor, Tensor]:
    """Router probabilities of held-out tokens, [L, T, E], and the tokens, int64 [T]."""
    (rows,) = data.sources.values()
    found, ids = [], []
    model.eval()
    for at in range(0, len(rows), size.batch):
        batch = Causal().collate([rows[i] for i in range(at, min(at + size.batch, len(rows)))], [])
        batch.pop("labels")
        with session(collect=True) as opened:
            model(**batch)
        (ctx,) = opened.take()
        scores = [routing.scores for routing in ctx.routings.values() if routing is not None]
        found.append(torch.stack([one.probabilities() for one in scores if one is not None]))
        ids.append(batch["input_ids"].reshape(-1))
    return torch.cat(found, dim=1), torch.cat(ids)


def measure(probability_LTE: Tensor, ids_T: Tensor) -> dict[str, float]:
    """What ties layers, and how decided and how balanced routing is, as means over pairs of layers and layers."""
    best_LT = probability_LTE.argmax(-1)
    pairs = list(combinations(range(len(best_LT)), 2))
    near = [(one, two) for one, two in pairs if two - one == 1]
    far = [(one, two) for one, two in pairs if two - one >= FAR]
    alike_T = torch.zeros_like(ids_T)

    def mean(which: list[tuple[int, int]], group_T: Tensor) -> float:
        return float(np.mean([tie(best_LT[one], best_LT[two], group_T) for one, two in which]))

    top = probability_LTE.topk(TOP_K, dim=-1)
    load = torch.stack([torch.bincount(ids.reshape(-1), minlength=EXPERTS) for ids in top.indices]).double()
    first, second = top.values[..., 0], top.values[..., 1]
    return {
        "tie_near": mean(near, alike_T),
        "tie_far": mean(far, alike_T),
        "tie_near_beyond": mean(near, ids_T),
        "tie_far_beyond": mean(far, ids_T),
        "entropy": float(torch.special.entr(probability_LTE).sum(-1).mean() / math.log(2)),
        "inner_balance": float((first / second.clamp(min=1e-12)).median(-1).values.mean()),
        "outer_balance": float(top.values.sum(-1).median(-1).values.mean()),
        "load_variation": float((load.std(-1, correction=0) / load.mean(-1)).mean()),
    }


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Train one arm, then measure held-out loss and routing."""
    size = scale(budget)
    data = text(BYTES, size.length, size.heldout, limit=budget.pick(ci=6, micro=40, full=150))
    model = build(arm, size, seed)
    if arm in SPREAD:
        spread(model, batches(data.train, size, seed)(0))
    train(model, data.train, size, seed, losses={} if arm == "random" else {"balance": BALANCE})
    routers = [*(layer.router for layer in mixture_layers(model).values()), model.get_submodule("shared")]
    return {
        "bits": heldout(model, data.heldout, size) / math.log(2),
        "router_parameters": sum(p.numel() for part in routers for p in part.parameters()),
        **measure(*look(model, data.heldout, size)),
    }


@dataclass(frozen=True, kw_only=True)
class Times:
    """`method` is at least `factor` times `control`. Shown: on every seed, of two or more; partly: above it on all."""

    method: str
    control: str
    factor: float

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.method, self.control)

    @property
    def rule(self) -> str:
        return f"{self.method} at least {self.factor:g} times {self.control} on every seed"

    def __call__(self, measured: Measured, metric: str) -> Judgement:
        ours, control = measured.paired(self.method, self.control, metric)
        control = np.maximum(control, 1e-3)  # less what is left after shuffling, independent choices are 0 give or take
        ratio = ours / control
        if ratio.size > 1 and bool((ratio >= self.factor).all()):
            verdict: Verdict = "shown"
        else:
            verdict = "partly" if bool((ratio > 1).all()) else "not_shown"
        note = f"{ratio.min():.3g} to {ratio.max():.3g} times over {ratio.size} seeds, needed {self.factor:g}"
        return Judgement(verdict=verdict, measured=float(ratio.mean()), interval=interval(ratio), note=note)


FURTHER = (
    "Passed on {recurrent}, not passed {not_passed}, passed without gradient {detached}, linear {linear}, MLP {mlp}"
)
TIES = FURTHER + ", cosine {cosine}, frozen {random}, recurrent from a flat start {flat_start} bits."

STUDY = Study(
    paper="rmoe",
    title="A state that routers hand up",
    setting=(
        "A Llama model (8 layers, width 64) over bytes of the standard library's source files, 8 experts of width 64 "
        "with 2 active in every layer, state of 32, balance loss 0.01, 260 steps of 1024 bytes; all arms see the same "
        "tokens and start with the same weights but for routers. Routers with a hidden layer start with logits that "
        "vary over tokens as a linear router's do. Ties are the mutual information of best experts on held-out tokens, "
        "less that of shuffled ones. The paper's models have 15M parameters and more and train for 80,000 steps."
    ),
    claims=(
        Claim(
            key="tied_near",
            text="The state ties the choices of neighbouring layers: twice the information without passing it on.",
            where="section 5.2, the figure of mutual information",
            claimed="higher mutual information between layers; no number can be read off",
            metric="tie_near",
            judge=Times(method="recurrent", control="not_passed", factor=2),
            tells=TIES
            + " Beyond what the byte explains: {recurrent.tie_near_beyond} and {not_passed.tie_near_beyond}.",
        ),
        Claim(
            key="tied_far",
            text="So it does for layers three and more apart.",
            where="section 5.2, the figure of mutual information",
            claimed="higher mutual information between layers; no number can be read off",
            metric="tie_far",
            judge=Times(method="recurrent", control="not_passed", factor=2),
            tells=TIES + " Beyond the byte: {recurrent.tie_far_beyond} and {not_passed.tie_far_beyond}.",
        ),
        Claim(
            key="tied_near_linear",
            text="Neighbouring layers share twice the information that they do with linear routers.",
            where="section 5.2, the figure of mutual information",
            claimed="higher mutual information between layers; no number can be read off",
            metric="tie_near",
            judge=Times(method="recurrent", control="linear", factor=2),
            tells=TIES + " Beyond the byte: {recurrent.tie_near_beyond} and {linear.tie_near_beyond}.",
        ),
        Claim(
            key="tied_far_linear",
            text="So do layers three and more apart.",
            where="section 5.2, the figure of mutual information",
            claimed="higher mutual information between layers; no number can be read off",
            metric="tie_far",
            judge=Times(method="recurrent", control="linear", factor=2),
            tells=TIES + " Beyond the byte: {recurrent.tie_far_beyond} and {linear.tie_far_beyond}.",
        ),
        Claim(
            key="quality",
            text="It is as good as a linear router.",
            where="tables 1 and 4: 1.183 against 1.184 at 15M parameters, 1.116 against 1.128 at 36M",
            claimed="1.183 against 1.184 bits at the smallest size",
            metric="bits",
            judge=NotWorse(method="recurrent", control="linear", tolerance=0.005, relative=True),
            tells=FURTHER + ", cosine {cosine}, frozen {random}, from a flat start {flat_start} bits a byte.",
        ),
        Claim(
            key="passing_helps",
            text="Passing the state on is better than the same router without it.",
            where="ablation: 1.183 against 1.196 at 15M parameters",
            claimed="1.183 against 1.196 bits",
            metric="bits",
            judge=Beats(method="recurrent", control="not_passed"),
            tells=FURTHER + ", frozen random routers {random} bits a byte.",
        ),
        Claim(
            key="gradient_helps",
            text="Passing it on without its gradient is worse.",
            where="ablation: 1.133 detached against 1.116",
            claimed="1.116 against 1.133 bits",
            metric="bits",
            judge=Beats(method="recurrent", control="detached"),
            tells=FURTHER + ", frozen random routers {random} bits a byte.",
        ),
        Claim(
            key="flatter",
            text="Its choices are flatter: the best expert's score is nearer to the second's.",
            where="appendix, inner balance",
            claimed="median ratio 2.0 against 34.7",
            metric="inner_balance",
            judge=Beats(method="recurrent", control="linear"),
            tells=(
                "The best expert's score is {recurrent} times the second's when the state is passed on, {not_passed} "
                "when not, {linear} with a linear and {mlp} with an MLP router, {flat_start} from a flat start."
            ),
        ),
    ),
    arms=(
        Arm(name="recurrent", text="one GRU for all layers, its state passed on with gradient"),
        Arm(name="not_passed", text="the same, every layer starts from a zero state", role="control"),
        Arm(name="detached", text="the state passed on without gradient", role="control"),
        Arm(name="linear", text="linear routers", role="control"),
        Arm(name="mlp", text="routers with a hidden layer, as many router parameters", role="control"),
        Arm(name="cosine", text="routers by cosine in 16 dimensions", role="reference"),
        Arm(name="random", text="linear routers, random and frozen, no balance loss", role="reference"),
        Arm(name="flat_start", text="recurrent, all router weights from N(0, 0.02)", role="reference"),
    ),
    run=run,
    methods=("train.rmoe", "train.softmax_topk", "train.moe", "train.balance_loss"),
    units={"tie_near": "bits", "tie_far": "bits", "bits": "bits a byte", "inner_balance": "times"},
)
