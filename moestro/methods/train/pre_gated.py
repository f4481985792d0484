"""Pre-gated mixtures: which experts a block runs, and with which weights, is decided D blocks earlier.

With x_N [T, D] the input of the mixture part of block N (what its router would see), of the mixtures N = 1 .. B of one
stack, distance d and any router ``gate`` with parameters V:

    (experts, weights)_N = gate_N(x_{N - d})    for N > d
    (experts, weights)_N = gate_N(x_N)          for the first d mixtures, and where ``own_gate`` says so
    y_N = sum over the chosen of weight * E_N(x_N)

Experts and the combine weights come from the earlier input, experts compute on their own block's. Nothing is predicted:
while blocks N - d .. N - 1 run, the experts of block N are known, so that they can be fetched meanwhile. Nothing
crosses steps: the inputs live in the forward's context, for the same tokens, and are recomputed by every decode step.

The gate stands at the block whose experts it chooses, so that its rows, biases and losses go with them: a balance loss
counts the early gate's probabilities for the block that uses them, pruning an expert removes its row. There is one
gate a mixture, and no input of the last d mixtures reaches any gate. Blocks without a mixture are not counted.

Top-1 gates must not renormalise, or the weight is 1 and no gradient reaches V.

Source: Pre-gated MoE (2308.12066, section 4).
"""

from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.plan import MethodUse
from moestro.core.router import Router
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site
from moestro.core.tokens import Tokens
from moestro.methods.train._parts.assemble import router_by_id


SLOT = "pre_gated_inputs"
ID = "train.pre_gated"


class Config(BaseConfig):
    """Settings.

    Attributes:
        gate: the router that chooses; its num_experts is filled in. distance: d, mixtures between a gate's input and
            the experts it chooses; 0 is the gate alone. own_gate: this mixture reads its own input whatever stands
            before it, and hands it on like the others.
    """

    num_experts: int = Field(default=8, ge=1)
    gate: MethodUse = MethodUse(method="train.softmax_topk", config={"top_k": 2})
    distance: int = Field(default=1, ge=0)
    own_gate: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.gate.method == ID:
            raise ConfigError(f"gate={ID!r}: a pre-gated router around another; give the router inside it")
        return self


class Inputs(NamedTuple):
    """What one mixture hands on: the last inputs [T, D] of the mixtures up to it, oldest first, and whose they are."""

    inputs: tuple[Tensor, ...]
    tokens: Tokens
    distance: int


def same_tokens(one: Tokens, other: Tokens) -> bool:
    """Whether two forwards' parts are about the same tokens in the same order."""
    if one is other:
        return True
    return torch.equal(one.row_T, other.row_T) and torch.equal(one.position_T, other.position_T)


class PreGated(Router):
    """The router: ``gate`` on an earlier input.

    Args:
        gate: what chooses. site: its place, which names its slot. distance, own_gate: see Config.
    """

    def __init__(self, gate: Router, site: str, *, distance: int, own_gate: bool = False) -> None:
        super().__init__(gate.num_experts, top_k=gate.top_k, num_null=gate.num_null)
        self.gate = gate
        self.site, self.distance, self.own_gate = site, distance, own_gate
        self.causal = gate.causal

    @property
    def choice_rows(self) -> tuple[str, ...]:  # type: ignore[override]
        """See Router: those of the gate, under its names."""
        return self.gate.choice_rows

    @property
    def choice_ids(self) -> tuple[str, ...]:  # type: ignore[override]
        """See Router."""
        return self.gate.choice_ids

    def tensor(self, name: str) -> Tensor | None:
        """See Router: the gate's tensor."""
        return self.gate.tensor(name)

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router. Hands the input on and scores the one of ``distance`` mixtures before.

        Raises:
            ContextError: the stack has no more mixtures than the distance, the mixtures before look another distance
                ahead, or what they saw are other tokens.
        """
        tokens = ctx.tokens_for(x_TD)
        found: Inputs | None = ctx.previous(self.site, SLOT)
        if found is None:
            self._check_stack(ctx)
        earlier = () if found is None else found.inputs
        read_TD = x_TD
        if found is not None and self.distance:
            self._check(found, tokens)
            if len(earlier) == self.distance and not self.own_gate:
                read_TD = earlier[0]
        if self.distance:
            ctx.put(self.site, SLOT, Inputs((*earlier, x_TD)[-self.distance :], tokens, self.distance))
        return self.gate.score(read_TD, bank, ctx)

    def _check_stack(self, ctx: RoutingContext) -> None:
        """Of the first mixture of a forward; one that is alone has nobody to look ahead to."""
        if 1 < len(ctx.sites) <= self.distance:
            raise ContextError(
                f"{self.site}: distance={self.distance} in a stack of {len(ctx.sites)} mixtures leaves none that is "
                f"chosen ahead; use at most {len(ctx.sites) - 1}"
            )

    def _check(self, found: Inputs, tokens: Tokens) -> None:
        if found.distance != self.distance:
            raise ContextError(
                f"{self.site}: distance={self.distance}, but the mixture before has {found.distance}; give all "
                "mixtures of a stack one distance, and own_gate=True to those that shall not be chosen ahead"
            )
        if not same_tokens(found.tokens, tokens):
            raise ContextError(
                f"{self.site}: {tokens.count} tokens arrive, the mixture before had {found.tokens.count} or others; a "
                "token must pass all pre-gated mixtures or none, so depth routing cannot stand between them"
            )

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        return self.gate.choose(scores, ctx)

    def real_per_token(self, length: int) -> float | None:
        """See Router."""
        return self.gate.real_per_token(length)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """See Router."""
        return self.gate.weigh(gate_TK)

    def after_step(self, load_C: Tensor) -> None:
        """See Router."""
        self.gate.after_step(load_C)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a mixture whose input is as wide as the site's.

    Raises:
        ConfigError: the gate's settings, or a gate that no loss of the output trains.
    """
    use: Any = config.gate
    gate = router_by_id(use, site, shared, num_experts=config.num_experts)
    if gate.hard:
        raise ConfigError(f"gate={use.method!r} learns by an objective of its own, which reads its own block's input")
    return PreGated(gate, site.path, distance=config.distance, own_gate=config.own_gate)


CARD = MethodCard(
    title="Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable Mixture-of-Expert Inference",
    year=2023,
    arxiv="2308.12066",
    paper="pre-gated-moe",
    summary="A gate reads the input of an earlier block, so that the next block's experts are known ahead.",
    taxonomy="gating/sparse/token-choice",
    deviations=("a gate is stored with the experts it chooses, not with the block whose input it reads",),
)
