"""A mixture layer from its parts: E equal experts, a router, losses, perhaps a shared branch.

    y = sum over chosen of w_i FFN_i(x)  (+ FFN_shared(x), or sigmoid(x w_s) FFN_shared(x) with ``shared_gate``)

This is what stands at a feed-forward site after a conversion, and what a recipe writes to train a mixture from scratch.
What the settings leave open is taken from the feed-forward, dense or mixture, that stands at the site; elsewhere it is
a gated SiLU without bias, as wide as the model's configuration says. With ``keep``
the new layer takes over all that surrounds the experts of the mixture there: its shared branch, projections, input
noise, losses and way of combining.

Source: Shazeer et al. 2017 (1701.06538, eq. 1); shared branch: 2401.06066 (eq. 9), gated: Qwen2-MoE (2407.10671).
"""

from typing import Any

from pydantic import Field, model_validator
from torch import nn

from moestro import ops
from moestro.core.bank import StackedFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.plan import MethodUse
from moestro.core.remap import RemapRouter
from moestro.core.router import Router
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.assemble import losses_by_id, router_by_id
from moestro.methods.train._parts.dense import DenseFFN
from moestro.models.swap import SharedExpert
from moestro.surgery.opened import Form, form_at


class Config(BaseConfig):
    """Settings; None means as in the feed-forward that stands at the site, see the top of the file.

    Attributes:
        num_experts: E. expert_size: I, inner width of an expert. activation, gated, bias: its form.
        router: a router method; its num_experts is filled in. losses: name -> loss method.
        shared: inner width of a branch that every token uses, 0 for none. shared_gate: under a sigmoid of its own.
        remap: for each of the router's experts the expert that it means; None means the same.
        keep: take over what surrounds the experts of the mixture at the site.
    """

    num_experts: int = Field(default=8, ge=1)
    expert_size: int | None = Field(default=None, ge=1)
    activation: ops.Activation | None = None
    gated: bool | None = None
    bias: bool | None = None
    router: MethodUse = MethodUse(method="train.softmax_topk", config={"top_k": 2})
    losses: dict[str, MethodUse] = Field(default_factory=dict)
    shared: int = Field(default=0, ge=0)
    shared_gate: bool = False
    remap: list[int] | None = None
    keep: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.shared_gate and not self.shared:
            raise ConfigError("shared_gate without a shared branch; give shared=<inner width>")
        if self.keep and (self.shared or self.losses):
            raise ConfigError("keep takes the shared branch and the losses from the site; leave shared and losses out")
        if self.remap is not None and sorted(set(self.remap)) != list(range(self.num_experts)):
            raise ConfigError(f"remap={self.remap} must use every expert from 0 to {self.num_experts - 1}")
        return self


def _form(site: Site, config: Config) -> dict[str, Any]:
    """Inner width, activation, gate and bias of an expert."""
    given = {
        "inner": config.expert_size,
        "activation": config.activation,
        "gated": config.gated,
        "bias": config.bias,
    }
    if None not in given.values():
        return given
    found = form_at(site)
    if found is None:
        width = config.expert_size or getattr(site.model_config, "intermediate_size", None)
        if width is None:
            raise ConfigError(f"{site.path}: {type(site.module).__name__} does not tell expert_size; give it")
        found = Form(width, "silu", True, False)
    there = {"inner": found.inner, "activation": found.activation, "gated": found.gated, "bias": found.bias}
    return {name: there[name] if value is None else value for name, value in given.items()}


def _router(site: Site, config: Config, shared: Shared) -> Router:
    count = config.num_experts if config.remap is None else len(config.remap)
    router = router_by_id(config.router, site, shared, num_experts=count)
    return router if config.remap is None else RemapRouter(router, config.remap)


def _around(site: Site, router: Router, bank: StackedFFN) -> MoELayer:
    """A layer that takes over what surrounds the experts of the mixture at the site."""
    there = site.module
    if not isinstance(there, MoELayer):
        raise ConfigError(f"{site.path}: keep=True, but a {type(there).__name__} stands there, not a mixture")
    return there.around(router, bank)


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The layer for a feed-forward site of width ``site.dim``.

    Raises:
        ConfigError: a site that calls for something else than hidden states in and out, settings that are open and that
            the site does not tell, or that contradict each other.
    """
    if site.kind not in ("mlp", "linear"):
        raise ConfigError(
            f"{site.path}: a mixture of feed-forwards cannot stand at a site of kind {site.kind}; use mlp"
        )
    form = _form(site, config)
    bank = StackedFFN(config.num_experts, site.dim, out=site.out, **form)
    router = _router(site, config, shared)
    if config.keep:
        return _around(site, router, bank)
    branch: nn.Module | None = None
    if config.shared:
        branch = DenseFFN(site.dim, config.shared, **{k: form[k] for k in ("activation", "gated", "bias")})
        if config.shared_gate:
            branch = SharedExpert(branch, nn.Linear(site.dim, 1, bias=False))
    losses = losses_by_id(config.losses, site, shared)
    return MoELayer(router, bank, site=site.path, shared=branch, losses=losses)


CARD = MethodCard(
    title="Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    year=2017,
    arxiv="1701.06538",
    summary="A mixture layer from its parts: experts, a router by id, losses, perhaps a shared branch.",
    taxonomy="experts/network/ffn",
)
