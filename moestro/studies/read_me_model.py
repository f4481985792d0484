"""Read-ME: are units specific to a domain, and can a router that sees ids alone tell whose turn it is?

A pretrained model's feed-forwards keep half of their units a token, in every layer, and no weight is changed. The arms
differ in which half: that of the expert a pre-gating router chose, of the expert of the text's own domain, of the
domain least like it, of an expert drawn for each token, or the half that all domains together use most.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.core.plan import MethodUse
from moestro.core.registry import method
from moestro.core.routing import Routing
from moestro.core.session import Edit, session
from moestro.observe.neurons import domain_activity
from moestro.observe.passing import scaled_inputs
from moestro.studies._framework import BUDGETS, Arm, Beats, Budget, Claim, Recovers, Study, Within
from moestro.studies._kinds import DOMAINS, dense, fresh, ids_of, rows


KEEP = 0.5
ROUTER_DIM = 64


@dataclass(frozen=True)
class Made:
    """A model cut for a seed.

    Attributes:
        masks: by layer. everywhere: for all domains together, by layer, the same number of units. overlap_DD: share of
            a domain's units that another has too, mean over layers. agreement: of the fitted router with its targets.
        loss: of the router, first and last tenth of the steps. seconds: of all of it.
    """

    model: Any
    masks: Mapping[int, Any]
    everywhere: Mapping[int, Any]
    overlap_DD: Tensor
    agreement: float
    losses: tuple[float, float]
    seconds: float


def overlap_of(masks: Mapping[int, Any], inner: int) -> Tensor:
    """Share of common units of each pair of experts [D, D], mean over layers."""
    total = torch.zeros(len(DOMAINS), len(DOMAINS))
    for mask in masks.values():
        member = torch.zeros(len(DOMAINS), inner).scatter_(1, mask.rows_EW, 1.0)
        total += member @ member.T / mask.rows_EW.shape[1]
    return total / len(masks)


def fit(model: Any, ids_NS: Tensor, target_NSE: Tensor, budget: Budget, seed: int) -> tuple[float, float, float]:
    """Teach the gate from cached overlaps; agreement with their largest, and the first and last losses."""
    part = method("train.read_me").module
    gate = part.gate_of(model)
    part.start_embedding(model)
    gate.requires_grad_(True)
    steps = budget.pick(ci=10, micro=200, full=300)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-3, weight_decay=0.01)
    draw, seen = np.random.default_rng(seed), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + np.cos(np.pi * step / steps))
        places = draw.integers(len(ids_NS), size=min(4, len(ids_NS)))
        loss = part.distillation_loss(gate(ids_NS[places]).flatten(0, 1), target_NSE[places].flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()) / (len(places) * ids_NS.shape[1]))
    gate.requires_grad_(False)
    with torch.no_grad():
        right = (gate(ids_NS).argmax(-1) == target_NSE.argmax(-1)).float().mean()
    tenth = max(1, steps // 10)
    return float(right), float(np.mean(seen[:tenth])), float(np.mean(seen[-tenth:]))


@functools.lru_cache(maxsize=1)
def made(seed: int, name: str) -> Made:
    """Measure domains, cut, and teach the router, on rows drawn by the seed."""
    budget, started = BUDGETS[name], time.perf_counter()
    convert, train = method("convert.read_me").module, method("train.read_me").module
    few, more = budget.pick(ci=4, micro=24, full=6), budget.pick(ci=4, micro=48, full=6)
    drawn = {domain: rows(domain, "train", few + more, name, seed) for domain in DOMAINS}
    teacher, model = dense(name), fresh(name)
    given = [{"input_ids": ids[:few], "domain": domain} for domain, ids in drawn.items()]
    activity = domain_activity(teacher, given)
    masks = convert.domain_masks(activity, KEEP, DOMAINS, min_tokens=1)
    everywhere = {
        layer: convert.masks_of(torch.stack([found[domain][0] for domain in DOMAINS]).mean(0, keepdim=True), KEEP)
        for layer, found in activity.items()
    }
    dim = min(ROUTER_DIM, model.config.hidden_size)
    router = MethodUse(method="train.read_me", config={"router_dim": dim})
    convert.refactorize(model, masks, router=router, seed=seed)
    ids_NS = torch.cat([ids[few:] for ids in drawn.values()])
    targets = [train.targets(model, teacher, {"input_ids": part}) for part in torch.split(ids_NS, 4)]
    target_NSE = torch.cat(targets).view(*ids_NS.shape, len(DOMAINS))
    agreement, first, last = fit(model, ids_NS, target_NSE, budget, seed)
    overlap_DD = overlap_of(masks, model.config.intermediate_size)
    return Made(model.eval(), masks, everywhere, overlap_DD, agreement, (first, last), time.perf_counter() - started)


# -- who chooses ----------------------------------------------------------------------------------------------------


class Instead(Edit):
    """Other experts than the router's, int64 [T], the same in every layer."""

    def __init__(self, expert_T: Tensor) -> None:
        self.expert_T = expert_T

    def on_routing(self, site: str, routing: Routing, router: Any, ctx: Any) -> Routing:
        """See Edit."""
        weight_TK = torch.ones(len(self.expert_T), 1)
        return Routing.from_topk(
            self.expert_T[:, None], weight_TK, num_experts=routing.num_experts, scores=routing.scores
        )


@torch.no_grad()
def losses(model: nn.Module, ids_BS: Tensor, edits: Sequence[Edit] = ()) -> float:
    """Mean loss of next tokens in nats."""
    with session(edits=edits):
        logits_BSV = model(input_ids=ids_BS).logits[:, :-1].float()
    return float(nn.functional.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten()))


def held(domain: str, seed: int, name: str) -> Tensor:
    """Held-out rows of a domain, drawn by the seed; German has few."""
    most = len(ids_of(domain, "heldout", name))
    return rows(domain, "heldout", min(most, BUDGETS[name].pick(ci=2, micro=16, full=6)), name, seed)


def chosen(arm: str, cut: Made, place: int, ids_BS: Tensor, draw: torch.Generator) -> list[Edit]:
    """What makes the cut model the arm's on text of domain number ``place``."""
    if arm == "pregated":
        return []
    count = ids_BS.numel()
    if arm == "random":
        return [Instead(torch.randint(len(DOMAINS), (count,), generator=draw))]
    own = place if arm == "oracle" else int(cut.overlap_DD[place].argmin())
    return [Instead(torch.full((count,), own))]


def summed(found: Mapping[str, float]) -> dict[str, float]:
    """The mean over domains and each domain's."""
    return {"heldout_loss": float(np.mean(list(found.values())))} | {f"loss_{k}": v for k, v in found.items()}


def static(cut: Made, seed: int, name: str) -> dict[str, float]:
    """The dense model with the units that all domains together use most."""
    factors: dict[nn.Module, Tensor] = {}
    for layer, mask in cut.everywhere.items():
        down = dense(name).get_submodule(f"model.layers.{layer}.mlp.down_proj")
        factors[down] = torch.zeros(down.in_features).scatter_(0, mask.rows_EW[0], 1.0)
    with scaled_inputs(factors):
        return by_dense(seed, name)


def by_dense(seed: int, name: str) -> dict[str, float]:
    """The dense model's losses, as it stands."""
    return summed({domain: losses(dense(name), held(domain, seed, name)) for domain in DOMAINS})


def choices(cut: Made, seed: int, name: str) -> dict[str, float]:
    """What the router does on held-out text, before the model runs."""
    own, stay, right, total = 0.0, 0.0, 0.0, 0
    part = method("train.read_me").module
    load = torch.zeros(len(DOMAINS))
    for place, domain in enumerate(DOMAINS):
        ids_BS = held(domain, seed, name)
        expert_BS = next(iter(part.route_ahead(cut.model, {"input_ids": ids_BS}).values())).expert_N.view(ids_BS.shape)
        target_TE = torch.cat([part.targets(cut.model, dense(name), {"input_ids": rows_S[None]}) for rows_S in ids_BS])
        right += float((target_TE.argmax(-1) == expert_BS.flatten()).sum())
        own += float((expert_BS == place).sum())
        stay += float((expert_BS[:, 1:] == expert_BS[:, :-1]).float().mean()) / len(DOMAINS)
        load += torch.bincount(expert_BS.flatten(), minlength=len(DOMAINS))
        total += ids_BS.numel()
    return {
        "own_domain": own / total,
        "same_as_before": stay,
        "top_load": float(load.max()) / total,
        "heldout_agreement": right / total,
    }


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Measure one arm."""
    name = budget.name
    if arm == "dense":
        return by_dense(seed, name)
    cut = made(seed, name)
    if arm == "static":
        return static(cut, seed, name)
    draw, found = torch.Generator().manual_seed(seed), {}
    for place, domain in enumerate(DOMAINS):
        ids_BS = held(domain, seed, name)
        found[domain] = losses(cut.model, ids_BS, chosen(arm, cut, place, ids_BS, draw))
    scores = summed(found)
    if arm == "oracle":
        off = cut.overlap_DD[~torch.eye(len(DOMAINS), dtype=torch.bool)]
        permanent = [len(mask.permanent) / mask.rows_EW.shape[1] for mask in cut.masks.values()]
        banks = [module for module in cut.model.modules() if hasattr(module, "unique_bytes")]
        copied = sum(bank.nbytes(expert) for bank in banks for expert in range(bank.num_experts))
        scores |= {
            "overlap_docs_code": float(cut.overlap_DD[0, 1]),
            "overlap": float(off.mean()),
            "permanent": float(np.mean(permanent)),
            "unique_share": sum(bank.unique_bytes() for bank in banks) / copied,
        }
    if arm == "pregated":
        scores |= choices(cut, seed, name)
        scores |= {"target_agreement": cut.agreement, "router_loss_fall": 1 - cut.losses[1] / cut.losses[0]}
        scores["fit_seconds"] = cut.seconds
    return scores


LOSSES = (
    "Held-out loss, mean of four domains: dense {dense.heldout_loss}, the text's own domain {oracle.heldout_loss}, "
    "router {pregated.heldout_loss}, one half for all {static.heldout_loss}, random {random.heldout_loss}, the least "
    "similar domain {inverted.heldout_loss}. "
)
WHY = (
    "The router sends {pregated.own_domain} of the tokens to their own domain and makes "
    "{pregated.target_agreement} of the choices that the targets rank first on its training rows, "
    "{pregated.heldout_agreement} on held-out ones; its loss fell by "
    "{pregated.router_loss_fall}. Two domains share {oracle.overlap} of their units on average, documentation and code "
    "{oracle.overlap_docs_code}; {oracle.permanent} of an expert is common to all."
)

STUDY = Study(
    paper="read-me",
    part="model",
    title="Half of the units, chosen from token ids before the model runs",
    setting=(
        "SmolLM2-135M-Instruct (30 layers, 4-bit weights opened as float32), half of the units of every feed-forward, "
        "no weight tuned; domains: documentation and code of the standard library, German prose, lines of arithmetic. "
        "1536 tokens a domain for the masks, 1536 for the router's targets, 1536 held out (German, of which there is "
        "little, 768); router of width 64, 300 steps; seeds change all rows and the router. The paper has Llama-2-7B, "
        "65,536 tokens a domain, a router of 18M parameters, and tunes experts and router in turn on 1.04B tokens."
    ),
    claims=(
        Claim(
            key="beats_static",
            text="Experts of domains under the router are better than one half-width model for all domains.",
            where="comparison with a dense pruned model, there after tuning on the same data",
            claimed="MMLU 38.9 against 27.1; lower perplexity on all seven domains",
            metric="heldout_loss",
            judge=Beats(method="pregated", control="static"),
            tells=LOSSES + WHY,
        ),
        Claim(
            key="beats_random",
            text="The router's experts are better than experts drawn for each token.",
            where="the method: the router is what makes the experts useful",
            claimed="not compared",
            metric="heldout_loss",
            judge=Beats(method="pregated", control="random"),
            tells=LOSSES + WHY,
        ),
        Claim(
            key="near_oracle",
            text="The router keeps three quarters of what knowing the domain would gain over one half for all.",
            where="the method: token ids are enough to route",
            claimed="not compared",
            metric="heldout_loss",
            judge=Recovers(method="pregated", cut="static", whole="oracle", share=0.75),
            tells=LOSSES + WHY,
        ),
        Claim(
            key="domains_differ",
            text="The wrong domain's expert is worse than the right one's.",
            where="section 3: activation sparsity is specific to domains",
            claimed="not in numbers",
            metric="heldout_loss",
            judge=Beats(method="oracle", control="inverted"),
            tells=LOSSES + WHY,
        ),
        Claim(
            key="masks_differ",
            text="Experts of prose and of code share at most nine tenths of their units.",
            where="section 3: domains use different units",
            claimed="not in numbers",
            metric="overlap_docs_code",
            judge=Within(arm="oracle", high=0.9),
            tells="Documentation and code share {oracle.overlap_docs_code} of an expert's units, all pairs "
            "{oracle.overlap}.",
        ),
    ),
    arms=(
        Arm(name="dense", text="the dense model, all units", role="reference"),
        Arm(name="static", text="the half that all domains together use most, for all tokens", role="control"),
        Arm(name="random", text="an expert drawn for each token, the same in every layer", role="control"),
        Arm(name="inverted", text="the expert of the domain whose units are least like the text's", role="control"),
        Arm(name="oracle", text="the expert of the text's own domain", role="reference"),
        Arm(name="pregated", text="the expert that the router chose from token ids"),
    ),
    run=run,
    methods=("convert.read_me", "train.read_me", "train.index_pool"),
    units={
        "heldout_loss": "nats a token",
        **{f"loss_{domain}": "nats a token" for domain in DOMAINS},
        "overlap_docs_code": "share of an expert's units",
        "overlap": "share of an expert's units",
        "permanent": "share of an expert's units",
        "unique_share": "bytes of the pool's used units over bytes of copies",
        "own_domain": "share of tokens",
        "same_as_before": "share of tokens",
        "top_load": "share of tokens",
        "target_agreement": "share of tokens",
        "fit_seconds": "s",
    },
)
