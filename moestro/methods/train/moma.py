"""MoMa: a mixture whose experts are split by modality; in each group the experts choose tokens of their modality.

Each token has a modality M, by the range of its id or by a tag. Group M has E_M experts and rows W_M [E_M, D]:

    S = sigmoid(x W_M^T)     without normalisation over experts
    expert j takes the k tokens of M in the batch with the largest x w_j,  k = c b_M rounded to an integer, at least 1
    y = sum over the experts j that took x of S_j FFN_j(x),  0 if there are none;   post_norm: y = RMSNorm(y)

for b_M valid tokens of M and c = capacity_factor, 1 / E_M if open, so that a token costs one feed-forward on average.
Tokens are ranked by float32 logits; sigmoids saturate. ``noise`` gumbel_sigmoid adds the difference of two Gumbel
samples, times the session's value ``router_noise`` (1), to the logits while training, for routers of copied experts.

The choice reads the whole batch. For inference auxiliary routers learn it in a second phase with the base frozen:

    phases:
      - {name: base, steps: 900, values: {auxiliary: 0}}
      - {name: auxiliary, train: ["*auxiliary*"], values: {router_noise: 0}}
    losses: {auxiliary: 1.0}

After that evaluation takes expert j iff a_j(x) > threshold, weighted by S_j, see ``_parts/batch_choice.py``. Before it,
evaluation chooses over its batch and generating is refused. As an objective the method is next-token prediction whose
losses are called causal_M or noncausal_M, by whether any layer's choice read the batch.

Source: MoMa (2407.21770, the parts on modality-aware experts, inference and upcycling).
"""

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro import ops
from moestro.core.bank import Bank, StackedFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import LossTerm, RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer
from moestro.core.router import Router, exact_linear, topk_indices
from moestro.core.routing import Routing, Scores
from moestro.core.session import session
from moestro.core.site import Shared, Site
from moestro.data.packing import IGNORE
from moestro.methods.train._parts.batch_choice import (
    AUXILIARY,
    AuxiliaryRouters,
    SelectionLoss,
    Witness,
    chooses_over_batch,
    logistic_like,
    whole_share,
)
from moestro.methods.train._parts.selection import normalise
from moestro.surgery.opened import form_at


NOISE = "router_noise"
Id = Annotated[int, Field(ge=0)]
Ranges = dict[str, list[tuple[Id, Id]]]


class Config(BaseConfig):
    """Settings.

    Attributes:
        groups: modality -> E_M. modality: modality -> ranges of token ids, first and last, where one modality without
            a range has all other ids; or the name of the session's tag that holds modalities (names or places).
        capacity_factor: c. noise: on the logits while training. expert_size, activation, gated: of an expert, None for
            those of the feed-forward at the site. post_norm: y is normalised; off where the block itself does so.
        threshold: of the auxiliary routers' answers, or ``calibrated``. bottleneck: their inner width, None for D / 2.
        allow_noncausal: without trained auxiliary routers let a prompt through with a cache; decoding stays refused.
    """

    groups: dict[str, Annotated[int, Field(ge=1)]] = Field(default={"text": 4, "image": 4}, min_length=1)
    modality: Ranges | str = Field(examples=[{"image": [(9, 31)]}])
    capacity_factor: float | None = Field(default=None, gt=0, le=1)
    noise: Literal["none", "gumbel_sigmoid"] = "none"
    expert_size: int | None = Field(default=None, ge=1)
    activation: ops.Activation | None = None
    gated: bool | None = None
    post_norm: bool = True
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["calibrated"] = 0.5
    bottleneck: int | None = Field(default=None, ge=1)
    allow_noncausal: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.modality == "":
            raise ConfigError("modality is an empty name; give ranges of token ids or the name of a tag")
        if isinstance(self.modality, str):
            return self
        if unknown := sorted(set(self.modality) - set(self.groups)):
            raise ConfigError(f"modality gives ids to {unknown[0]!r}; groups are {', '.join(self.groups)}")
        rest = [name for name in self.groups if not self.modality.get(name)]
        if len(rest) > 1:
            raise ConfigError(f"groups {' and '.join(rest)} have no ids; only one group can take all that are left")
        spans = sorted((*span, name) for name, spans in self.modality.items() for span in spans)
        for first, last, name in spans:
            if last < first:
                raise ConfigError(f"the ids of {name!r} go from {first} to {last}; the first must not be the larger")
        for (_, last, one), (first, _, two) in itertools.pairwise(spans):
            if first <= last:
                raise ConfigError(f"id {first} belongs to {one!r} and to {two!r}; ranges must not overlap")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """E_M of each group."""
        return tuple(self.groups.values())


def modality_of(ids_T: Tensor, ranges: Ranges, groups: Sequence[str]) -> Tensor:
    """Place of each id's modality among ``groups``, int64 [T]; -1 for an id that has none."""
    rest = next((place for place, name in enumerate(groups) if not ranges.get(name)), -1)
    found_T = torch.full_like(ids_T, rest)
    for place, name in enumerate(groups):
        for first, last in ranges.get(name, ()):
            found_T[(ids_T >= first) & (ids_T <= last)] = place
    return found_T


def modalities(config: Config, ctx: RoutingContext) -> Tensor:
    """Modality of each token of the forward, int64 [T].

    Raises:
        ContextError: a valid token that has none, or neither ids nor the tag are there.
    """
    groups, tokens = tuple(config.groups), ctx.tokens
    assert tokens is not None
    if isinstance(config.modality, str):
        found_T = ctx.tag_T(config.modality, groups)
        wrong_T = (found_T < 0) | (found_T >= len(groups))
    elif tokens.ids_T is None:
        raise ContextError("modalities are ranges of token ids, but the model was given embeddings; set modality: TAG")
    else:
        found_T = modality_of(tokens.ids_T, config.modality, groups)
        wrong_T = found_T < 0
    if bool((wrong_T & tokens.valid_T).any()):
        token = int((wrong_T & tokens.valid_T).nonzero()[0])
        what = f"tag {int(found_T[token])}" if tokens.ids_T is None else f"id {int(tokens.ids_T[token])}"
        raise ContextError(f"token {token} ({what}) is of none of the modalities {', '.join(groups)}")
    return found_T.masked_fill(wrong_T, 0)


def take_tokens(select_TE: Tensor, members: Sequence[Tensor], sizes: Sequence[int], factor: float | None) -> Tensor:
    """Which tokens each expert takes, bool [T, E]: of group after group the best of its members.

    Args:
        select_TE: what is ranked; -inf may not be taken. members: indices of the tokens of each group.
    """
    chosen_TE = torch.zeros_like(select_TE, dtype=torch.bool)
    first = 0
    for index_M, size in zip(members, sizes, strict=True):
        share = Fraction(1, size) if factor is None else Fraction(str(factor))
        if count := whole_share(len(index_M), share):
            column_E = torch.arange(first, first + size, device=index_M.device)
            picked_EX = topk_indices(select_TE[index_M][:, column_E].T, count)
            chosen_TE[index_M[picked_EX], column_E[:, None]] = True
        first += size
    return chosen_TE & (select_TE > float("-inf"))


class ModalityRouter(Router):
    """The router. Parameters: ``weight`` [E, D], group after group; ``auxiliary``. Other modalities have logit -inf."""

    causal = False
    choice_rows = ("weight", "auxiliary.out", "auxiliary.threshold")

    def __init__(self, dim: int, config: Config, site: str) -> None:
        super().__init__(sum(config.sizes), top_k=None)
        self.config, self.site = config, site
        self.weight = nn.Parameter(torch.empty(self.num_experts, dim))
        self.auxiliary = AuxiliaryRouters(dim, config.sizes, config.bottleneck, config.threshold)
        self.group_of = [place for place, size in enumerate(config.sizes) for _ in range(size)]
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.02)

    def over_batch(self, ctx: RoutingContext) -> bool:
        """Whether experts choose; else the auxiliary routers do."""
        members = self.tokens_by_group(ctx)[1]
        return chooses_over_batch(self.auxiliary, members, self.config.allow_noncausal, self.site, ctx)

    def tokens_by_group(self, ctx: RoutingContext) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Modalities [T] and the valid tokens of each; found once for all layers that see the whole forward."""
        tokens = ctx.tokens
        assert tokens is not None
        owner, name = "moma", f"{self.config.modality} {tuple(self.config.groups)}"
        found: tuple[Tensor, tuple[Tensor, ...]] | None = ctx.get(owner, name) if tokens.whole else None
        if found is None:
            modality_T = modalities(self.config, ctx)
            groups = range(len(self.config.sizes))
            members = tuple(((modality_T == group) & tokens.valid_T).nonzero().squeeze(1) for group in groups)
            found = (modality_T, members)
            if tokens.whole:
                ctx.put(owner, name, found)
        return found

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router. What is ranked: noisy logits, or how far auxiliary logits lie above their threshold."""
        modality_T, members = self.tokens_by_group(ctx)
        other_TE = modality_T[:, None] != torch.tensor(self.group_of, device=x_TD.device)
        logits_TC = exact_linear(x_TD, self.weight).masked_fill(other_TE, float("-inf"))
        noisy = self.training and self.config.noise == "gumbel_sigmoid"
        select_TC = logits_TC + ctx.value(NOISE, 1.0) * logistic_like(logits_TC) if noisy else logits_TC
        gate_TC = select_TC.sigmoid()
        if self.training and ctx.value(AUXILIARY, 1.0):
            ctx.put(self.site, AUXILIARY, self.auxiliary(x_TD, members))
        if not self.over_batch(ctx):
            select_TC = self.auxiliary(x_TD, members) - self.auxiliary.threshold.float()
        return Scores(logits_TC, select_TC.detach(), gate_TC, normalise(gate_TC, 1e-9))

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        whole, chosen_TE = self.over_batch(ctx), scores.select_TC > 0
        if whole:
            members = self.tokens_by_group(ctx)[1]
            chosen_TE = take_tokens(scores.select_TC, members, self.config.sizes, self.config.capacity_factor)
        return Routing.from_mask(
            chosen_TE, scores.gate_TC, num_experts=self.num_experts, scores=scores, causal=not whole
        )

    def real_per_token(self, length: int) -> float | None:
        """See Router; while experts choose, not rounded, and None where it depends on the modality."""
        factor, sizes = self.config.capacity_factor, self.config.sizes
        return 1.0 if factor is None else factor * sizes[0] if len(set(sizes)) == 1 else None


class ModalityLayer(MoELayer):
    """The mixture; not causal, whatever its state: training never is."""

    causal = False


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The layer for a feed-forward site of width ``site.dim``. It takes over the norm of such a layer at the site.

    Raises:
        ConfigError: settings that are open and that the site does not tell.
    """
    found, there = form_at(site), site.module
    inner = config.expert_size or (found.inner if found else getattr(site.model_config, "intermediate_size", None))
    if inner is None:
        raise ConfigError(f"{site.path}: {type(site.module).__name__} does not tell expert_size; give it")
    activation = config.activation or (found.activation if found else "silu")
    gated = config.gated if config.gated is not None else found is None or found.gated
    router = ModalityRouter(site.dim, config, site.path)
    bank = StackedFFN(
        router.num_experts, site.dim, inner, activation=activation, gated=gated, out=site.out  # type: ignore[arg-type]
    )  # fmt: skip
    before = there.post if isinstance(there, ModalityLayer) else None
    norm = before or nn.RMSNorm(bank.out, eps=1e-6) if config.post_norm else None
    return ModalityLayer(router, bank, site=site.path, post=norm, losses={AUXILIARY: SelectionLoss(router.auxiliary)})


def objective(
    model: nn.Module, batch: Mapping[str, Tensor], teachers: Mapping[str, nn.Module], config: Config
) -> dict[str, LossTerm]:
    """Next-token cross entropy by the modality of the target: sums whose means over all targets add up to the whole.

    Raises:
        ConfigError: modalities are a tag; ids of targets must tell them. ContextError: a target has none.
    """
    if isinstance(config.modality, str):
        raise ConfigError(f"modality={config.modality!r} is a tag; this objective needs ranges of token ids")
    witness = Witness()
    with session(recorder=witness):
        call = {name: value for name, value in batch.items() if name != "labels"}
        logits_BSV = model(**call, use_cache=False).logits
    label_T = batch["labels"][:, 1:].reshape(-1)
    flat_TV = logits_BSV[:, :-1].reshape(-1, logits_BSV.shape[-1]).float()
    loss_T = nn.functional.cross_entropy(flat_TV, label_T, ignore_index=IGNORE, reduction="none")
    modality_T = modality_of(label_T, config.modality, tuple(config.groups))
    if bool(((modality_T < 0) & (label_T != IGNORE)).any()):
        raise ContextError(f"a target is of none of the modalities {', '.join(config.groups)}; give it an id range")
    kind = "causal" if witness.causal else "noncausal"
    return {
        f"{kind}_{name}": LossTerm((loss_T * (modality_T == place)).sum(), "token")
        for place, name in enumerate(config.groups)
    }


CARD = MethodCard(
    title="MoMa: Efficient Early-Fusion Pre-training with Mixture of Modality-Aware Experts",
    year=2024,
    arxiv="2407.21770",
    paper="moma",
    summary="Experts split by modality that choose tokens of the batch; auxiliary routers make inference causal.",
    taxonomy="gating/sparse/expert-choice",
    deviations=(
        "an expert's share of the tokens is rounded to the nearest integer, at least 1; the paper leaves it open",
        "tokens are ranked by float32 logits, which sigmoids keep in order until they saturate",
        "auxiliary routers may also be trained along with the model; no gradient of theirs reaches it",
        "generation without a cache looks like evaluation and is not refused",
    ),
    causal=False,
)
