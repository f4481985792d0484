"""RMoE: does a state that routers hand up make routing depend on the routing below, and does it help?

Every arm is the same Llama model over bytes with the same experts, first weights and data; only the routers differ. The
deciding control is the same recurrent router whose state is not passed on: it has the same parameters and does the same
work. Choices of two layers are compared by the mutual information of their best experts over held-out tokens, less what
the same choices show when the tokens of one layer are shuffled.
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
from moestro.core.layer import MoELayer
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
from moestro.studies._language import Scale, heldout, llama, text, train
from moestro.training.objectives import Causal


EXPERTS, TOP_K, BALANCE = 8, 2, 0.01
EMBEDDING, TAU = 16, 0.3  # of the cosine router
FAR = 3  # layers apart
SHUFFLES = 5
BYTES = 259  # a BPE of this size has no merges: 256 bytes and three specials
RECURRENT: dict[str, dict[str, Any]] = {
    "recurrent": {},
    "not_passed": {"pass_state": False},
    "detached": {"detach_state": True},
}


def scale(budget: Budget) -> Scale:
    """Experts are as wide as the model."""
    return budget.pick(
        ci=Scale(vocabulary=BYTES, layers=4, dim=16, inner=16, heads=2, length=32, batch=2, steps=3, heldout=4),
        micro=Scale(vocabulary=BYTES, layers=4, dim=64, inner=64, length=64, batch=4, steps=60, heldout=32),
        full=Scale(vocabulary=BYTES, layers=8, dim=128, inner=128, length=128, batch=8, steps=200, heldout=128),
    )


# -- models -------------------------------------------------------------------------------------------------------


class Behind(Router):
    """A plain router that sees what another module makes of its input."""

    def __init__(self, before: nn.Module, inner: Router) -> None:
        super().__init__(inner.num_experts, top_k=inner.top_k)
        self.before = before
        self.inner = inner

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router."""
        return self.inner.score(self.before(x_TD), bank, ctx)

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
    """Inner width of the MLP router that has as many parameters, over all layers, as the recurrent ones."""
    state, rows = size.dim // 2, size.dim + EXPERTS
    cell = 6 * state * state + 6 * state
    return state + round(cell / (size.layers * rows))


def router_of(arm: str, size: Scale, site: Site, shared: Shared) -> Router:
    """The router of an arm for one layer."""
    plain, here = method("train.softmax_topk"), site
    config: dict[str, Any] = {"num_experts": EXPERTS, "top_k": TOP_K}
    if arm in RECURRENT:
        use = method("train.rmoe")
        built: Router = use.build(
            site, use.configure({**config, "state_size": size.dim // 2, **RECURRENT[arm]}), shared
        )
        return built
    before: nn.Module | None = None
    width = {"mlp": mlp_width(size), "cosine": EMBEDDING}.get(arm, size.dim)
    if arm == "mlp":
        before = nn.Sequential(nn.Linear(size.dim, width, bias=False), nn.SiLU())
    elif arm == "cosine":
        before = nn.Sequential(nn.Linear(size.dim, width, bias=False), Unit(learned=True))
    if before is not None:
        nn.init.normal_(before[0].weight, std=0.02)  # type: ignore[index]
        here = Site(path=site.path, kind="mlp", module=site.module, dim=width, layer=site.layer)
    inner: Router = plain.build(here, plain.configure(config), shared)
    if arm == "cosine":
        nn.utils.parametrize.register_parametrization(inner, "weight", Unit())
    if arm == "random":
        inner.requires_grad_(False)
    return inner if before is None else Behind(before, inner)


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


# -- measurements -------------------------------------------------------------------------------------------------


def information(first_T: Tensor, second_T: Tensor) -> float:
    """Mutual information in bits of two choices among the experts, from their counts over tokens."""
    counts = torch.bincount(first_T * EXPERTS + second_T, minlength=EXPERTS**2).view(EXPERTS, EXPERTS).double()
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    there = joint > 0
    return float((joint[there] * (joint[there] / apart[there]).log2()).sum())


def shared_information(first_T: Tensor, second_T: Tensor, draw: torch.Generator) -> float:
    """``information`` less its mean when the tokens of one choice are shuffled: 0 for independent choices."""
    shuffled = [second_T[torch.randperm(len(second_T), generator=draw)] for _ in range(SHUFFLES)]
    null = sum(information(first_T, other_T) for other_T in shuffled) / SHUFFLES
    return information(first_T, second_T) - null


@torch.no_grad()
def probabilities(model: nn.Module, data: Dataset, size: Scale) -> Tensor:
    """Router probabilities of held-out tokens, [L, T, E]."""
    (rows,) = data.sources.values()
    objective, found = Causal(), []
    model.eval()
    for at in range(0, len(rows), size.batch):
        examples = [rows[i] for i in range(at, min(at + size.batch, len(rows)))]
        with session(collect=True) as opened:
            objective(model, objective.collate(examples, []), {})
        (ctx,) = opened.take()
        routings = [routing for routing in ctx.routings.values() if routing is not None]
        assert ctx.tokens is not None
        found.append(
            torch.stack([routing.scores.probabilities() for routing in routings if routing.scores is not None])[
                :, ctx.tokens.valid_T
            ]
        )
    return torch.cat(found, dim=1)


def measure(probability_LTE: Tensor) -> dict[str, float]:
    """Information between layers, and how decided and how balanced routing is, as means over layers."""
    best_LT = probability_LTE.argmax(-1)
    draw = torch.Generator().manual_seed(0)
    pairs = {
        (one, two): shared_information(best_LT[one], best_LT[two], draw)
        for one, two in combinations(range(len(best_LT)), 2)
    }
    top = probability_LTE.topk(TOP_K, dim=-1)
    load = torch.stack([torch.bincount(ids.reshape(-1), minlength=EXPERTS) for ids in top.indices]).double()
    first, second = top.values[..., 0], top.values[..., 1]
    return {
        "mi_near": float(np.mean([bits for (one, two), bits in pairs.items() if two - one == 1])),
        "mi_far": float(np.mean([bits for (one, two), bits in pairs.items() if two - one >= FAR])),
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
    train(model, data.train, size, seed, losses={} if arm == "random" else {"balance": BALANCE})
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    routers = {id(p): p.numel() for part in [*(layer.router for layer in layers), model.shared] for p in part.parameters()}
    return {
        "bits": heldout(model, data.heldout, size) / math.log(2),
        "router_parameters": sum(routers.values()),
        **measure(probabilities(model, data.heldout, size)),
    }
