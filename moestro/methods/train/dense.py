"""A dense feed-forward of any width at a feed-forward site: what a mixture is compared with.

    y = act(x W_g^T) * (x W_u^T) W_d^T        gated;  x [T, D], W_g and W_u [I, D], W_d [D, I]
    y = act(x W_u^T) W_d^T                    otherwise

The weights begin as those of an expert of ``train.moe`` do, so that a mixture and its dense baseline differ in the
mixture alone. What the settings leave open is taken from the feed-forward at the site.

Source: Shazeer 2020 (2002.05202, eq. 5 and 6).
"""

from typing import Any

from pydantic import Field
from torch import nn

from moestro import ops
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.site import Shared, Site
from moestro.methods.train._parts.dense import DenseFFN
from moestro.surgery.opened import Form, form_at


class Config(BaseConfig):
    """Settings; None means as in the feed-forward, dense or an expert of a mixture, that stands at the site.

    Attributes:
        size: I, the inner width. activation, gated, bias: the form; a gated SiLU without bias where nothing tells.
    """

    size: int | None = Field(default=None, ge=1)
    activation: ops.Activation | None = None
    gated: bool | None = None
    bias: bool | None = None


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The feed-forward for a site of width ``site.dim``: [..., D] to [..., D].

    Raises:
        ConfigError: another kind of site, or a size that neither settings nor site tell.
    """
    if site.kind != "mlp":
        raise ConfigError(f"{site.path}: a feed-forward cannot stand at a site of kind {site.kind}; use mlp")
    there = form_at(site)
    size = config.size or (getattr(site.model_config, "intermediate_size", None) if there is None else there.inner)
    if size is None:
        raise ConfigError(f"{site.path}: {type(site.module).__name__} does not tell size; give it")
    form = there or Form(size, "silu", True, False)
    given = {"activation": config.activation, "gated": config.gated, "bias": config.bias}
    settings: dict[str, Any] = {k: getattr(form, k) if value is None else value for k, value in given.items()}
    return DenseFFN(site.dim, size, **settings)


CARD = MethodCard(
    title="GLU Variants Improve Transformer",
    year=2020,
    arxiv="2002.05202",
    summary="A dense feed-forward of any width, to compare mixtures with at equal cost.",
    taxonomy="experts/network/ffn",
    deviations=("any activation of a family's feed-forward, and biases where it has them",),
)
