"""How large a model is and what a token costs, from shapes alone: works on the meta device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from moestro.core.cost import Work, cost, over_experts
from moestro.core.errors import FamilyError
from moestro.core.layer import mixture_layers
from moestro.models.families import family
from moestro.models.sizing import Attention
from moestro.models.sizing_build import attentions


ADAM_BYTES = 8  # two float32 moments
GRADIENT_BYTES = 4
MASTER_BYTES = 4


@dataclass(frozen=True)
class Size:
    """What a recipe asks of the machine.

    Attributes:
        parameters: all, shared ones once. active: those a token uses (chosen experts only). trainable: with gradient
            in some phase.
        weight_bytes, gradient_bytes, optimizer_bytes: in float32. buffer_bytes: of what is kept beside the weights,
            such as tables and running means. Activations are in none of them.
        forward_flops: floating point operations of one token's forward while training, see ``moestro.core.cost``, with
            attention over the positions that a token may see, on average over the sequence. train_flops: forward and
            backward (twice the forward), once more the forward with gradient checkpointing.
        experts_vary: data decide how many experts of some layers compute for a token, and no measured number was given;
            as many are counted as an even load gives, all where the router has no top-k.
    """

    parameters: int
    active: int
    trainable: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    buffer_bytes: int
    forward_flops: int
    train_flops: int
    experts_vary: bool

    def json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def size_of(
    model: nn.Module,
    sequence_length: int,
    *,
    gradient_checkpointing: bool = False,
    rows: Mapping[str, Sequence[float]] | None = None,
) -> Size:
    """Count a model; no tensor is read.

    Args:
        sequence_length: tokens of a training sequence, for the attention's share.
        rows: site -> assignments a token that each real expert computes, as ``core.cost.RowCounter`` measures them on a
            batch. With it the operations are exactly those of the batch, whatever varies by token.
    """
    work = Work(sequence_length, rows=rows or {}, by_length=attention_costs(model))
    flops = round(cost(model, work))
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Size(
        parameters=parameters,
        active=parameters - idle_parameters(model, work),
        trainable=trainable,
        weight_bytes=parameters * MASTER_BYTES,
        gradient_bytes=trainable * GRADIENT_BYTES,
        optimizer_bytes=trainable * ADAM_BYTES,
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        forward_flops=flops,
        train_flops=flops * (4 if gradient_checkpointing else 3),
        experts_vary=bool(work.guessed),
    )


def idle_parameters(model: nn.Module, work: Work) -> int:
    """Parameters of experts that a token does not use, on average."""
    idle = 0
    for site, layer in mixture_layers(model).items():
        held = sum(p.numel() for p in layer.bank.parameters())
        needed = [layer.bank.nbytes(expert) for expert in range(layer.bank.num_experts)]
        rows_E = work.rows_of(site, layer.router)
        used = over_experts([min(1.0, rows) for rows in rows_E], needed) / max(
            1.0, over_experts([1.0] * len(rows_E), needed)
        )
        idle += round(held * (1.0 - used))
    return idle


def attention_costs(model: nn.Module) -> dict[nn.Module, Callable[[int], float]]:
    """Every attention of a Transformers model of a known family -> operations a token of its scores and weighted sums,
    by the length of the sequence: those pairs of positions that it may see, though kernels may compute more.
    """
    config = getattr(model, "config", None)
    try:
        spec = family(config)
    except FamilyError:
        return {}
    found: dict[nn.Module, Callable[[int], float]] = {}
    for module in model.modules():
        layer, kind = getattr(module, "layer_idx", None), type(module)
        stock = kind.__module__.startswith("transformers.") and kind.__name__.endswith("Attention")
        if stock and isinstance(layer, int):
            decoder = bool(getattr(module, "is_decoder", False))
            own, *cross = attentions(spec, config, spec.stacks[-1 if decoder else 0].name, layer)
            found[module] = _by_length(cross[0] if cross and not getattr(module, "is_causal", True) else own)
    return found


def _by_length(attention: Attention) -> Callable[[int], float]:
    def operations(length: int) -> float:
        return attention.flops_per_pair * attention.pairs(length, masked=False) / length

    return operations
