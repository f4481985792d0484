"""Compressed experts: half of a token's experts compute, each of the others is a vector that scales what those see.

A router chooses k experts by rank. The first k_m are main and compute; the other k_a are auxiliary, and of each only a
learned vector is used. With w the routing weights, A the auxiliary experts of a token, d the width, f an expert's:

    a_i = w_i / sum over A of w_j                                  float32; theta = 1 where the sum is 0
    theta = 1 + sum over A of a_i delta_i                          delta [E, V], 0 at the start
    y = sum over main i of w_i E_i(x; theta)
    E(x; t1, t2, t3) = W_down (t2 * act(W_gate (t1 * x)) * (W_up (t3 * x)))

inject="all": theta = (t1, t2, t3), V = 2 d + f (experts without gate: t1 and t2, V = d + f). inject="input": one vector
t1 = t3, V = d, and t2 = 1. At the start the layer is bit for bit the layer that chooses k_m; in training that holds
against the reference loop, since one product for gate and up becomes two. Main weights are the router's among all k:
they sum to less than before unless ``renormalise_main`` gives them the auxiliary experts' share too, w_i times the sum
over all over the sum over main.

All experts stay, since each is main for some tokens: memory does not shrink. A token needs k_m / k of the operations
and of the bytes of its experts, and V numbers of each auxiliary one. Losses, counts and traces see all k choices, the
auxiliary ones as taken out: they are demand that no expert computes. Fine-tune everything together afterwards, vectors
and router too; to train the vectors alone is another experiment.

``strip`` goes back: the vectors are dropped and the router chooses k_m.

Source: compressed experts (2503.00634); vectors for each of the three matrices as in its released code.
"""

import functools
import math
from typing import Any, TypeVar

import torch
from pydantic import Field, model_validator
from torch import nn

from moestro.core.bank import StackedFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError, PlanError
from moestro.core.inputs import LayerShape, PlanInputs, with_gate
from moestro.core.layer import MoELayer
from moestro.core.plan import ExpertPlan, ExpertSource, LayerExperts, MethodUse
from moestro.core.registry import method
from moestro.core.router import Router
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site
from moestro.methods.compress._parts.compressed_bank import EPS, CompressedFFN, Inject, operations
from moestro.surgery.choice import Layers, choose


ID = "compress.compressed_experts"
AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Config(BaseConfig):
    """Settings.

    Attributes:
        layers: which mixtures a plan is about: all, first:N, last:N, every:N or a list.
        n_main: k_m, experts that compute for a token; None means half of the router's choices, rounded up.
        inject: a vector for the input of each matrix, or one for the expert's input.
        renormalise_main: the main experts' weights sum to what all k summed to.
        strip: back to a plain mixture that chooses as many experts as computed.
    """

    layers: Layers = "all"
    n_main: int | None = Field(default=None, ge=1)
    inject: Inject = "all"
    renormalise_main: bool = False
    strip: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.strip and (self.n_main is not None or self.renormalise_main or self.inject != "all"):
            raise ConfigError("strip keeps the number of experts that compute; leave the other settings out")
        return self


def main_count(top_k: int, n_main: int | None) -> int:
    """k_m for a router that chooses ``top_k``.

    Raises:
        ConfigError: nothing would be auxiliary by default, or more would be main than are chosen.
    """
    if n_main is None and top_k == 1:
        raise ConfigError("the router chooses 1 expert, none of which can be auxiliary; it must choose 2 or more")
    if n_main is not None and n_main > top_k:
        raise ConfigError(f"n_main={n_main}, but the router chooses {top_k}; give at most {top_k}")
    return math.ceil(top_k / 2) if n_main is None else n_main


def mark_main(routing: Routing, n_main: int, renormalise: bool) -> Routing:
    """A routing by rank whose choices from rank ``n_main`` on are taken out: demand that no expert computes.

    Raises:
        ContextError: choices without ranks: ragged, scored by nobody, with nulls, or cut by a capacity.
    """
    if routing.top_k is None or routing.scores is None or routing.num_null or routing.kept_N is not None:
        raise ContextError(
            "compressed experts need a router that ranks a fixed number of experts for each token, without nulls and "
            "capacity"
        )
    if routing.top_k <= n_main:
        return routing
    weight_TK = routing.weight_TK
    if renormalise:
        main_TM = weight_TK[:, :n_main]
        gain_T1 = weight_TK.sum(-1, keepdim=True) / main_TM.sum(-1, keepdim=True).clamp_min(EPS)
        weight_TK = torch.cat([main_TM * gain_T1, weight_TK[:, n_main:]], -1)
    kept_K = torch.arange(routing.top_k, device=weight_TK.device) < n_main
    return routing.replace(weight_N=weight_TK.reshape(-1), kept_N=kept_K.repeat(routing.num_tokens))


class RankedRouter(Router):
    """What a router becomes: it chooses as before, and marks who computes. Its tensors keep their names."""

    n_main: int
    renormalise_main: bool

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        return mark_main(super().choose(scores, ctx), self.n_main, self.renormalise_main)  # type: ignore[safe-super]

    def real_per_token(self, length: int) -> float | None:
        """See Router."""
        return self.n_main


@functools.cache
def _ranked(kind: type[Router]) -> type[RankedRouter]:
    return type(f"Ranked{kind.__name__}", (RankedRouter, kind), {})


def ranked(router: Router, n_main: int, renormalise: bool) -> RankedRouter:
    """The same router, changed in place: its class gets RankedRouter in front."""
    router.__class__ = _ranked(type(router))
    assert isinstance(router, RankedRouter)
    router.n_main, router.renormalise_main = n_main, renormalise
    return router


def _mixture(site: Site) -> tuple[MoELayer, StackedFFN]:
    """The mixture of equal experts at a site."""
    there = site.module
    if site.kind != "mlp" or not isinstance(there, MoELayer) or not isinstance(there.bank, StackedFFN):
        raise ConfigError(
            f"{site.path}: compressed experts need a mixture of equal feed-forward experts; a "
            f"{type(there).__name__} stands there ({site.kind})"
        )
    return there, there.bank


def _ranks(site: Site, router: Router) -> int:
    """How many experts a router ranks for each token."""
    top_k = router.top_k
    if top_k is None or router.num_null or router.real_per_token(512) != top_k:
        raise ConfigError(
            f"{site.path}: {type(router).__name__} does not rank a fixed number of experts for each token (expert "
            "choice, nulls, a capacity or a varying number); use a top-k router such as train.softmax_topk"
        )
    return top_k


def _inherit(new: AnyModule, old: nn.Module) -> AnyModule:
    """Copy the tensors that both have, and which of them are trained."""
    held = old.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in new.state_dict(keep_vars=True).items():
            if name in held:
                tensor.requires_grad_(held[name].requires_grad)
                if not (tensor.is_meta or held[name].is_meta):
                    tensor.copy_(held[name])
    return new


def _router(site: Site, old: Router, shared: Shared, top_k: int) -> Router:
    """A router like the one at the site that chooses ``top_k``."""
    use = getattr(old, "made_by", None)
    if use is None:
        raise ConfigError(f"{site.path}: nothing says how its {type(old).__name__} was made; swap in a router by id")
    found = method(use.method)
    plain = {"method": use.method, "config": use.config}
    again = plain if top_k == old.top_k else with_gate(plain, top_k=top_k)
    made: Router = found.build(site, found.configure(again["config"]), shared)
    return _inherit(made, old)


def _entry(there: LayerShape, config: Config) -> tuple[LayerExperts, dict[str, int]]:
    """What becomes of a layer, and its operations a token by part, empty where it is stripped."""
    settings: dict[str, Any] = {"strip": True}
    parts: dict[str, int] = {}
    if not config.strip:
        if there.top_k is None:
            raise PlanError(
                f"layer {there.layer}: its router does not rank a fixed number of experts, or its experts are "
                "compressed already; a router with top_k can be compressed, and compressed experts stripped first"
            )
        settings = config.model_dump(mode="json", include={"inject", "renormalise_main"})
        try:
            settings["n_main"] = main_count(there.top_k, config.n_main)
        except ConfigError as error:
            raise PlanError(f"layer {there.layer}: {error}") from None
        form = {"gated": there.gated, "top_k": there.top_k, "n_main": settings["n_main"], "inject": config.inject}
        parts = operations(there.dim, there.inner, there.out, **form)
    experts = [[ExpertSource(layer=there.layer, expert=expert)] for expert in range(there.num_experts or 0)]
    return LayerExperts(layer=there.layer, experts=experts, module=MethodUse(method=ID, config=settings)), parts


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The mixture at the site with compressed experts, or with ``strip`` a plain one again. Router, experts and
    vectors are tensors of its own; what surrounds them is taken over.

    Raises:
        ConfigError: no mixture of equal experts, choices without ranks, more main experts than choices, or vectors that
            are there already (with ``strip``: none).
    """
    there, old = _mixture(site)
    if isinstance(old, CompressedFFN) != config.strip:
        state = "no compressed experts to strip" if config.strip else "compressed experts already; strip them first"
        raise ConfigError(f"{site.path} has {state}")
    if isinstance(old, CompressedFFN):
        bank = StackedFFN(old.num_experts, old.dim, old.inner, **old.form)
        router = _router(site, there.router, shared, old.n_main)
    else:
        top_k = _ranks(site, there.router)
        try:
            main = main_count(top_k, config.n_main)
        except ConfigError as error:
            raise ConfigError(f"{site.path}: {error}") from None
        bank = CompressedFFN(old, main, config.inject)
        router = ranked(_router(site, there.router, shared, top_k), main, config.renormalise_main)
    return there.around(router, _inherit(bank, old))


def plan(inputs: PlanInputs, config: Config) -> ExpertPlan:
    """Compressed experts in the chosen mixtures, or with ``strip`` none any more; no matrix changes.

    The notes give the operations of a token's experts by part, summed over layers. ``saves`` says that operations are
    saved and no bytes.

    Raises:
        PlanError: no mixtures, choices without ranks, more main experts than choices.
    """
    made = [_entry(there, config) for there in choose(inputs.shape, config.layers, dense=False)]
    total = {part: sum(parts.get(part, 0) for _, parts in made) for part in ("main", "auxiliary", "vectors")}
    notes = {
        "keeps": "nothing" if total["auxiliary"] or config.strip else "as_routed",
        "saves": "operations",
        "operations_per_token": total,
    }
    return ExpertPlan(
        method=ID,
        config=config.model_dump(mode="json"),
        seed=inputs.seed,
        model_hash=inputs.subject.fingerprint(),
        layers=[entry for entry, _ in made],
        notes=notes,
    )


CARD = MethodCard(
    title="Efficiently Editing Mixture-of-Experts Models with Compressed Experts",
    year=2025,
    arxiv="2503.00634",
    paper="compressed-experts",
    summary="Half of a token's experts compute; each of the others is a learned vector that scales what those see.",
    taxonomy="inference/model/compression/expert-pruning",
    needs=("model",),
    deviations=(
        "vectors are stored as differences from 1, so that weight decay pulls them to 1 and not to 0",
        "the vector of an expert's inner units is as long as these; the released code cuts one of the model's width",
        "an odd number of choices leaves one more main than auxiliary experts",
    ),
)
