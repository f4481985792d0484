"""A mixture whose expert matrices are packed: what stands at a site after quantisation.

    y = sum over chosen of w_i FFN_i(x),   FFN_i from matrices of small codes q in groups with a scale s:  W = s (q - z)

Only the bank is exchanged. Router, shared branch, projections, losses and the way of combining stay those of the
mixture at the site, whose form (width, activation, gate, biases) the packed experts take over. Matrices of one layer
may have different formats. The settings say how every tensor is shaped, so a saved model is reopened without float
experts ever being in memory. Plans about bits put it there; by itself it holds zeros until tensors are read into it.

Source: weight-only quantisation of experts in groups along the input, as in FineQuant (2308.09723, section 3); the
bytes are those of docs/formats.md.
"""

from pydantic import Field, field_validator
from torch import nn

from moestro.core.bank import StackedFFN
from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.layer import MoELayer
from moestro.core.packed import PackedFFN
from moestro.core.site import Shared, Site
from moestro.ops.formats import packing


class Config(BaseConfig):
    """Settings.

    Attributes:
        formats: for each projection (gate, up, down) the packing of all experts, or a list with one for each.
    """

    formats: dict[str, str | list[str]] = Field(examples=[{"gate": "int4:g8", "up": "int4:g8", "down": "int8"}])

    @field_validator("formats")
    @classmethod
    def _known(cls, formats: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        for name, spelled in formats.items():
            if name not in ("gate", "up", "down"):
                raise ValueError(f"no projection {name!r}; an expert has gate, up and down, or up and down")
            for word in dict.fromkeys([spelled] if isinstance(spelled, str) else spelled):
                packing(word)
        return formats


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The mixture at the site with packed experts.

    Raises:
        ConfigError: no mixture of equal float experts stands there (packed ones are not packed again), or packings that
            do not fit their shape.
    """
    there = site.module
    if isinstance(there, MoELayer) and isinstance(there.bank, PackedFFN):
        raise ConfigError(f"{site.path}: the experts are packed already; quantise the float checkpoint they come from")
    if not isinstance(there, MoELayer) or not isinstance(there.bank, StackedFFN):
        what = type(there.bank if isinstance(there, MoELayer) else there).__name__
        raise ConfigError(f"{site.path}: a {what} stands there, not a mixture of equal experts")
    bank = there.bank
    packed = PackedFFN(bank.num_experts, bank.dim, bank.inner, config.formats, **bank.form)
    packed.take_biases(bank)
    return there.around(there.router, packed)


CARD = MethodCard(
    title="FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs",
    year=2023,
    arxiv="2308.09723",
    summary="A mixture whose expert matrices are packed in small integers, a format for each.",
    taxonomy="inference/model/compression/quantisation",
)
