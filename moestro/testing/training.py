"""Small models, data and recipes to test training with."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moestro.core.bank import StackedFFN
from moestro.core.context import open_stack
from moestro.core.layer import MoELayer
from moestro.core.registry import method
from moestro.core.site import Shared, Site
from moestro.data.dataset import Dataset
from moestro.data.packing import pack
from moestro.training.recipe import Recipe


VOCAB = 13


class TinyMixture(nn.Module):
    """Embedding, one mixture layer, head: takes token ids, position ids ignored."""

    def __init__(
        self,
        experts: int = 4,
        dim: int = 8,
        *,
        router: str = "train.softmax_topk",
        router_config: dict[str, Any] | None = None,
        losses: dict[str, dict[str, Any]] | None = None,
        seed: int = 0,
        layers: int = 1,
        stack: bool = True,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(
            mixture(f"blocks.{number}", experts, dim, router, router_config or {}, losses or {})
            for number in range(layers)
        )
        self.head = nn.Linear(dim, VOCAB)
        if stack:
            open_stack(self, "model")

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [B, S, V] of token ids [B, S]."""
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def mixture(
    site: str, experts: int, dim: int, router: str, config: dict[str, Any], losses: dict[str, dict[str, Any]]
) -> MoELayer:
    """A mixture layer with a router and losses by method id; a loss is named by the last part of its id."""
    place = Site(path=site, kind="mlp", module=nn.Identity(), dim=dim)

    def build(name: str, values: dict[str, Any]) -> Any:
        used = method(name)
        return used.build(place, used.configure(values), Shared())

    return MoELayer(
        build(router, {"num_experts": experts, "top_k": 2, **config}),
        StackedFFN(experts, dim, 2 * dim),
        site=site,
        losses={name.rpartition(".")[2].removesuffix("_loss"): build(name, values) for name, values in losses.items()},
    )


def packed(rows: int = 24, length: int = 6, seed: int = 0) -> Dataset:
    """Random packed sequences of several short documents."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, VOCAB, size=rng.integers(2, 9)).tolist() for _ in range(rows * length // 4)]
    return Dataset({"data": pack(documents, length, 0)})


def recipe(**values: Any) -> Recipe:
    """A recipe for ``TinyMixture``; the model and data parts are placeholders, the trainer is given both."""
    base: dict[str, Any] = {
        "model": {"config": {"model_type": "llama"}},
        "data": {"source": "none", "sequence_length": 6},
        "steps": 4,
        "batch_size": 8,
        "optimizer": {"lr": 0.01},
        "precision": "float32",
    }
    return Recipe.parse({**base, **values})
