"""Experts as index lists on one feed-forward: a mixture that holds the dense weights once, however its experts overlap.

    y = sum over chosen of w_i down[:, R_i] act(gate[R_i] x, up[R_i] x)

with R_i the W inner units of expert i, a saved buffer [E, W]. A unit of several experts is one weight and one gradient.
``convert.read_me`` puts it in the place of dense feed-forwards and fills it.

Source: Read-ME (2410.19123), whose released code trains experts as masks on one feed-forward.
"""

from pydantic import Field, model_validator
from torch import nn

from moestro import ops
from moestro.core.bank import PooledFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.plan import MethodUse
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.assemble import router_by_id
from moestro.surgery.opened import Form, form_at


class Config(BaseConfig):
    """Settings.

    Attributes:
        num_experts: E. expert_size: W; half of the pool when None. pool_size, activation, gated, bias: of the pool; as
            the feed-forward at the site when None. router: a router method; its num_experts is filled in.
    """

    num_experts: int = Field(default=4, ge=1)
    expert_size: int | None = Field(default=None, ge=1)
    pool_size: int | None = Field(default=None, ge=1)
    activation: ops.Activation | None = None
    gated: bool | None = None
    bias: bool | None = None
    router: MethodUse = MethodUse(method="train.softmax_topk", config={"top_k": 1})

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.expert_size and self.pool_size and self.expert_size > self.pool_size:
            raise ConfigError(f"expert_size={self.expert_size} of pool_size={self.pool_size} units; give at most that")
        return self


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The layer for a feed-forward site.

    Raises:
        ConfigError: another kind of site, or one that does not tell what the settings leave open.
    """
    if site.kind not in ("mlp", "linear"):
        raise ConfigError(f"{site.path}: experts of a pool cannot stand at a site of kind {site.kind}; use mlp")
    found = form_at(site)
    if found is None:
        width = config.pool_size or getattr(site.model_config, "intermediate_size", None)
        if width is None:
            raise ConfigError(f"{site.path}: {type(site.module).__name__} does not tell pool_size; give it")
        found = Form(width, "silu", True, False)
    inner = config.pool_size or found.inner
    bank = PooledFFN(
        config.num_experts,
        site.dim,
        inner,
        config.expert_size or max(1, inner // 2),
        activation=config.activation or found.activation,  # type: ignore[arg-type]
        gated=found.gated if config.gated is None else config.gated,
        bias=found.bias if config.bias is None else config.bias,
        out=site.out,
    )
    router = router_by_id(config.router, site, shared, num_experts=config.num_experts)
    return MoELayer(router, bank, site=site.path)


CARD = MethodCard(
    title="Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
    year=2024,
    arxiv="2410.19123",
    paper="read-me",
    summary="A mixture whose experts are lists of units of one feed-forward that is held once.",
    taxonomy="experts/network/ffn",
)
