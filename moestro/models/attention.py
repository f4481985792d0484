"""The parts of a dense attention that a method may take apart: four projections, norms, heads, how positions turn."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moestro.core.errors import ConfigError
from moestro.core.site import Site


ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "cohere", "mixtral", "qwen2_moe", "qwen3_moe")
"""Families whose attention is q_proj, k_proj, v_proj, o_proj, rotary positions, and norms of heads at most."""

PROJECTIONS = ("query", "key", "value", "output")

Turn = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Queries and keys [B, H, S, head_dim], cosine and sine [B, S, head_dim] -> the two turned."""


@dataclass(frozen=True, kw_only=True)
class AttentionParts:
    """What a dense attention is made of.

    Attributes:
        names: projection -> path of its linear layer in the module. linears: the layers. norms: of "query" and "key"
            heads, by projection, with their path. head_dim: width of a head. scaling: factor on the scores.
            causal: a query sees no later key. dropout: of the attention weights. layer: index in the cache.
        turn: rotary positions, None without. window: how many keys a query sees at most, None for all; kernels that
            are given no mask need it.
    """

    names: dict[str, str]
    linears: dict[str, nn.Linear]
    head_dim: int
    scaling: float
    causal: bool
    dropout: float
    layer: int
    norms: dict[str, nn.Module] = field(default_factory=dict)
    turn: Turn | None = None
    window: int | None = None

    def tensors(self) -> dict[str, str]:
        """Path in the module of every weight and bias of the projections, by ``query``, ``query_bias``, ..."""
        found = {}
        for projection, path in self.names.items():
            found[projection] = f"{path}.weight"
            if self.linears[projection].bias is not None:
                found[f"{projection}_bias"] = f"{path}.bias"
        return found


def attention_parts(site: Site) -> AttentionParts:
    """The parts of the attention at a site of a Transformers model.

    Raises:
        ConfigError: a family whose attention is built otherwise, or something else stands there.
    """
    bert = site.family == "bert"
    if not bert and site.family not in ROTARY:
        raise ConfigError(f"{site.path}: {site.family}'s attention has other parts; known: bert, {', '.join(ROTARY)}")
    there: Any = site.module.get_submodule("self") if bert and hasattr(site.module, "self") else site.module
    paths = ("self.query", "self.key", "self.value", "output.dense") if bert else [f"{name}_proj" for name in "qkvo"]
    names = dict(zip(PROJECTIONS, paths, strict=True))
    modules: dict[str, Any] = dict(site.module.named_modules())
    for path in paths:
        if not isinstance(modules.get(path), nn.Linear):
            raise ConfigError(f"{site.path}: a {type(site.module).__name__} has no linear layer {path!r}")
    width = there.attention_head_size if bert else there.head_dim
    dropout = there.dropout.p if bert else getattr(there, "attention_dropout", 0.0)
    norms = {name: part for name in ("query", "key") if (part := getattr(there, f"{name[0]}_norm", None)) is not None}
    return AttentionParts(
        names=names,
        linears={name: modules[path] for name, path in names.items()},
        head_dim=width,
        scaling=getattr(there, "scaling", width**-0.5),
        causal=bool(getattr(there, "is_causal", not bert)),
        dropout=float(dropout),
        layer=getattr(there, "layer_idx", None) or 0,
        norms=norms,
        turn=None if bert else sys.modules[type(there).__module__].apply_rotary_pos_emb,
        window=getattr(there, "sliding_window", getattr(site.model_config, "sliding_window", None)),
    )
