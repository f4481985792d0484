"""Query heads of an attention as experts; each attends among the tokens that were routed to it.

A group of query heads takes along the key and value heads that it reads; see ``slices`` for how the weights are cut.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moestro import ops
from moestro.core.cache import cache_state
from moestro.core.context import current_context
from moestro.core.errors import ConfigError, ContextError
from moestro.core.routing import Routing
from moestro.core.tokens import tokens_of_shape
from moestro.methods.train._parts.assignments import dense_weights
from moestro.methods.train._parts.slices import SlicedBank


Angles = tuple[Tensor, Tensor]  # cosine and sine of rotary positions, [..., head_dim] each
HIDES = -1e4  # what an additive mask has at most where it hides; float16 holds it


@dataclass(frozen=True)
class Call:
    """What an attention is told beside its input.

    Attributes:
        site: names its state in the cache. mask: bool [B, S, L], True where a query sees a key; None leaves it to
            the order. cache: the Transformers cache.
        angles: of the S positions, None without rotary positions. at: positions -> angles; given, positions are places
            among the tokens of the head.
    """

    site: str = ""
    mask: Tensor | None = None
    cache: Any = None
    angles: Angles | None = None
    at: Callable[[Tensor], Angles] | None = None


def compact(mask_XL: Tensor) -> tuple[Tensor, Tensor]:
    """Where the mask holds, ascending, as indices [..., n]; and which of these entries are no filling."""
    count_X = mask_XL.sum(-1)
    order_XL = (~mask_XL).to(torch.uint8).argsort(dim=-1, stable=True)
    width = int(count_X.max())
    return order_XL[..., :width], torch.arange(width, device=mask_XL.device) < count_X[..., None]


def rotate(x_XHd: Tensor, angles: Angles) -> Tensor:
    """Rotary positions on heads [..., H, head_dim], the halves of a head against each other."""
    cos, sin = (part.unsqueeze(-2).to(x_XHd.dtype) for part in angles)
    left, right = x_XHd.chunk(2, -1)
    return x_XHd * cos + torch.cat([-right, left], -1) * sin


def visible(at_EBQ: Tensor, from_EBK: Tensor, past: int, mask_BSL: Tensor | None, causal: bool) -> Tensor:
    """Which keys a query may see [E, B, Q, K]: by the mask of the call and its own, else by order."""
    query_EBQ1, key_EB1K = at_EBQ[..., None], from_EBK[..., None, :]
    own_EBQK = key_EB1K == query_EBQ1 + past
    if mask_BSL is None:
        return key_EB1K <= query_EBQ1 + past if causal else torch.ones_like(own_EBQK)
    row_B11 = torch.arange(at_EBQ.shape[1], device=at_EBQ.device)[:, None, None]
    return mask_BSL.expand(at_EBQ.shape[1], -1, -1)[row_B11, query_EBQ1, key_EB1K] | own_EBQK


def mask_of(site: str, mask: object) -> Tensor | None:
    """The mask of a call as ``Call`` takes it, from that of "sdpa" or "eager": [B, 1, S, L], boolean or additive.

    Raises:
        ContextError: another mask, or one with biases, between 0 and ``HIDES``.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1] != 1:
        raise ContextError(f"{site}: a mask [B, 1, S, L] is needed; load with attn_implementation 'sdpa'")
    mask_BSL = mask[:, 0]
    if not mask.dtype.is_floating_point:
        return mask_BSL.bool()
    bias_X = mask_BSL[(mask_BSL != 0) & ~(mask_BSL <= HIDES)]
    if len(bias_X):
        told = f"the mask adds {float(bias_X[0]):.4g} to a score, slices know only 0 and hiding, {HIDES:g} and less"
        raise ContextError(f"{site}: {told}; leave this attention dense")
    return mask_BSL == 0


class HeadBank(SlicedBank):
    """E groups of query heads; each attends among the tokens routed to it.

    Key and value heads that several groups read are computed once, for the tokens of any of them.

    Args:
        linears: query, key, value, output. head_dim: width of a head. scaling: factor on the scores. causal: a query
            sees no later key. dropout: of the attention weights while training. layer: index in the cache.
        norms: of "query" and "key" before the rotation, over head_dim.

    Raises:
        ConfigError: the heads do not divide into groups, or a group would cut through the readers of a key head.
    """

    def __init__(
        self, heads_per_expert: int, linears: Mapping[str, nn.Linear], head_dim: int, scaling: float, causal: bool,
        dropout: float, layer: int, norms: Mapping[str, nn.Module],
    ) -> None:  # fmt: skip
        heads, shared = (linears[name].out_features // head_dim for name in ("query", "key"))
        readers = heads // shared
        if heads % heads_per_expert or (heads_per_expert % readers and readers % heads_per_expert):
            raise ConfigError(
                f"heads_per_expert={heads_per_expert} does not cut {heads} heads evenly, {readers} of which read a key "
                f"head; it must divide {heads} and divide {readers} or be a multiple of it"
            )
        units = min(heads // heads_per_expert, shared)  # groups of key heads
        super().__init__(heads // heads_per_expert, linears, {"key": units, "value": units})
        self.units, self.width, self.unit_width, self.head_dim = units, heads_per_expert, shared // units, head_dim
        self.scaling, self.causal, self.drop, self.layer, self.norms = scaling, causal, dropout, layer, dict(norms)

    def forward(self, x_TD: Tensor, routing: Routing, call: Call | None = None) -> Tensor:
        """Weighted sum of the heads' outputs [T, D] without the output bias; padding is left out. Raises ContextError:
        some tokens of the forward are missing, or the cache is another's or dropped positions.
        """
        call, ctx = call or Call(), current_context()
        tokens = tokens_of_shape(x_TD[None]) if ctx is None or ctx.tokens is None else ctx.tokens
        if not tokens.whole:
            told = f"{tokens.count} of {tokens.num_rows * tokens.width} tokens come here, heads need whole sequences"
            raise ContextError(f"{call.site}: {told}; keep sliced attention out of blocks that tokens skip")
        shape = (self.num_experts, tokens.num_rows, tokens.width)
        chosen_TE = torch.zeros(len(x_TD), self.num_experts, dtype=torch.bool, device=x_TD.device)
        chosen_TE[routing.token_N, routing.expert_N] = True
        chosen_EBS = (chosen_TE & tokens.valid_T[:, None]).T.reshape(shape)
        if call.cache is None and not chosen_EBS.any():
            return x_TD.new_zeros(len(x_TD), self.linears["output"].out_features)
        held_EBL, past, key, value = self._remember(chosen_EBS, *self._keys(x_TD, chosen_EBS, call), call)
        at_EBQ, asks_EBQ = compact(chosen_EBS)
        expert_N, row_N, slot_N = asks_EBQ.nonzero(as_tuple=True)
        token_N = row_N * tokens.width + at_EBQ[asks_EBQ]
        segments = ops.sort_rows(expert_N, self.num_experts)
        query_NHd = self._heads("query", x_TD[token_N], segments)
        if call.at is not None:
            query_NHd = rotate(query_NHd, call.at(held_EBL[..., :past].sum(-1)[expert_N, row_N] + slot_N))
        elif call.angles is not None:
            query_NHd = rotate(query_NHd, _picked(call.angles, shape[1:], token_N))
        out_NHd = self._attend(query_NHd, at_EBQ, asks_EBQ, held_EBL, past, key, value, call)
        out_NO = self.project("output", out_NHd.flatten(1), segments)
        return ops.scatter_rows(out_NO, token_N, dense_weights(routing)[token_N, expert_N], len(x_TD))

    def _heads(self, name: str, rows_ND: Tensor, segments: ops.Segments) -> Tensor:
        """Heads [N, H, head_dim] of sorted rows, normalised where the attention does so."""
        heads_NHd = self.project(name, rows_ND, segments).view(len(rows_ND), -1, self.head_dim)
        return self.norms.get(name, nn.Identity())(heads_NHd)  # type: ignore[no-any-return]

    def _keys(self, x_TD: Tensor, chosen_EBS: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Keys and values [U, B, S, H, head_dim], 0 where no expert of the unit reads them."""
        read_UBS = chosen_EBS.view(self.units, -1, *chosen_EBS.shape[1:]).any(1)
        unit_N, row_N, column_N = read_UBS.nonzero(as_tuple=True)
        token_N = row_N * read_UBS.shape[2] + column_N
        segments, rows_ND = ops.sort_rows(unit_N, self.units), x_TD[token_N]
        key_NHd, value_NHd = (self._heads(name, rows_ND, segments) for name in ("key", "value"))
        if call.angles is not None and call.at is None:
            key_NHd = rotate(key_NHd, _picked(call.angles, read_UBS.shape[1:], token_N))
        empty = key_NHd.new_zeros(*read_UBS.shape, *key_NHd.shape[1:])
        return empty.index_put((read_UBS,), key_NHd), empty.index_put((read_UBS,), value_NHd)

    def _remember(
        self, chosen_EBS: Tensor, key_UBSHd: Tensor, value_UBSHd: Tensor, call: Call
    ) -> tuple[Tensor, int, Tensor, Tensor]:
        """Positions that a head holds [E, B, L], how many were cached, keys and values over L. The cache has room for
        every position; which of them a head holds is state of its own.
        """
        if call.cache is None:
            return chosen_EBS, 0, key_UBSHd, value_UBSHd
        name, past = f"{call.site}.held", int(call.cache.get_seq_length(self.layer))
        state, held_BEL = cache_state(call.cache), chosen_EBS.transpose(0, 1)
        if past:
            if name not in state:
                raise ContextError(f"{call.site}: the cache holds {past} positions of another model; start a new one")
            held_BEL = torch.cat([state[name][..., :past], held_BEL], -1)
        state[name] = held_BEL
        flat = (part.permute(1, 0, 3, 2, 4).flatten(1, 2) for part in (key_UBSHd, value_UBSHd))
        key, value = (part.unflatten(1, (self.units, -1)) for part in call.cache.update(*flat, self.layer))
        missing = key.shape[3] - held_BEL.shape[-1]  # a cache of fixed size is longer, one with a window shorter
        if missing < 0:
            raise ContextError(f"{call.site}: the cache dropped {-missing} positions; use one without a window")
        held_EBL = nn.functional.pad(held_BEL, (0, missing)).transpose(0, 1)
        return held_EBL, past, key.permute(1, 0, 3, 2, 4), value.permute(1, 0, 3, 2, 4)

    def _attend(
        self, query_NHd: Tensor, at_EBQ: Tensor, asks_EBQ: Tensor, held_EBL: Tensor, past: int, key_UBLHd: Tensor,
        value_UBLHd: Tensor, call: Call,
    ) -> Tensor:  # fmt: skip
        """Outputs of the heads [N, H, head_dim]."""
        from_EBK, there_EBK = compact(held_EBL)
        unit_E = torch.arange(self.num_experts, device=at_EBQ.device) * self.units // self.num_experts
        row_B1 = torch.arange(at_EBQ.shape[1], device=at_EBQ.device)[:, None]
        index = (unit_E[:, None, None], row_B1, from_EBK)
        key_EBKHd, value_EBKHd = key_UBLHd[index], value_UBLHd[index]
        if call.at is not None:
            key_EBKHd = rotate(key_EBKHd, call.at(torch.arange(from_EBK.shape[2], device=at_EBQ.device)))
        query_EBQHd = query_NHd.new_zeros(*at_EBQ.shape, *query_NHd.shape[1:]).index_put((asks_EBQ,), query_NHd)
        query, key, value = (part.flatten(0, 1).transpose(1, 2) for part in (query_EBQHd, key_EBKHd, value_EBKHd))
        key, value = (part.repeat_interleave(self.width // self.unit_width, 1) for part in (key, value))
        seen_EBQK = visible(at_EBQ, from_EBK, past, call.mask, self.causal) & there_EBK[..., None, :]
        seen_EBQK = seen_EBQK | ~asks_EBQ[..., None]  # filling must not attend to nothing
        mask, drop = seen_EBQK.flatten(0, 1)[:, None], self.drop if self.training else 0.0
        out = nn.functional.scaled_dot_product_attention(query, key, value, mask, drop, scale=self.scaling)
        return out.transpose(1, 2)[asks_EBQ.flatten(0, 1)]

    def flops(self, rows_E: Sequence[float], length: int) -> float:
        """See SlicedBank; pairs of a head's own tokens. Slices that read one key head are taken to choose independently
        of each other.
        """
        share_E = torch.tensor(rows_E, dtype=torch.double)
        held_E = share_E * length
        pairs = float((held_E * (held_E + 1) / 2 if self.causal else held_E.square()).sum()) / length
        read = float((1 - (1 - share_E.clamp(max=1)).view(self.units, -1).prod(1)).sum())
        query, key, value, output = (2 * self.weight(0, name).numel() for name in self.projections)
        return sum(rows_E) * (query + output) + read * (key + value) + 4 * self.width * self.head_dim * pairs


def _picked(angles: Angles, shape: tuple[int, ...], token_N: Tensor) -> Angles:
    """Angles [B or 1, S, head_dim] of some of the B * S tokens."""
    cos, sin = (part.expand(*shape, -1).flatten(0, 1)[token_N] for part in angles)
    return cos, sin
