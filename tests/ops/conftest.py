"""Random experts and routings for the expert-compute tests."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from moestro.ops import FFNWeights, fused_ffn


@dataclass
class Case:
    """One call of `fused_ffn`."""

    x: Tensor
    token: Tensor
    expert: Tensor
    weight: Tensor | None
    weights: FFNWeights
    activation: str = "silu"

    def run(self, backend: str) -> Tensor:
        return fused_ffn(
            self.x,
            self.token,
            self.expert,
            self.weight,
            len(self.x),
            self.weights,
            self.activation,
            backend=backend,
        )

    def inputs(self) -> dict[str, Tensor]:
        w = self.weights
        named = {"x": self.x, "weight": self.weight, "up": w.up_EJD, "down": w.down_EOI}
        named |= {"up_bias": w.up_bias_EJ, "down_bias": w.down_bias_EO}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def fresh(self) -> "Case":
        """The same numbers in new leaves that require gradients as the old ones did."""

        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().clone().requires_grad_(tensor.requires_grad)

        w = self.weights
        weights = FFNWeights(leaf(w.up_EJD), leaf(w.down_EOI), w.gated, leaf(w.up_bias_EJ), leaf(w.down_bias_EO))
        return replace(self, x=leaf(self.x), weight=leaf(self.weight), weights=weights)

    def gradients(self, backend: str) -> dict[str, Tensor | None]:
        """Output and gradients of a fixed random linear functional of it."""
        case = self.fresh()
        y = case.run(backend)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y.dtype)
        if y.requires_grad:
            y.backward(direction)
        return {"y": y.detach()} | {name: tensor.grad for name, tensor in case.inputs().items()}


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """A factory of random calls; routing is "topk", "ragged", "one_expert", "none" or "some_empty"."""

    def make(
        tokens: int = 12,
        experts: int = 5,
        k: int = 2,
        dim: int = 8,
        inner: int = 4,
        out: int | None = None,
        *,
        routing: str = "topk",
        gated: bool = True,
        bias: bool = False,
        weighted: bool = True,
        activation: str = "silu",
        dtype: torch.dtype = torch.float64,
        grad: bool = True,
        seed: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

        token, expert = _route(routing, tokens, experts, k, generator)
        rows = 2 * inner if gated else inner
        weights = FFNWeights(
            randn(experts, rows, dim),
            randn(experts, out or dim, inner),
            gated,
            randn(experts, rows) if bias else None,
            randn(experts, out or dim) if bias else None,
        )
        return Case(randn(tokens, dim), token, expert, randn(len(token)) if weighted else None, weights, activation)

    return make


def _route(kind: str, tokens: int, experts: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    scores = torch.rand(tokens, experts, generator=generator)
    if kind == "none":
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    if kind == "one_expert":
        return torch.arange(tokens), torch.full((tokens,), experts - 1)
    if kind == "some_empty":
        scores[:, ::2] = -1
        k = 1
    if kind == "ragged":  # 0 .. experts assignments a token, in random order
        token, expert = torch.nonzero(scores > 0.5, as_tuple=True)
        shuffle = torch.randperm(len(token), generator=generator)
        return token[shuffle], expert[shuffle]
    return torch.arange(tokens).repeat_interleave(k), scores.topk(k, dim=1).indices.flatten()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch with two threads, so that experts really run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
