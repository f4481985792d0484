"""How large a model is and what a token costs, from shapes alone: works on the meta device."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from moestro.core.bank import Bank
from moestro.core.layer import MoELayer


ADAM_BYTES = 8  # two float32 moments
GRADIENT_BYTES = 4
MASTER_BYTES = 4


@dataclass(frozen=True)
class Size:
    """What a recipe asks of the machine.

    Attributes:
        parameters: all, shared ones once. active: those a token uses (chosen experts only). trainable: with gradient
            in some phase.
        weight_bytes, gradient_bytes, optimizer_bytes: in float32; activations are not in it.
        forward_flops: floating point operations of one token's forward, two per weight of every matrix it is multiplied
            with, plus attention over half of the sequence. train_flops: forward and backward (twice the forward), once
            more the forward with gradient checkpointing. experts_vary: some layers choose no fixed number of experts;
            all of them are counted as chosen.
    """

    parameters: int
    active: int
    trainable: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    forward_flops: int
    train_flops: int
    experts_vary: bool

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def size_of(model: nn.Module, sequence_length: int, *, gradient_checkpointing: bool = False) -> Size:
    """Count a model; no tensor is read.

    Args:
        sequence_length: tokens of a training sequence, for the attention's share.
    """
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    idle, flops = 0, 0
    inside: set[int] = set()
    for layer in layers:
        chosen = layer.router.top_k or layer.bank.num_experts
        share = min(1.0, chosen / layer.bank.num_experts)
        held = sum(p.numel() for p in layer.bank.parameters())
        idle += round(held * (1.0 - share))
        rows = [layer.bank.flops_per_row(expert) for expert in range(layer.bank.num_experts)]
        flops += round(chosen * sum(rows) / len(rows))
        flops += 2 * sum(p.numel() for p in layer.router.parameters() if p.ndim == 2)
        inside |= {id(module) for part in (layer.bank, layer.router) for module in part.modules()}
    for module in model.modules():
        if id(module) not in inside and not isinstance(module, Bank) and is_matrix(module):
            flops += 2 * module.weight.numel()  # type: ignore[operator]
    flops += attention_flops(model, sequence_length)
    return Size(
        parameters=parameters,
        active=parameters - idle,
        trainable=trainable,
        weight_bytes=parameters * MASTER_BYTES,
        gradient_bytes=trainable * GRADIENT_BYTES,
        optimizer_bytes=trainable * ADAM_BYTES,
        forward_flops=flops,
        train_flops=flops * (4 if gradient_checkpointing else 3),
        experts_vary=any(layer.router.top_k is None for layer in layers),
    )


def is_matrix(module: nn.Module) -> bool:
    """A module that multiplies each token by its weight: linear layers and Transformers' Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def attention_flops(model: nn.Module, sequence_length: int) -> int:
    """Scores and weighted sums of one token: 4 * (S / 2) * width of all heads, for every layer of the config.

    0 for models without a Transformers configuration.
    """
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not all(isinstance(value, int) for value in (heads, hidden, layers)):
        return 0
    assert isinstance(heads, int)
    assert isinstance(hidden, int)
    assert isinstance(layers, int)
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    return layers * 4 * (sequence_length // 2) * width
