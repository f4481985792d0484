"""Read-ME's router: a small causal transformer over token ids, decoupled from the model, decides for all layers.

    e_t = argmax over experts of G(x_<=t)        the same expert id in every layer, weight 1

G has an embedding [V, R], one causal layer (attention with rotary positions, SiLU MLP of width R) and a linear map
[E, R]. It lives once under the model; every mixture borrows it, and within a forward the first one computes what all
use. Since it reads ids only, ``route_ahead`` records the choices of all layers before the model runs. Its keys and
values cross decode steps on the Transformers cache; padding shifts no position.

The gate is 1, so no loss of the output reaches G. It is taught by the dense model (``objective``): for a token with
inner activations a [H] in layer l, W units an expert, rank r by |a| from 0, and M_i the expert's units without those
that all experts have,

    grade_h = (number of j = 1 .. 5 with r_h < j W / 5) / (3 W)
    o_i     = 10 sum over layers and h in M_i of grade_h
    loss    = 0.75 CE(logits, argmax o, label smoothing 0.5) - 0.25 sum_i softmax(o)_i log softmax(logits)_i

Source: Read-ME (2410.19123, section 3) and its released code, whose grades and loss these are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank, PooledFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import LossTerm, RoutingContext
from moestro.core.cost import Work
from moestro.core.errors import ConfigError
from moestro.core.forward import logits_of
from moestro.core.layer import mixture_layers
from moestro.core.router import Router, choose_topk
from moestro.core.routing import Routing, Scores
from moestro.core.session import current_session, session
from moestro.core.site import Borrowed, Shared, Site
from moestro.core.tokens import Tokens, tokens_of_call
from moestro.data.packing import IGNORE
from moestro.methods.train._parts.pregate import PreGate, check_heads, logits_of_tokens
from moestro.methods.train._parts.teachers import only
from moestro.models.sites import stacks
from moestro.observe.neurons import unit_activity


SLOT, PART = "read_me", "read_me_gate"
LEVELS, SHARPNESS, HARD_SHARE, SMOOTHING = 5, 10.0, 0.75, 0.5


class Config(BaseConfig):
    """Settings. router_dim: R. router_heads: of its attention. vocabulary: V, the model's when None."""

    num_experts: int = Field(default=4, ge=1)
    router_dim: int = Field(default=512, ge=2)
    router_heads: int = Field(default=4, ge=1)
    vocabulary: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        check_heads(self.router_dim, self.router_heads)
        return self


class PreGatingRouter(Router):
    """The router at one site. ``owner``: whether it stands where the shared gate was made, and counts its cost."""

    hard = True

    def __init__(self, site: str, gate: PreGate, num_experts: int, owner: bool) -> None:
        super().__init__(num_experts, top_k=1)
        self.site, self.owner = site, owner
        self.gate = Borrowed(gate)

    @torch.no_grad()
    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """See Router; what the hidden states hold is not looked at.

        Raises:
            ContextError: no token ids, some tokens only, or a cache that was filled without this router.
        """
        tokens = ctx.tokens_for(x_TD)
        found: tuple[Tensor, Tokens] | None = ctx.previous(self.site, SLOT)
        if found is None or found[1] is not tokens:
            gate = self.gate.module
            assert isinstance(gate, PreGate)
            found = logits_of_tokens(gate, tokens, ctx, self.site), tokens
            ctx.put(self.site, SLOT, found)
        logits_TE = found[0]
        return Scores(logits_TE, logits_TE, logits_TE.softmax(-1), torch.ones_like(logits_TE))

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        expert_TK = choose_topk(scores.select_TC, 1)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        return Routing.from_topk(expert_TK, weight_TK, num_experts=self.num_experts, scores=scores)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(gate_TK)

    def flops_per_token(self, work: Work) -> float:
        """The gate's, once a model."""
        return self.gate.module.flops_per_token(work) if self.owner else 0.0  # type: ignore[operator]


def gate_of(model: nn.Module) -> PreGate | None:
    """The model's gate, None where there is none."""
    return next((part for part in model.modules() if isinstance(part, PreGate)), None)


@torch.no_grad()
def start_embedding(model: Any) -> None:
    """Start the gate's embedding with the first R columns of the model's.

    Raises:
        ConfigError: no gate, or embeddings that are narrower or of another vocabulary.
    """
    gate, there_VD = gate_of(model), model.get_input_embeddings().weight
    if gate is None:
        raise ConfigError(f"{type(model).__name__} has no pre-gating router")
    if len(there_VD) != gate.embedding.num_embeddings or there_VD.shape[1] < gate.dim:
        raise ConfigError(f"embedding {list(there_VD.shape)} cannot start one of {list(gate.embedding.weight.shape)}")
    gate.embedding.weight.copy_(there_VD[:, : gate.dim])


@torch.no_grad()
def route_ahead(model: nn.Module, call: Mapping[str, Any]) -> dict[str, Routing]:
    """Every mixture's routing for a call that the model has not run; an open trace records them.

    Args:
        call: arguments of the model's forward, input_ids [B, S] among them.

    Raises:
        ConfigError: no ids, or a mixture whose router needs more than ids.
    """
    tokens = tokens_of_call(call)
    if tokens is None or tokens.ids_T is None:
        raise ConfigError("routing ahead needs input_ids of shape [B, S]")
    place = stacks(model)[0]
    ctx = RoutingContext(place.spec.name, current_session(), tokens, module=place.module)
    nothing_TD = torch.empty(tokens.count, 1, device=tokens.row_T.device)
    found = {}
    for site, layer in mixture_layers(model).items():
        if not isinstance(layer.router, PreGatingRouter):
            raise ConfigError(f"{site}: a {type(layer.router).__name__} cannot decide before the model runs")
        found[site] = layer.route(nothing_TD, ctx)
    ctx.close()
    return found


def graded(activity_TH: Tensor, width: int) -> Tensor:
    """Grades [T, H] of units by |activity|; ties go to the lower unit. A token's grades sum to about 1."""
    rank_TH = activity_TH.abs().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    edges = [width * level // LEVELS for level in range(1, LEVELS + 1)]
    return torch.stack([(rank_TH < edge).float() for edge in edges]).sum(0) / (3 * width)


def overlaps(activity: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """o [T, E], see the top of the file, from each layer's activations [T, H] and units of its experts [E, W]."""
    total_TE: Tensor | None = None
    for activity_TH, rows_EW in zip(activity, rows, strict=True):
        member_EH = torch.zeros(len(rows_EW), activity_TH.shape[1], device=activity_TH.device).scatter_(1, rows_EW, 1.0)
        own_EH = member_EH * (member_EH.sum(0) < len(rows_EW))
        layer_TE = SHARPNESS * graded(activity_TH, rows_EW.shape[1]) @ own_EH.T
        total_TE = layer_TE if total_TE is None else total_TE + layer_TE
    if total_TE is None:
        raise ConfigError("no layer to compare with; give at least one")
    return total_TE


def distillation_loss(logits_TE: Tensor, overlap_TE: Tensor) -> Tensor:
    """The loss at the top of the file, summed over tokens."""
    hard = F.cross_entropy(logits_TE, overlap_TE.argmax(1), label_smoothing=SMOOTHING, reduction="sum")
    soft = F.cross_entropy(logits_TE, overlap_TE.softmax(1), reduction="sum")
    return HARD_SHARE * hard + (1 - HARD_SHARE) * soft


def targets(model: nn.Module, teacher: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """o [T, E] of the tokens of a call, padding left out.

    Raises:
        ConfigError: the experts are copies, so that nothing says which units of the teacher they have.
    """
    rows: dict[int, Tensor] = {}
    for (site, layer), number in zip(mixture_layers(model).items(), _numbers(model), strict=True):
        if not isinstance(layer.bank, PooledFFN):
            raise ConfigError(f"{site}: copied experts hold no index lists; teach the router with storage=shared_pool")
        rows[number] = layer.bank.rows_EW
    activity = unit_activity(teacher, call, rows)
    return overlaps([activity[number] for number in rows], list(rows.values()))


def _numbers(model: nn.Module) -> list[int]:
    return [int(next(step for step in site.split(".") if step.isdecimal())) for site in mixture_layers(model)]


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router of a site around the gate that all sites share.

    Raises:
        ConfigError: no vocabulary, or a gate of other sizes stands in the model already.
    """
    vocabulary = config.vocabulary or getattr(site.model_config, "vocab_size", None)
    if vocabulary is None:
        raise ConfigError(f"{site.path}: give vocabulary=..., the model's configuration has no vocab_size")
    owner = PART not in shared.modules
    sizes = (int(vocabulary), config.router_dim, config.router_heads, config.num_experts)
    gate = shared(PART, lambda: PreGate(*sizes))
    assert isinstance(gate, PreGate)
    have = (gate.embedding.num_embeddings, gate.dim, gate.heads, gate.head.out_features)
    if have != sizes:
        raise ConfigError(f"{site.path}: the model's gate has (V, R, heads, E) = {have}, asked for are {sizes}")
    return PreGatingRouter(site.path, gate, config.num_experts, owner)


def objective(
    model: nn.Module, batch: dict[str, Tensor], teachers: Mapping[str, nn.Module], config: Config
) -> dict[str, LossTerm]:
    """{causal, read_me}: sums over target tokens; the first teaches experts and model, the second the gate alone.

    Args:
        batch: of the objective ``causal``. teachers: exactly one, the dense model. Without a gate ``read_me`` is 0.

    Raises:
        ConfigError: no teacher or several, or copied experts.
    """
    teacher, gate = only(teachers), gate_of(model)
    logits_BSV = logits_of(model, batch)
    labels_BS = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    live_BS = labels_BS != IGNORE
    causal = F.cross_entropy(logits_BSV[live_BS].float(), labels_BS[live_BS], reduction="sum")
    taught = causal.new_zeros(())
    if gate is not None:
        call: dict[str, Any] = {
            name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch
        }
        tokens = tokens_of_call(call)
        assert tokens is not None
        valid_BS = tokens.valid_T.view(live_BS.shape)
        with session(collect=False):
            overlap_TE = targets(model, teacher, call)
        picked_T = live_BS[valid_BS]
        logits_TE = gate(batch["input_ids"], valid_BS)[valid_BS]
        taught = distillation_loss(logits_TE[picked_T], overlap_TE[picked_T])
    return {"causal": LossTerm(causal, "token"), "read_me": LossTerm(taught, "token")}


CARD = MethodCard(
    title="Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
    year=2024,
    arxiv="2410.19123",
    paper="read-me",
    summary="One small transformer over token ids decides every layer's expert before the model runs.",
    taxonomy="gating/sparse/token-choice",
    deviations=(
        "attention logits are divided by the root of the head width; the released scripts divide by 1",
        "units are ranked by the magnitude of their activation; the released loss ranks signed values",
        "the overlaps' mean is not taken off: softmax and argmax do not see it",
    ),
)
