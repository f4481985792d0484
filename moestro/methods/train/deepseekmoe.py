"""DeepSeekMoE: cut every expert into m thinner ones, and let K_s of them serve every token.

A plain mixture of N experts of inner width d with k active becomes, at equal total and active parameters,

    expert width d / m,   routed experts m N - K_s,   active routed experts m k - K_s,   K_s shared experts

    y_t = sum over shared of FFN_j(x_t) + sum over chosen of g_i FFN_i(x_t),   g = softmax(x W^T), not renormalised.

The K_s shared experts are stored as one network of inner width K_s d / m, which computes the same sum.

Source: DeepSeekMoE (2401.06066, eq. 3 to 11).
"""

from pydantic import Field, model_validator
from torch import nn

from moestro import ops
from moestro.core.bank import StackedFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.plan import MethodUse
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.assemble import losses_by_id, router_by_id
from moestro.methods.train._parts.dense import DenseFFN


class Config(BaseConfig):
    """Settings, in terms of the coarse mixture that is refined.

    Attributes:
        num_experts: N. top_k: k. expert_size: inner width d of a coarse expert. segments: m. shared: K_s.
        routed: routed experts, where they are not m N - K_s: the paper's 16B model has 64 beside 2 shared, its 145B
            model 128 beside 4.
        router: a router method; its num_experts and top_k are derived. losses: name -> loss method.
    """

    num_experts: int = Field(default=16, ge=1)
    top_k: int = Field(default=2, ge=1)
    expert_size: int = Field(ge=1, examples=[32])
    segments: int = Field(default=4, ge=1)
    shared: int = Field(default=1, ge=0)
    routed: int | None = Field(default=None, ge=1)
    activation: ops.Activation = "silu"
    gated: bool = True
    router: MethodUse = MethodUse(method="train.softmax_topk", config={"renormalise": False})
    losses: dict[str, MethodUse] = Field(
        default_factory=lambda: {"balance": MethodUse(method="train.balance_loss", config={"scope": "sequence"})}
    )

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.expert_size % self.segments:
            raise ConfigError(f"segments={self.segments} does not divide expert_size={self.expert_size}")
        if self.shared >= self.segments * self.top_k:
            raise ConfigError(
                f"shared={self.shared} leaves no routed expert: segments * top_k is {self.segments * self.top_k}"
            )
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} but num_experts={self.num_experts}")
        if self.active_routed > self.num_routed:
            raise ConfigError(
                f"routed={self.routed}, but a token takes segments * top_k - shared = {self.active_routed} of them"
            )
        return self

    @property
    def thin_size(self) -> int:
        """Inner width of a thin expert, d / m."""
        return self.expert_size // self.segments

    @property
    def num_routed(self) -> int:
        """Routed experts, m N - K_s unless told otherwise."""
        return self.segments * self.num_experts - self.shared if self.routed is None else self.routed

    @property
    def active_routed(self) -> int:
        """Routed experts a token uses, m k - K_s."""
        return self.segments * self.top_k - self.shared


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The layer for a feed-forward site of width ``site.dim``."""
    router = router_by_id(config.router, site, shared, num_experts=config.num_routed, top_k=config.active_routed)
    losses = losses_by_id(config.losses, site, shared)
    bank = StackedFFN(config.num_routed, site.dim, config.thin_size, activation=config.activation, gated=config.gated)
    branch = None
    if config.shared:
        branch = DenseFFN(site.dim, config.shared * config.thin_size, activation=config.activation, gated=config.gated)
    return MoELayer(router, bank, site=site.path, shared=branch, losses=losses)


CARD = MethodCard(
    title="DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
    year=2024,
    arxiv="2401.06066",
    paper="deepseekmoe",
    summary="Fine-grained experts plus shared ones at equal total and active parameters.",
    taxonomy="experts/shared-expert",
)
