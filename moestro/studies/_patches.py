"""scikit-learn's digits as sixteen patches, and a dense encoder of them in plain parts that a study can exchange."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moestro.core.cost import Work, cost_inside
from moestro.core.errors import ConfigError


PATCHES, PIXELS, CLASSES = 16, 4, 10


@dataclass(frozen=True)
class Digits:
    """Size of the encoder and of its run."""

    layers: int = 4
    dim: int = 64
    heads: int = 4
    inner: int = 256
    epochs: int = 28
    batch: int = 64
    lr: float = 3e-3
    train: int = 898


class Attention(nn.Module):
    """Dense bidirectional attention; answers as Transformers' do."""

    is_causal = False

    def __init__(self, dim: int, heads: int, head_dim: int, drop: float) -> None:
        super().__init__()
        self.head_dim, self.drop = head_dim, drop
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, heads * head_dim) for _ in range(3))
        self.o_proj = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[B, S, D] to [B, S, D]."""
        parts = (linear(x) for linear in (self.q_proj, self.k_proj, self.v_proj))
        heads = (part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        y = nn.functional.scaled_dot_product_attention(*heads)
        y = nn.functional.dropout(y.new_ones(*y.shape[:3], 1), self.drop, self.training) * y
        return self.o_proj(y.transpose(1, 2).flatten(2)), None

    def flops_per_token(self, work: Work) -> float:
        """Projections, and scores and sums over all positions."""
        return cost_inside(self, work) + 4 * self.q_proj.out_features * work.length


class FeedForward(nn.Module):
    """Dense, GELU."""

    activation = "gelu"

    def __init__(self, dim: int, inner: int, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.up_proj, self.down_proj = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        hidden = nn.functional.gelu(self.up_proj(x))
        return self.down_proj(nn.functional.dropout(hidden, self.drop, self.training))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm; ``drop`` is the share of heads and hidden units that a token is
    denied while training.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, inner: int, drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = Attention(dim, heads, head_dim, drop), FeedForward(dim, inner, drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        x = x + self.attention(self.norm(x))[0]
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nn.Module):
    """Patches of 2 x 2 pixels to the logits of ten digits."""

    def __init__(self, size: Digits, heads: int, inner: int, drop: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, size.dim)
        self.places = nn.Parameter(0.02 * torch.randn(PATCHES * size.dim))
        shape = (size.dim, heads, size.dim // size.heads, inner, drop)
        self.blocks = nn.ModuleList([Block(*shape) for _ in range(size.layers)])
        self.norm, self.head = nn.LayerNorm(size.dim), nn.Linear(size.dim, CLASSES)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """[B, 10] of patches [B, 16, 4]."""
        x = self.embed(inputs_embeds) + self.places.view(PATCHES, -1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """Patches [1797, 16, 4] and labels of scikit-learn's digits.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("this study needs scikit-learn; pip install 'moestro[studies]'") from None

    pixels, labels = load_digits(return_X_y=True)
    grid = torch.tensor(pixels, dtype=torch.float32).view(-1, 4, 2, 4, 2) / 8 - 1
    return grid.permute(0, 1, 3, 2, 4).reshape(-1, PATCHES, PIXELS), torch.tensor(labels)
