"""Transformer blocks with a mixture for a feed-forward, to stand on top of an encoder."""

import torch
from torch import Tensor, nn

from moestro.core.context import layer_context
from moestro.core.cost import Work, cost_inside
from moestro.core.layer import MoELayer


@torch.compiler.disable  # type: ignore[untyped-decorator]
def valid_positions(hidden_BSD: Tensor, training: bool) -> Tensor:
    """Which positions of a stack's forward are tokens, bool [B, S]."""
    with layer_context(hidden_BSD, training) as ctx:
        return ctx.tokens_for(hidden_BSD).valid_T.view(hidden_BSD.shape[:2])


class SelfAttention(nn.Module):
    """Attention among the tokens of a sequence, both ways."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout, self.dim = heads, dropout, dim
        self.project = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BSD: Tensor, valid_BS: Tensor) -> Tensor:
        """[B, S, D] of [B, S, D]; in a sequence of padding alone nothing attends, and torch makes that 0."""
        query, key, value = self.project(x_BSD).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(2, 3)
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=valid_BS[:, None, None], dropout_p=self.dropout if self.training else 0.0
        )
        y_BSD: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y_BSD

    def flops_per_token(self, work: Work) -> float:
        """The matrices, and scores and weighted sums over all positions."""
        return cost_inside(self, work) + 4 * work.length * self.dim


class SwitchBlock(nn.Module):
    """A pre-LayerNorm transformer block with a switch feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float, mixture: MoELayer) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads, dropout)
        self.mixture = mixture
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BSD: Tensor, valid_BS: Tensor) -> Tensor:
        """[B, S, D] of [B, S, D]."""
        hidden_BSD = hidden_BSD + self.dropout(self.attention(self.attention_norm(hidden_BSD), valid_BS))
        y_BSD: Tensor = hidden_BSD + self.dropout(self.mixture(self.norm(hidden_BSD)))
        return y_BSD


class SwitchStack(nn.Module):
    """Equal blocks and a LayerNorm. Padding is known from the forward's context."""

    def __init__(self, blocks: list[SwitchBlock], dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """[B, S, D] of [B, S, D]."""
        valid_BS = valid_positions(hidden_BSD, self.training)
        for block in self.layers:
            hidden_BSD = block(hidden_BSD, valid_BS)
        y_BSD: Tensor = self.norm(hidden_BSD)
        return y_BSD
