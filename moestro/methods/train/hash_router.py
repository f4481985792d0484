"""Hash routing: the token id decides, nothing is learned.

Slot j of a token with id v goes to expert (table_j[v]), where each table is a fixed random map of the vocabulary with
equally many ids per expert; slots of one token differ. Weights are 1 / k. Source: Roller et al. 2021 (2106.04426,
section 3.2, balanced and random hash).
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.bank import Bank
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import RoutingContext
from moestro.core.errors import ConfigError, ContextError
from moestro.core.router import Router, choose_topk
from moestro.core.routing import Routing, Scores
from moestro.core.site import Shared, Site


class Config(BaseConfig):
    """Settings. vocabulary: number of token ids. seed: of the table; layers with different seeds hash differently."""

    num_experts: int = Field(default=8, ge=1)
    top_k: int = Field(default=1, ge=1)
    vocabulary: int | None = Field(default=None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} but num_experts={self.num_experts}")
        return self


def hash_table(vocabulary: int, num_experts: int, top_k: int, seed: int) -> Tensor:
    """Experts of each token id, int64 [V, K], all different within a row; each column is balanced over experts."""
    generator = torch.Generator().manual_seed(seed)
    first_V = torch.randperm(vocabulary, generator=generator) % num_experts
    step_K = torch.randperm(num_experts - 1, generator=generator)[: top_k - 1] + 1 if top_k > 1 else torch.empty(0)
    shift_K = torch.cat([torch.zeros(1, dtype=torch.int64), step_K.long()])
    return (first_V[:, None] + shift_K) % num_experts


class HashRouter(Router):
    """The router. The table is a buffer and is saved, so that a model keeps its map whatever the library's version."""

    choice_ids = ("table_VK",)
    table_VK: Tensor

    def __init__(self, vocabulary: int, config: Config) -> None:
        super().__init__(config.num_experts, top_k=config.top_k)
        self.config = config
        self.register_buffer("table_VK", hash_table(vocabulary, config.num_experts, config.top_k, config.seed))

    def score(self, x_TD: Tensor, bank: Bank, ctx: RoutingContext) -> Scores:
        """One for the table's experts, 0 for the others, minus a little by slot so that the order of slots stays."""
        ids_T = None if ctx.tokens is None else ctx.tokens.ids_T
        if ids_T is None:
            raise ContextError("a hash router needs token ids; call the model with input_ids, not with embeddings")
        expert_TK = self.table_VK[ids_T]
        rank_K = torch.arange(expert_TK.shape[1], device=expert_TK.device, dtype=torch.float32)
        value_TK = (1.0 - rank_K / self.num_experts).expand(expert_TK.shape)
        select_TC = torch.zeros(len(ids_T), self.num_experts, device=x_TD.device).scatter_(1, expert_TK, value_TK)
        chosen_TC = (select_TC > 0).float()
        return Scores(chosen_TC, select_TC, chosen_TC, chosen_TC / self.config.top_k)

    def choose(self, scores: Scores, ctx: RoutingContext) -> Routing:
        """See Router."""
        expert_TK = choose_topk(scores.select_TC, self.config.top_k)
        weight_TK = self.weigh(scores.gate_TC.gather(1, expert_TK))
        return Routing.from_topk(expert_TK, weight_TK, num_experts=self.num_experts, scores=scores)

    def weigh(self, gate_TK: Tensor) -> Tensor:
        """Equal weights."""
        return torch.full_like(gate_TK, 1.0 / gate_TK.shape[-1])


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The router; the vocabulary comes from the model's configuration when the settings do not give it.

    Raises:
        ConfigError: neither gives it.
    """
    vocabulary = config.vocabulary or getattr(site.model_config, "vocab_size", None)
    if vocabulary is None:
        raise ConfigError(
            f"{site.path}: a hash router needs vocabulary=..., the model's configuration has no vocab_size"
        )
    return HashRouter(int(vocabulary), config)


CARD = MethodCard(
    title="Hash Layers For Large Sparse Models",
    year=2021,
    arxiv="2106.04426",
    summary="The token id decides by a fixed balanced table; nothing is learned.",
    taxonomy="gating/sparse/non-trainable/hash",
    deviations=("several slots use shifts of one table instead of independent tables, so that they never collide",),
)
