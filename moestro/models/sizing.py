"""Parameters, active parameters, operations and bytes of a model, from shapes alone.

What is counted
    A *matrix weight* takes part in one multiplication and one addition for every row that reaches it; biases and norms
    are no matrix weights. Embedding tables are matrices too, but are looked up and cost nothing; one that is tied to
    the output matrix is counted once as parameters and costs a product at the head.

Operations of a forward for one token that attends to ``c`` positions (its own among them), per layer

    2 * A  +  sum over attentions of 2 * heads * (qk_dim + v_dim) * min(c, window)

    with ``A`` the matrix weights a token meets: all of attention, router, shared and dense parts, and ``top_k / E`` of
    the routed experts; plus ``2 V D`` at the head. A product of [m, k] and [k, n] is 2 m k n operations, as
    ``torch.utils.flop_counter`` counts. Softmax, norms, activations and rotary embeddings are left out: they are a few
    operations for every hundred or more of a product.

    Latent attention (DeepSeek) keeps the latent in the cache and expands the whole cache anew at every decoded token,
    as Transformers does: a decoded token costs ``2 * kv_b_proj * c`` there instead of ``2 * kv_b_proj``.

A training step costs three forwards (a product of the forward is two in the backward), four with activation
checkpointing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args


Part = Literal["embedding", "attention", "router", "experts", "shared", "dense", "norm", "head", "other"]
PARTS: tuple[Part, ...] = get_args(Part)

SCALE_GROUP = 64
"""Weights that share one 16-bit scale when a matrix is stored in 8 bits or less."""


@dataclass(frozen=True, slots=True)
class Amount:
    """Some tensors: numbers in them, how many of those are matrix weights, and bytes as they are stored."""

    parameters: int = 0
    matrix: int = 0
    nbytes: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.parameters + other.parameters, self.matrix + other.matrix, self.nbytes + other.nbytes)

    def bytes_at(self, bits: int | None) -> int:
        """Bytes when matrices are stored in ``bits`` (None: as they are).

        At 16 and 32 bits everything has that width. At 8 and 4 bits every group of 64 matrix weights has a 16-bit scale
        and all else is float32.
        """
        if bits is None:
            return self.nbytes
        if bits >= 16:
            return self.parameters * bits // 8
        scales = -(-self.matrix // SCALE_GROUP) * 2
        return self.matrix * bits // 8 + scales + 4 * (self.parameters - self.matrix)

    def share(self, part: float) -> "Amount":
        """A fraction of it, each number rounded to the nearest whole."""
        return Amount(round(self.parameters * part), round(self.matrix * part), round(self.nbytes * part))


def total(amounts: Iterable[Amount]) -> Amount:
    """The sum."""
    return sum(amounts, start=Amount())


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The geometry of one attention.

    Attributes:
        heads, qk_dim, v_dim: query heads and widths of a head's keys and values.
        window: positions a query sees at most, its own among them; None for all.
        cached: numbers kept for each position while decoding; 0 where nothing is cached (encoders).
        causal: a query sees no later position.
        expand: matrix weights that run over all cached positions at every decoded token (latent attention).
        cross: keys and values come from another stack's positions. source_matrix: weights of their projections, which
            run once a source position and not for decoded tokens.
    """

    heads: int
    qk_dim: int
    v_dim: int
    window: int | None = None
    cached: int = 0
    causal: bool = True
    expand: int = 0
    cross: bool = False
    source_matrix: int = 0

    def visible(self, context: int) -> int:
        """Positions seen by a query that has ``context`` of them, its own among them."""
        return context if self.window is None else min(context, self.window)

    def pairs(self, tokens: int, *, masked: bool) -> int:
        """Query-key pairs of a forward of ``tokens`` positions; with ``masked`` those the mask hides too."""
        if masked or not self.causal:
            return tokens * tokens
        seen = self.visible(tokens)
        return seen * (seen + 1) // 2 + (tokens - seen) * seen

    @property
    def flops_per_pair(self) -> int:
        """Operations for one query and one position: the score and the weighted sum."""
        return 2 * self.heads * (self.qk_dim + self.v_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSize:
    """The routed experts of one mixture layer.

    Attributes:
        path: where the layer stands. num_experts: E. top_k: experts a token runs through on average; null choices do
            not count. experts: all of them together.
    """

    path: str
    num_experts: int
    top_k: float
    experts: Amount

    @property
    def slab(self) -> Amount:
        """One expert; the mean where experts differ."""
        return self.experts.share(1 / self.num_experts)

    @property
    def active(self) -> Amount:
        """What one token runs through."""
        return self.experts.share(self.top_k / self.num_experts)

    def distinct(self, tokens: int) -> float:
        """Expected experts that at least one of ``tokens`` chooses, E (1 - (1 - k/E)^T), choices being uniform."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSize:
    """One block of a stack. ``parts`` holds everything but the routed experts, which are in ``mixtures``."""

    stack: str
    index: int
    parts: Mapping[Part, Amount] = field(default_factory=dict)
    mixtures: tuple[MixtureSize, ...] = ()
    attentions: tuple[Attention, ...] = ()

    @property
    def resident(self) -> Amount:
        """What every token needs."""
        return total(self.parts.values())

    @property
    def experts(self) -> Amount:
        """All routed experts."""
        return total(mixture.experts for mixture in self.mixtures)

    @property
    def active(self) -> Amount:
        """What one token meets."""
        return self.resident + total(mixture.active for mixture in self.mixtures)

    def flops(self, context: int) -> int:
        """Operations for one token of a forward that attends to ``context`` positions."""
        pairs = sum(a.flops_per_pair * a.visible(context) for a in self.attentions)
        return 2 * self.active.matrix + pairs

    def decode_flops(self, context: int) -> int:
        """Operations for one decoded token, the cache holding the ``context - 1`` positions before it."""
        expand = sum(2 * a.expand * (a.visible(context) - 1) for a in self.attentions)
        source = sum(2 * a.source_matrix for a in self.attentions)
        return self.flops(context) + expand - source

    def cache_numbers(self, context: int) -> int:
        """Numbers in the layer's cache after ``context`` positions (cross-attention: of the source)."""
        return sum(a.cached * a.visible(context) for a in self.attentions)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """A whole model.

    Attributes:
        name: what it was read from. family: model type. layers: of all stacks, in the order in which they run.
        outside: embeddings, final norms, heads and the rest, by part.
        head_matrix: matrix weights of the head that every token meets, a tied embedding included.
        once: matrix weights that run once a sequence (poolers).
        itemsize: bytes of one number of a cache when weights keep their stored types.
        width: D. vocabulary: V; both 0 where there is no embedding. positions: the longest context it was made for.
    """

    name: str
    family: str
    layers: tuple[LayerSize, ...]
    outside: Mapping[Part, Amount]
    head_matrix: int = 0
    once: int = 0
    itemsize: int = 4
    width: int = 0
    vocabulary: int = 0
    positions: int | None = None

    def parts(self) -> dict[Part, Amount]:
        """All tensors by part, each counted once; parts without any are left out."""
        found = dict.fromkeys(PARTS, Amount())
        for part, amount in self.outside.items():
            found[part] += amount
        for layer in self.layers:
            found["experts"] += layer.experts
            for part, amount in layer.parts.items():
                found[part] += amount
        return {part: amount for part, amount in found.items() if amount.parameters}

    @property
    def whole(self) -> Amount:
        """All tensors."""
        return total(self.parts().values())

    @property
    def resident(self) -> Amount:
        """All but the routed experts."""
        return total(self.outside.values()) + total(layer.resident for layer in self.layers)

    @property
    def mixtures(self) -> list[MixtureSize]:
        """All mixture layers."""
        return [mixture for layer in self.layers for mixture in layer.mixtures]

    @property
    def active_parameters(self) -> int:
        """Parameters on the path of one token: all but the experts it does not choose. Embeddings count in full."""
        return (self.resident + total(mixture.active for mixture in self.mixtures)).parameters

    @property
    def trunk(self) -> int:
        """Matrix weights outside blocks and heads that every token meets."""
        return sum(amount.matrix for part, amount in self.outside.items() if part not in ("embedding", "head", "norm"))

    @property
    def prompt(self) -> tuple[LayerSize, ...]:
        """The layers that read a prompt: the first stack's."""
        return tuple(layer for layer in self.layers if layer.stack == self.layers[0].stack)

    @property
    def decoder(self) -> tuple[LayerSize, ...]:
        """The layers that a decoded token runs through; empty for a model that only encodes."""
        return tuple(layer for layer in self.layers if any(a.cached for a in layer.attentions))

    def flops_per_token(self, context: int = 1, *, head: bool = True) -> int:
        """Operations of a forward for one token that attends to ``context`` positions.

        In an encoder-decoder it is one token of the source and one of the target.
        """
        return sum(layer.flops(context) for layer in self.layers) + 2 * (self.trunk + self.head_matrix * head)

    def forward_flops(self, tokens: int, *, masked: bool = False, head: bool = True) -> int:
        """Operations of a forward over a sequence of ``tokens`` (source and target, where there are two).

        Args:
            tokens: length. masked: count the pairs that the mask hides, as kernels that compute the full square do.
            head: the head runs for every token; False when only the last one's logits are wanted.
        """
        pairs = sum(
            a.flops_per_pair * a.pairs(tokens, masked=masked) for layer in self.layers for a in layer.attentions
        )
        matrix = 2 * (sum(layer.active.matrix for layer in self.layers) + self.trunk) * tokens
        return matrix + pairs + 2 * self.head_matrix * (tokens if head else 1) + 2 * self.once

    def decode_flops(self, context: int) -> int:
        """Operations for one decoded token, the cache holding the ``context - 1`` positions before it."""
        return sum(layer.decode_flops(context) for layer in self.decoder) + 2 * (self.trunk + self.head_matrix)

    def train_flops_per_token(self, context: int, *, checkpointing: bool = False) -> int:
        """Operations of forward and backward for one token of a sequence of ``context`` tokens."""
        return (4 if checkpointing else 3) * (self.forward_flops(context) // context)

    def decode_weights(self) -> int:
        """Matrix weights that must be read to decode one token."""
        source = sum(a.source_matrix for layer in self.decoder for a in layer.attentions)
        return sum(layer.active.matrix for layer in self.decoder) - source + self.trunk + self.head_matrix

    def cache_bytes(self, context: int, itemsize: int | None = None) -> int:
        """Bytes of the cache after ``context`` positions of one sequence, ``itemsize`` bytes a number."""
        size = self.itemsize if itemsize is None else itemsize
        return size * sum(layer.cache_numbers(context) for layer in self.layers)

    def cache_bytes_per_position(self, itemsize: int | None = None) -> int:
        """Bytes that one more position takes while all windows still grow."""
        return self.cache_bytes(1, itemsize)


def training_bytes(size: ModelSize, *, trainable: int | None = None, itemsize: int = 4, states: int = 2) -> int:
    """Bytes of weights, gradients and optimiser states, activations left out.

    Args:
        size: the model. trainable: parameters that are trained; None means all.
        itemsize: bytes of a weight and of its gradient. states: float32 numbers the optimiser keeps for each (AdamW 2).
    """
    whole = size.whole.parameters
    trained = whole if trainable is None else trainable
    return whole * itemsize + trained * (itemsize + 4 * states)
