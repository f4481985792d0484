"""A soft mixture of attention experts: every expert attends for every token, gates weigh what they say.

    g = softmax(u W_r^T)  [B, S, N],    y = sum_j g_j MHA_j(u),    MHA_j(u) = concat_i(head_ji(u)) W_o,j

with u [B, S, D] what the block hands to its attention, and g the gates of the *query's* token. It is computed as one
attention of N H heads: expert j's heads times g_j, side by side, times [W_o,1 ... W_o,N].

``kv="expert"``: expert j has W_q, W_k, W_v, W_o of its own; the cache holds N H_kv heads of keys and values a layer.
``kv="shared"``: W_q and W_o of its own, one W_k and W_v for all; the cache is that of one attention. With ``top_k``
all but the k highest gates are 0, for comparison; with ``gate_norm="topk_softmax"`` the others are divided by their
sum. All experts run either way: keys of every token are needed, and a soft gate leaves none out.

At an attention site of a Transformers model every expert begins as the attention there, so that the mixture is that
attention whatever the gates are; norms of heads stay one for all. Elsewhere it is a new causal attention without
positions, ``num_heads`` heads an expert.

Source: BAM (2408.08274, section 3 and figure 1); its router's input is taken to be the block's normalised input.
"""

from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.context import layer_context
from moestro.core.cost import Work
from moestro.core.errors import ConfigError
from moestro.core.router import exact_linear, topk_indices
from moestro.core.site import Shared, Site
from moestro.models.attention import PROJECTIONS, AttentionParts, attention_parts


class Config(BaseConfig):
    """Settings.

    Attributes:
        num_experts: N. kv: keys and values of each expert, or one for all. top_k: gates that stay, None for all.
        gate_norm: gates are those of the softmax over all experts, or divided by the sum of the kept ones.
        router_std: standard deviation of the router's first weights.
        num_heads, num_kv_heads: of an expert, where nothing at the site tells; as many as num_heads when None.
    """

    num_experts: int = Field(default=4, ge=1)
    kv: Literal["expert", "shared"] = "expert"
    top_k: int | None = Field(default=None, ge=1)
    gate_norm: Literal["full_softmax", "topk_softmax"] = "full_softmax"
    router_std: float = Field(default=0.02, ge=0)
    num_heads: int | None = Field(default=None, ge=1)
    num_kv_heads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.top_k is not None and self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} of {self.num_experts} attention experts; give at most that many")
        if self.num_kv_heads is not None and (self.num_heads is None or self.num_heads % self.num_kv_heads):
            raise ConfigError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        return self


def soft_gates(logits_XN: Tensor, top_k: int | None = None, normalise: bool = False) -> Tensor:
    """Gates [..., N]: softmax, all but the ``top_k`` highest 0, what is left divided by its sum when ``normalise``."""
    gate_XN = logits_XN.softmax(-1)
    if top_k is None or top_k == logits_XN.shape[-1]:
        return gate_XN
    flat_TN = gate_XN.detach().flatten(0, -2)
    kept_TN = torch.zeros_like(flat_TN, dtype=torch.bool).scatter_(1, topk_indices(flat_TN, top_k), True)
    gate_XN = gate_XN * kept_TN.view_as(gate_XN)
    return gate_XN / gate_XN.sum(-1, keepdim=True) if normalise else gate_XN


def cache_bytes(num_experts: int, kv: str, kv_heads: int, head_dim: int, element: int) -> int:
    """Bytes of keys and values that a layer caches for one token."""
    return 2 * (num_experts if kv == "expert" else 1) * kv_heads * head_dim * element


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """softmax(q k^T scaling + mask) v as products: [B, S, H, head_dim] of heads [B, H, S, head_dim]; called as
    Transformers calls its kernels, for its "eager" and where no Transformers model is around.
    """
    key, value = (part.repeat_interleave(module.num_key_value_groups, 1) for part in (key, value))
    score = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        score = score.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else score + mask
    weight = score.float().softmax(-1).to(query.dtype)
    weight = nn.functional.dropout(weight, dropout, module.training)
    return (weight @ value).transpose(1, 2), None


class MixtureOfAttention(nn.Module):
    """N attentions under soft gates; called, and answering, as the attention it replaces.

    Parameters: ``query_proj`` [N, H head_dim, D], ``key_proj``, ``value_proj`` [N or 1, H_kv head_dim, D],
    ``output_proj`` [N, D, H head_dim], ``router`` [N, D], and where the attention has them biases ``query_bias``
    [N, H head_dim], ``key_bias``, ``value_bias`` [N or 1, H_kv head_dim], ``output_bias`` [N, D].
    """

    def __init__(self, parts: AttentionParts, config: Config, site: Site) -> None:
        super().__init__()
        self.config, self.site, self.plain = config, site.path, site.family is None
        self.head_dim, self.scaling, self.is_causal = parts.head_dim, parts.scaling, parts.causal
        self.dropout, self.layer_idx, self.turn = parts.dropout, parts.layer, parts.turn
        self.model_config, self.window = site.model_config, parts.window
        for name in PROJECTIONS:
            linear, own = parts.linears[name], config.kv == "expert" or name in ("query", "output")
            rows = config.num_experts if own else 1
            self.register_parameter(f"{name}_proj", _copies(linear.weight, rows))
            self.register_parameter(f"{name}_bias", None if linear.bias is None else _copies(linear.bias, rows))
        self.heads = parts.linears["query"].out_features // parts.head_dim
        self.kv_heads = parts.linears["key"].out_features // parts.head_dim
        experts = 1 if config.kv == "expert" else config.num_experts
        self.num_key_value_groups = experts * self.heads // self.kv_heads
        self.router = nn.Parameter(torch.empty(config.num_experts, site.dim))
        if not self.router.is_meta:
            nn.init.normal_(self.router, std=config.router_std)
        for name, norm in parts.norms.items():
            self.add_module(f"{name[0]}_norm", norm)
        after: Any = getattr(site.module, "output", None)
        if isinstance(after, nn.Module):  # BERT's block adds and normalises inside its attention
            kept: dict[str, nn.Module] = {"LayerNorm": after.LayerNorm, "dropout": after.dropout}  # type: ignore[dict-item]
            self.output = nn.ModuleDict(kept)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_embeddings: Any = None,
        past_key_values: Any = None, **more: Any,
    ) -> Any:  # fmt: skip
        """(output [B, S, D], None), or the output alone where no Transformers model is around.

        What else the model says (``more``) goes to its attention kernel, as from the attention that stood here.
        """
        config = self.config
        logits_BSN = exact_linear(hidden_states, self.router)
        gate_BSN = soft_gates(logits_BSN, config.top_k, config.gate_norm == "topk_softmax").to(hidden_states.dtype)
        query, key, value = self._heads(hidden_states)
        if self.turn is not None:
            query, key = self.turn(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mask = self._own_mask(hidden_states) if self.plain else attention_mask
        out, _ = self._attend()(
            self, query, key, value, mask, scaling=self.scaling, dropout=self.dropout if self.training else 0.0,
            sliding_window=self.window, **more,
        )  # fmt: skip
        y = self._joined(out, gate_BSN)
        if hasattr(self, "output"):
            y = self.output["LayerNorm"](self.output["dropout"](y) + hidden_states)
        return y if self.plain else (y, None)

    def _heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, N H, S, head_dim], keys and values [B, N H_kv or H_kv, S, head_dim], norms applied."""
        found = []
        for name in ("query", "key", "value"):
            weight, bias = getattr(self, f"{name}_proj"), getattr(self, f"{name}_bias")
            flat = nn.functional.linear(x_BSD, weight.flatten(0, 1), None if bias is None else bias.flatten())
            heads = _split(flat, -1, (weight.shape[0], -1, self.head_dim))
            norm = getattr(self, f"{name[0]}_norm", None)
            heads = heads if norm is None else norm(heads)
            if name == "query" and self.config.kv == "shared":  # queries that read one key head stand together
                heads = _split(heads, 3, (self.kv_heads, -1)).transpose(2, 3)
            found.append(heads.flatten(2, -2).transpose(1, 2))
        return found[0], found[1], found[2]

    def _joined(self, out_BSXd: Tensor, gate_BSN: Tensor) -> Tensor:
        """Heads of all experts times their gates, through the output projections [B, S, D]."""
        count = self.config.num_experts
        if self.config.kv == "shared":
            out = _split(out_BSXd, 2, (self.kv_heads, count, -1)).transpose(2, 3).flatten(3)
        else:
            out = _split(out_BSXd, 2, (count, -1)).flatten(3)
        weight = cast(Tensor, self.output_proj).transpose(0, 1).flatten(1)
        y = nn.functional.linear((out * gate_BSN[..., None]).flatten(2), weight)
        bias: Tensor | None = cast(Any, self.output_bias)
        return y if bias is None else y + gate_BSN @ bias

    def _attend(self) -> Any:
        """What computes the attention: Transformers' kernel as the model is set, or plain products."""
        if self.plain:
            return plain_attention
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS.get_interface(self.model_config._attn_implementation, plain_attention)

    def _own_mask(self, x_BSD: Tensor) -> Tensor:
        """Which keys a query sees where no model says so: earlier real tokens, and itself."""
        with layer_context(x_BSD, self.training) as ctx:
            valid_T = None if ctx.tokens is None else ctx.tokens.valid_T
        length = x_BSD.shape[1]
        order_SS = torch.ones(length, length, dtype=torch.bool, device=x_BSD.device).tril()
        if valid_T is None:
            return order_SS[None, None]
        seen = order_SS & valid_T.view(-1, 1, length)
        return (seen | torch.eye(length, dtype=torch.bool, device=x_BSD.device))[:, None]

    def flops_per_token(self, work: Work) -> float:
        """Every projection and the router, and the pairs of all experts' heads: in a causal model those a token may
        see, where no kernel is chosen all that are computed.
        """
        weights = sum(p.numel() for name, p in self.named_parameters(recurse=False) if not name.endswith("_bias"))
        bias = 2 * self.output_bias.numel() if isinstance(self.output_bias, Tensor) else 0
        heads = self.config.num_experts * self.heads
        pairs = (work.length + 1) / 2 if self.is_causal and not self.plain else work.length
        return 2.0 * weights + bias + 4.0 * heads * self.head_dim * pairs

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"num_experts={self.config.num_experts}, kv={self.config.kv}, heads={self.heads}, kv_heads={self.kv_heads}"
        )


def _split(x: Tensor, axis: int, sizes: tuple[int, ...]) -> Tensor:
    """``x`` with one axis cut into several."""
    return x.unflatten(axis, sizes)  # type: ignore[no-untyped-call,no-any-return]


def _copies(tensor: Tensor, rows: int) -> nn.Parameter:
    """``rows`` copies one after the other [rows, ...]."""
    return nn.Parameter(tensor.detach().expand(rows, *tensor.shape).clone())


def _new_parts(site: Site, config: Config) -> AttentionParts:
    """A new attention where nothing at the site tells."""
    heads = config.num_heads or getattr(site.model_config, "num_attention_heads", None) or 4
    shared = config.num_kv_heads or heads
    if site.dim % heads:
        raise ConfigError(f"{site.path}: num_heads={heads} does not divide its width {site.dim}")
    width = site.dim // heads
    sizes = {"query": (site.dim, heads), "key": (site.dim, shared), "value": (site.dim, shared)}
    linears = {name: nn.Linear(dim, count * width, bias=False) for name, (dim, count) in sizes.items()}
    linears["output"] = nn.Linear(heads * width, site.out or site.dim, bias=False)
    return AttentionParts(
        names={name: name for name in linears}, linears=linears, head_dim=width, scaling=width**-0.5, causal=True,
        dropout=0.0, layer=site.layer or 0,
    )  # fmt: skip


def build(site: Site, config: Config, shared: Shared) -> nn.Module:
    """The mixture of attentions for a site.

    Raises:
        ConfigError: a site of a Transformers model that is no attention, or an attention of other parts; heads that do
            not divide the width.
    """
    if site.family is not None and site.kind != "attention":
        raise ConfigError(f"{site.path}: attention experts cannot stand at a site of kind {site.kind}; use attention")
    if site.family is not None and (config.num_heads is not None or config.num_kv_heads is not None):
        raise ConfigError(f"{site.path}: the attention there tells its heads; leave num_heads and num_kv_heads out")
    parts = _new_parts(site, config) if site.family is None else attention_parts(site)
    return MixtureOfAttention(parts, config, site)


CARD = MethodCard(
    title="BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
    year=2024,
    arxiv="2408.08274",
    paper="bam",
    summary="A soft mixture of whole attentions, with keys and values of each expert or one for all.",
    taxonomy="experts/network/attention",
    deviations=(
        "the router reads the block's normalised input; the paper does not say what it reads",
        "with top_k the gates of the others are 0 but all experts still run",
        "norms of query and key heads are one for all experts",
    ),
)
