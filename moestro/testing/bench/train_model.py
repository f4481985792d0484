"""A small mixture in training, against its dense twin and the same model on Transformers' experts implementations.

All arms start from the same weights (the dense twin has its own FFN), see the same batches and use fused AdamW; each
step clears its gradients. The arms of one model compute the same loss, which is checked before anything is timed.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moestro import ops
from moestro.testing.bench.harness import Row, interleave, paired_ratio
from moestro.testing.bench.train_layer import PEERS, our_layer


@dataclass(frozen=True)
class Shape:
    """A Qwen3-MoE model and its batch."""

    layers: int = 6
    hidden: int = 256
    experts: int = 64
    inner: int = 128
    top_k: int = 8
    heads: int = 8
    vocabulary: int = 8192
    rows: int = 8
    length: int = 256

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, hidden {self.hidden}, {self.experts} experts of {self.inner}, top-{self.top_k}, "
            f"vocabulary {self.vocabulary}, batch {self.rows}x{self.length}, AdamW"
        )


def build(shape: Shape, implementation: str) -> Any:
    """The model of one arm: `dense`, `ours` (MoELayer), `interface` (our experts in the stock block), or a peer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.hidden // shape.heads,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    torch.manual_seed(0)
    if implementation == "dense":
        return Qwen3ForCausalLM(Qwen3Config(**common, intermediate_size=shape.inner * shape.top_k))
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **common,
            moe_intermediate_size=shape.inner,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=True,
        )
    )
    for layer in model.model.layers:
        nn.init.normal_(layer.mlp.gate.weight, std=shape.hidden**-0.5)  # an even load, as after balanced training
    if implementation == "ours":
        for layer in model.model.layers:
            layer.mlp = our_layer(layer.mlp)
    if implementation == "interface":
        import moestro.models.experts_interface  # noqa: F401 (registers "moestro")
    names = {"ours": "eager", "interface": "moestro"}
    model.set_experts_implementation(names.get(implementation, implementation))
    return model


class Trainer:
    """One arm: a model and its optimiser; calling it makes one step on the next batch."""

    def __init__(self, shape: Shape, implementation: str) -> None:
        self.model = build(shape, implementation).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.shape = shape
        self.steps = 0

    def loss(self) -> Tensor:
        """Of the next batch."""
        generator = torch.Generator().manual_seed(self.steps)
        ids = torch.randint(self.shape.vocabulary, (self.shape.rows, self.shape.length), generator=generator)
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def __call__(self) -> None:
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1


def check_same_loss(trainers: dict[str, Trainer]) -> None:
    """Every arm of the mixture computes one and the same loss, and ours runs on our path."""
    losses = {}
    for name, trainer in trainers.items():
        with ops.counting(ops.training_backend()) as calls, torch.no_grad():
            losses[name] = trainer.loss().item()
        expected = trainer.shape.layers if name in ("ours", "interface") else 0
        assert calls == expected, f"{name}: {calls}, not {expected}"
    mixtures = [loss for name, loss in losses.items() if name != "dense"]
    assert max(mixtures) - min(mixtures) < 1e-4, losses


def compare(shape: Shape, rounds: int) -> list[Row]:
    """Tokens per second of both our doors against every peer and the dense twin."""
    trainers = {name: Trainer(shape, name) for name in ("ours", "interface", "dense", *PEERS)}
    check_same_loss(trainers)
    arms: dict[str, Callable[[], object]] = dict(trainers)
    seconds = interleave(arms, rounds)
    tokens = shape.rows * shape.length
    speed = {name: tokens / statistics.median(taken) for name, taken in seconds.items()}
    rows = []
    for mine, label in (("ours", ""), ("interface", ", through Transformers' experts interface")):
        for peer in ("dense", *PEERS):
            ratio, spread = paired_ratio(seconds[peer], seconds[mine])
            rows.append(Row(f"{shape}{label}", "training", "tokens/s", speed[mine], peer, speed[peer], ratio, spread))
    return rows


def run(rounds: int) -> list[Row]:
    """The one shape of this benchmark."""
    return compare(Shape(), rounds)
