"""A router that reads token ids only: one small causal transformer that decides for every layer before any runs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.core.cache import cache_state
from moestro.core.context import RoutingContext
from moestro.core.cost import Work
from moestro.core.errors import ConfigError, ContextError
from moestro.core.router import exact_linear
from moestro.core.tokens import Tokens


KEYS, VALUES, VALID = "read_me.keys", "read_me.values", "read_me.valid"
BASE = 10000.0


def rotate(x_BHSE: Tensor, position_BS: Tensor) -> Tensor:
    """Rotary positions on the last axis (halves), float32."""
    half = x_BHSE.shape[-1] // 2
    rate = BASE ** (-torch.arange(half, device=x_BHSE.device, dtype=torch.float32) / half)
    angle = position_BS[:, None, :, None].float() * rate
    one, two = x_BHSE[..., :half], x_BHSE[..., half:]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


class PreGate(nn.Module):
    """Embedding, one pre-norm causal block (attention, SiLU MLP), a linear map to E logits; all in float32.

    Args:
        vocabulary: V. dim: R. heads: of the attention; R / heads is even.
    """

    def __init__(self, vocabulary: int, dim: int, heads: int, num_experts: int) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.embedding = nn.Embedding(vocabulary, dim)
        self.attention_norm, self.mlp_norm, self.last_norm = nn.RMSNorm(dim), nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, dim, bias=False)
        self.down = nn.Linear(dim, dim, bias=False)
        self.head = nn.Linear(dim, num_experts, bias=False)
        for part in (self.embedding, self.qkv, self.out, self.up, self.down, self.head):
            if not part.weight.is_meta:
                nn.init.normal_(part.weight, std=0.02)

    def forward(self, ids_BS: Tensor, valid_BS: Tensor | None = None, cache: dict[str, Tensor] | None = None) -> Tensor:
        """Logits [B, S, E] in float32; token t reads ids up to t only.

        Positions count the valid tokens before, so that padding shifts none.

        Args:
            ids_BS: int64. valid_BS: False for padding. cache: what earlier calls left there is read, then extended.

        Raises:
            ContextError: an id outside the vocabulary.
        """
        if ids_BS.numel() and not 0 <= int(ids_BS.min()) <= int(ids_BS.max()) < self.embedding.num_embeddings:
            raise ContextError(
                f"token ids {int(ids_BS.min())} to {int(ids_BS.max())}, the router knows 0 to "
                f"{self.embedding.num_embeddings - 1}; router and model must share the tokenizer"
            )
        valid_BS = torch.ones_like(ids_BS, dtype=torch.bool) if valid_BS is None else valid_BS
        before_BP = None if cache is None else cache.get(VALID)
        seen_B1 = 0 if before_BP is None else before_BP.sum(1, keepdim=True)
        position_BS = (valid_BS.cumsum(1) - 1).clamp(min=0) + seen_B1
        with torch.autocast(ids_BS.device.type, enabled=False):
            h_BSR = F.embedding(ids_BS, self.embedding.weight).float()
            h_BSR = h_BSR + self._attend(self._norm(self.attention_norm, h_BSR), position_BS, valid_BS, cache)
            up_BSR = exact_linear(self._norm(self.mlp_norm, h_BSR), self.up.weight)
            h_BSR = h_BSR + exact_linear(F.silu(up_BSR), self.down.weight)
            return exact_linear(self._norm(self.last_norm, h_BSR), self.head.weight)

    def _norm(self, norm: nn.RMSNorm, x_BSR: Tensor) -> Tensor:
        return F.rms_norm(x_BSR, (self.dim,), norm.weight.float(), 1e-6)

    def _attend(self, x_BSR: Tensor, position_BS: Tensor, valid_BS: Tensor, cache: dict[str, Tensor] | None) -> Tensor:
        rows, width = position_BS.shape
        q, k, v = (
            part.view(rows, width, self.heads, -1).transpose(1, 2)
            for part in exact_linear(x_BSR, self.qkv.weight).chunk(3, -1)
        )
        q, k = rotate(q, position_BS), rotate(k, position_BS)
        valid_BL = valid_BS
        if cache is not None:
            if KEYS in cache:
                k, v = torch.cat([cache[KEYS], k], 2), torch.cat([cache[VALUES], v], 2)
                valid_BL = torch.cat([cache[VALID], valid_BS], 1)
            cache |= {KEYS: k, VALUES: v, VALID: valid_BL}
        length = valid_BL.shape[1]
        place_L = torch.arange(length, device=q.device)
        own_S = place_L[length - width :, None]
        # Padding attends to itself: attention over nothing would be NaN, and nobody reads it.
        open_BSL = (place_L <= own_S) & valid_BL[:, None] | (place_L == own_S)
        score = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        mixed = score.masked_fill(~open_BSL[:, None], float("-inf")).softmax(-1) @ v
        return exact_linear(mixed.transpose(1, 2).reshape(rows, width, self.dim), self.out.weight)

    def flops_per_token(self, work: Work) -> float:
        """Two for each weight of a matrix, and the attention's two products over the whole sequence."""
        parts = (self.qkv, self.out, self.up, self.down, self.head)
        return 2.0 * sum(part.weight.numel() for part in parts) + 4.0 * work.length * self.dim


def logits_of_tokens(gate: PreGate, tokens: Tokens, ctx: RoutingContext, site: str) -> Tensor:
    """Logits [T, E] of a whole forward's tokens; what decode steps need goes on the Transformers cache.

    Raises:
        ContextError: no ids, some tokens only, or a cache that earlier forwards filled without this router.
    """
    if tokens.ids_T is None:
        raise ContextError(f"{site}: a pre-gating router reads token ids; call the model with input_ids")
    if not tokens.whole:
        raise ContextError(f"{site}: a pre-gating router decides for all tokens of a forward, here are some of them")
    shape = (tokens.num_rows, tokens.width)
    cache: dict[str, Tensor] | None = None
    if ctx.cache is not None:
        cache = cache_state(ctx.cache)
        held = cache[VALID].shape[1] if VALID in cache else 0
        if held < tokens.cached:
            raise ContextError(
                f"{site}: the cache holds {tokens.cached} positions, the router has seen {held} of them; give the "
                "first call a cache too (past_key_values=DynamicCache())"
            )
        if held > tokens.cached:  # the cache was cropped
            cache[VALID] = cache[VALID][:, : tokens.cached]
            for name in (KEYS, VALUES):
                cache[name] = cache[name][:, :, : tokens.cached]
    logits_BSE: Tensor = gate(tokens.ids_T.view(shape), tokens.valid_T.view(shape), cache)
    return logits_BSE.flatten(0, 1)


def check_heads(dim: int, heads: int) -> None:
    """Raise ConfigError unless each head has an even width."""
    if dim % heads or dim // heads % 2:
        raise ConfigError(f"router_dim={dim} over router_heads={heads}; give a multiple of {2 * heads}")
