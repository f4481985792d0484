"""Union of experts: a dense feed-forward or attention cut into slices that sum to it, each used by some tokens only.

For slices f_1 .. f_n (hidden units of a feed-forward, heads of an attention; nothing is copied) with block(x) = b + sum
f_i(x) exactly, and g = softmax(x W_g^T + b_g) [T, n],

    y_t = b + sum_{i in S_t} w_ti f_i(x_t),   v_ti = k_t g_ti / sum_{j in S_t} g_tj,   k_t = |S_t|
    combine="straight_through":  w = 1 forward, gradient of v;  all slices are the dense block and the gate learns
    combine="sum":               w = 1, no gradient;            what the released language model does
    combine="gate":              w = v

A head attends among the tokens that were routed to it. Who is routed where:

    mode="token_choice":   S_t = the top_k largest g_t, a matter of token t alone
    mode="expert_choice":  slice i takes the ceil(keep_ratio S) positions of a sequence with the largest g_ti
    mode="sequence":       one g = softmax([x_1 .. x_L] W_g^T + b_g) for all tokens of a sequence

The last two read later tokens, so causal models refuse them. Weights keep the names of the dense block, the gate comes
beside them: a saved model opens as the dense one too, and ``recompose`` brings the dense block back.

Source: Yang et al. 2025 (2503.02495) and its released code, which the formulas follow.
"""

from fractions import Fraction
from types import SimpleNamespace
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext, layer_context
from moestro.core.cost import Work, cost, cost_inside
from moestro.core.errors import ConfigError, ContextError
from moestro.core.layer import MoELayer
from moestro.core.plan import MethodUse
from moestro.core.router import LinearRouter, choose_topk
from moestro.core.routing import Routing, Scores
from moestro.core.site import Borrowed, Shared, Site
from moestro.methods.train._parts.assemble import losses_by_id
from moestro.methods.train._parts.capacity import within_capacity
from moestro.methods.train._parts.heads import Call, HeadBank, mask_of
from moestro.methods.train._parts.selection import warn_if_dead
from moestro.methods.train._parts.slices import SlicedBank, UnitBank
from moestro.models.families import family
from moestro.models.swap import state_of
from moestro.surgery.opened import form_at


ROTARY = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")  # positions turn halves of heads


class Config(BaseConfig):
    """Settings; which of them matter depends on the site.

    Attributes:
        num_slices: n of a feed-forward (4 when None). heads_per_expert: query heads of a slice of an attention.
        mode: who chooses. top_k: slices a token gets, half of them when None. keep_ratio: share of the positions that a
            slice takes under expert choice, top_k / n when None. sequence_length: L, fixed, of mode "sequence".
        combine: what a chosen slice weighs. position_ids: rotary positions of an attention, those of the sequence or
            places among the tokens of the head. losses: name -> loss method.
    """

    num_slices: int | None = Field(default=None, ge=1)
    heads_per_expert: int = Field(default=1, ge=1)
    mode: Literal["token_choice", "expert_choice", "sequence"] = "token_choice"
    top_k: int | None = Field(default=None, ge=1)
    keep_ratio: float | None = Field(default=None, gt=0, le=1)
    sequence_length: int | None = Field(default=None, ge=1)
    combine: Literal["straight_through", "sum", "gate"] = "straight_through"
    position_ids: Literal["original", "compacted"] = "original"
    losses: dict[str, MethodUse] = Field(
        default_factory=lambda: {"balance": MethodUse(method="train.balance_loss", config={"scope": "batch"})}
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_slices is not None:
            self.active(self.num_slices)
        if self.keep_ratio is not None and (self.mode != "expert_choice" or self.top_k is not None):
            told = f"mode={self.mode!r}, top_k={self.top_k}; it is for expert_choice, in place of top_k"
            raise ConfigError(f"keep_ratio={self.keep_ratio} with {told}")
        if (self.sequence_length is None) == (self.mode == "sequence"):
            raise ConfigError(f"mode={self.mode!r} with sequence_length={self.sequence_length}; they go together")
        return self

    def active(self, count: int) -> int:
        """Slices that a token gets of ``count``. Raises ConfigError: top_k is larger."""
        if self.top_k is not None and self.top_k > count:
            raise ConfigError(f"top_k={self.top_k} of {count} slices; give at most {count}")
        return self.top_k or max(1, count // 2)


def combined(gate_TK: Tensor, count: int | Tensor, combine: str) -> Tensor:
    """Weights of chosen slices, see the top, from gates (0 where not chosen) and numbers of chosen [T, 1]."""
    if combine == "sum":
        return torch.ones_like(gate_TK)
    weight_TK = count * gate_TK / gate_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(gate_TK.dtype).tiny)
    return weight_TK if combine == "gate" else 1.0 + (weight_TK - weight_TK.detach())


class SliceRouter(LinearRouter):
    """The gate. Parameters: ``weight`` [n, D], or [n, L D] in mode "sequence"; ``bias`` [n]."""

    def __init__(self, dim: int, num_slices: int, config: Config) -> None:
        active, width = config.active(num_slices), dim * (config.sequence_length or 1)
        super().__init__(width, num_slices, top_k=None if config.mode == "expert_choice" else active, bias=True)
        self.config, self.causal = config, config.mode == "token_choice"
        self.kept = Fraction(str(config.keep_ratio)) if config.keep_ratio else Fraction(active, num_slices)

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router. Raises ContextError: mode "sequence" and a forward of another length."""
        tokens, length = ctx.tokens, self.config.sequence_length
        if length is not None and tokens is not None:
            if not tokens.whole or tokens.width != length:
                raise ContextError(f"a sequence of {tokens.width} for sequence_length={length}; pad it")
            x_TD = x_TD.masked_fill(~tokens.valid_T[:, None], 0.0).view(tokens.num_rows, -1)
        logits_TC = self.logits(x_TD).repeat_interleave(length or 1, 0)
        probability_TC = logits_TC.softmax(-1)
        return Scores(logits_TC, probability_TC.detach(), probability_TC, probability_TC)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        count = self.num_experts
        if self.config.mode != "expert_choice":
            expert_TK = choose_topk(scores.select_TC, self.top_k or 1)
            weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
            return Routing.from_topk(expert_TK, weight_TK, num_experts=count, scores=scores, causal=self.causal)
        tokens: Any = ctx.tokens
        open_TE = tokens.valid_T[:, None] & (scores.select_TC > float("-inf"))
        token_N, expert_N = open_TE.nonzero(as_tuple=True)
        row_N, rows = tokens.row_T[token_N], tokens.num_rows
        places_N = self.places(torch.bincount(tokens.row_T[tokens.valid_T], minlength=rows))[row_N]
        kept_N = within_capacity(expert_N, row_N, rows, count, places_N, scores.select_TC[open_TE])
        chosen_TE = open_TE.masked_scatter(open_TE, kept_N)
        weight_TE = combined(scores.gate_TC * chosen_TE, chosen_TE.sum(-1, keepdim=True), self.config.combine)
        return Routing.from_mask(chosen_TE, weight_TE, num_experts=count, scores=scores, causal=False)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """See Router."""
        return combined(gate_TK, gate_TK.shape[-1], self.config.combine)

    def places(self, length: Any) -> Any:
        """Positions that a slice takes of ``length``, a number or a tensor of them: ceil(keep_ratio length)."""
        return -(-length * self.kept.numerator // self.kept.denominator)

    def real_per_token(self, length: int) -> float | None:
        """See Router; for sequences without padding."""
        return self.top_k or self.places(length) * self.num_experts / length

    def flops_per_token(self, work: Work) -> float:
        """The gate of a sequence runs once for all its tokens."""
        return cost_inside(self, work) / (self.config.sequence_length or 1)


class UnionLayer(MoELayer):
    """A dense block in slices: keeps the block's parts under their names and adds ``router``."""

    bank: SlicedBank

    def __init__(self, dense: nn.Module, router: SliceRouter, bank: SlicedBank, site: Site, losses: Any) -> None:
        super().__init__(router, bank, site=site.path, losses=losses)
        for name, part in dense.named_children():
            self.add_module(name, part)
        self.dense, self.compacted = Borrowed(dense), router.config.position_ids == "compacted"

    def run_experts(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """See MoELayer."""
        return self.bank.with_bias(super().run_experts(x_TD, routing))

    def flops_per_token(self, work: Work) -> float:
        """The rows that slices compute, and the gate."""
        return self.bank.flops(work.rows_of(self.site, self.router), work.length) + cost(self.router, work)


class UnionAttention(UnionLayer):
    """An attention in slices; called, and answering, as the Transformers attention it replaces, without its weights."""

    bank: HeadBank

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_embeddings: Any = None,
        past_key_values: Any = None, **more: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """(output [B, S, D], None). Raises ContextError: a mask other than those of "sdpa" and "eager"."""
        mask = mask_of(self.site, attention_mask)
        with layer_context(hidden_states, self.training) as ctx:
            x_TD = hidden_states.flatten(0, 1)
            ctx.keep(self.site, "input", x_TD)
            routing = self.route(x_TD, ctx).real()
            call = Call(self.site, mask, past_key_values, position_embeddings, self._angles_at(ctx, x_TD))
            y_TD = self.bank.with_bias(self.bank(x_TD, routing, call))
            ctx.keep(self.site, "output", y_TD)
        y, output = y_TD.view_as(hidden_states), cast(Any, self._modules.get("output"))  # BERT's has residual and norm
        return (y if output is None else output.LayerNorm(output.dropout(y) + hidden_states)), None

    def _angles_at(self, ctx: RoutingContext, x_TD: Tensor) -> Any:
        """Angles of any positions, from the stack's rotary embedding; None with the positions of the sequence."""
        rotary = cast(Any, ctx.module).rotary_emb if self.compacted else None
        return rotary and (lambda at_X: tuple(a[0].view(*at_X.shape, -1) for a in rotary(x_TD, at_X.reshape(1, -1))))


def recompose(module: nn.Module) -> nn.Module:
    """The dense block that a union was cut from, or a model with all its unions exchanged, in place, for theirs."""
    if isinstance(module, UnionLayer):
        return module.dense.module.train(module.training)
    for path, part in list(module.named_modules()):
        if isinstance(part, UnionLayer):
            module.set_submodule(path, recompose(part))
    state_of(module).swaps = [entry for entry in state_of(module).swaps if entry.method != "train.uoe"]
    return module


def is_causal(site: Site) -> bool:
    """Whether what stands at a site must read no later tokens; of a module that is no Transformers', what it says."""
    if site.family is None:
        return bool(getattr(site.module, "is_causal", False))
    return "encoder" not in site.path.split(".") or bool(getattr(site.model_config, "is_decoder", False))


def linears(path: str, dense: nn.Module, **names: str | None) -> dict[str, nn.Linear]:
    """Linear layers of a block by projection. Raises ConfigError: one of them is not there."""
    parts: dict[str, Any] = dict(dense.named_modules())
    for name in names.values():
        if name is not None and not isinstance(parts.get(name), nn.Linear):
            raise ConfigError(f"{path}: a {type(dense).__name__} has no linear layer {name!r} to slice")
    return {name: parts[place] for name, place in names.items() if place is not None}


def unit_bank(site: Site, config: Config) -> tuple[nn.Module, SlicedBank]:
    """A dense feed-forward and its slices; a new one, Llama's, where a plain module tells nothing."""
    dense, form = site.module, form_at(site)
    gate, up, down = "gate_proj" if hasattr(dense, "gate_proj") else None, "up_proj", "down_proj"
    width = getattr(site.model_config, "intermediate_size", None)
    if site.family is not None:
        spec = family(site.family).ffn
        gate, up, down = spec.gate, spec.up, spec.down
        if spec.split:
            raise ConfigError(f"{site.path}: {site.family} keeps half of it at another site; slice its attention")
    elif width is not None and not hasattr(dense, "up_proj"):
        from transformers.models.llama.modeling_llama import LlamaMLP

        sizes = SimpleNamespace(hidden_size=site.dim, intermediate_size=width, hidden_act="silu", mlp_bias=False)
        dense, gate = LlamaMLP(sizes), "gate_proj"
    activation: Any = form.activation if form else getattr(dense, "activation", "silu")
    parts = linears(site.path, dense, gate=gate, up=up, down=down)
    return dense, UnitBank(config.num_slices or 4, parts, activation, getattr(dense, "dropout", None))


def head_bank(site: Site, config: Config) -> HeadBank:
    """The slices of a dense attention."""
    bert, rotary = site.family == "bert", site.family in ROTARY
    if not (bert or rotary or site.family is None):
        raise ConfigError(f"{site.path}: {site.family}'s attention is not sliced; bert's and {', '.join(ROTARY)}'s are")
    if config.position_ids == "compacted" and not rotary:
        raise ConfigError(f"{site.path}: position_ids='compacted' needs rotary positions, here are none; leave it out")
    paths = ("self.query", "self.key", "self.value", "output.dense") if bert else [f"{name}_proj" for name in "qkvo"]
    parts = linears(site.path, site.module, **dict(zip(("query", "key", "value", "output"), paths, strict=True)))
    there: Any = site.module.get_submodule("self" if bert else "")
    width = there.attention_head_size if bert else there.head_dim
    dropout = there.dropout.p if bert else getattr(there, "attention_dropout", 0.0)
    norms = {name: part for name in ("query", "key") if (part := getattr(there, f"{name[0]}_norm", None)) is not None}
    scaling, layer = getattr(there, "scaling", width**-0.5), getattr(there, "layer_idx", None) or 0
    return HeadBank(config.heads_per_expert, parts, width, scaling, is_causal(site), dropout, layer, norms)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The slices of what stands at a site. Raises ConfigError: no such slices, or later tokens in a causal model."""
    if site.kind not in ("mlp", "attention"):
        raise ConfigError(f"{site.path}: a site of kind {site.kind} is no sum of slices; use mlp or attention")
    if config.mode != "token_choice" and is_causal(site):
        raise ConfigError(f"{site.path}: mode={config.mode!r} reads later tokens; a causal model needs token_choice")
    attention = site.kind == "attention"
    dense, bank = (site.module, head_bank(site, config)) if attention else unit_bank(site, config)
    if config.num_slices not in (None, bank.num_experts):
        told = f"num_slices={config.num_slices}, but heads_per_expert={config.heads_per_expert}"
        raise ConfigError(f"{site.path}: {told} makes {bank.num_experts}; give one of them")
    if config.mode != "expert_choice" and config.combine != "sum":
        warn_if_dead(config.active(bank.num_experts), True, "train.uoe")
    router, losses = SliceRouter(site.dim, bank.num_experts, config), losses_by_id(config.losses, site, shared)
    return (UnionAttention if attention else UnionLayer)(dense, router, bank, site, losses)


CARD = MethodCard(
    title="Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer",
    year=2025,
    arxiv="2503.02495",
    paper="uoe",
    summary="A dense feed-forward or attention cut into slices that sum to it, each used by some tokens.",
    taxonomy="experts/network/attention",
    deviations=(
        "by default each token chooses by itself, a straight-through weight teaches the gate, a loss balances the load",
        "output biases once a token, not once a slice; rotary positions of the sequence unless 'compacted'",
        "an expert-choice slice takes positions by its full probabilities, not by those that top-k left",
        "heads take the same share of positions as units; the released ones as many as the fullest head",
    ),
)
