"""What the inner units of dense feed-forwards do on data: which of them are active together."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.context import current_context, open_stack
from moestro.core.errors import ConfigError, DataError
from moestro.core.session import session
from moestro.models.families import family
from moestro.models.sites import dense_ffn, sites_by_layer, stacks


def coactivation(
    model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], layers: Iterable[int] | None = None
) -> dict[int, Tensor]:
    """For each dense feed-forward the Gram matrix sum_t |a_t| |a_t|^T of its inner activations, float32 [I, I].

    a_t is what enters the down projection for token t. Padding is left out; the model's outputs do not change.

    Args:
        batches: arguments of the model's forward, or token ids [B, S].
        layers: indices of blocks (a decoder's count on after its encoder's); None means all dense ones.

    Raises:
        ConfigError: a layer that is not dense. DataError: no batches.
    """
    found: dict[int, Tensor] = {}
    training, ran = model.training, False
    model.eval()
    try:
        with ExitStack() as hooks, torch.no_grad(), session(collect=False):
            hooks.enter_context(_contexts(model))
            for layer, down in _downs(model, layers).items():
                hooks.callback(down.register_forward_pre_hook(_adder(found, layer)).remove)
            for batch in batches:
                model(**({"input_ids": batch} if isinstance(batch, Tensor) else batch))
                ran = True
    finally:
        model.train(training)
    if not ran:
        raise DataError("no calibration batches; co-activation needs at least one")
    return found


def _downs(model: nn.Module, layers: Iterable[int] | None) -> dict[int, nn.Module]:
    """The down projections of the dense feed-forwards, by layer."""
    owners = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Linear)}
    found: dict[int, nn.Module] = {}
    for layer, site in sites_by_layer(model, "mlp").items():
        try:
            found[layer] = owners[id(dense_ffn(model, site).down)]
        except ConfigError:
            continue
    if layers is None:
        return found
    missing = sorted(set(layers) - set(found))
    if missing:
        raise ConfigError(f"layer {missing[0]} has no dense feed-forward; layers {sorted(found)} have one")
    return {layer: found[layer] for layer in sorted(set(layers))}


def _adder(found: dict[int, Tensor], layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that adds the rows a down projection is given."""

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        rows_TI = args[0].detach().reshape(-1, args[0].shape[-1])
        ctx = current_context()
        if ctx is not None and ctx.tokens is not None:
            rows_TI = rows_TI[ctx.tokens.valid_T]
        rows_TI = rows_TI.float().abs()
        gram_II = rows_TI.T @ rows_TI
        found[layer] = gram_II if layer not in found else found[layer].add_(gram_II)

    return add


@contextmanager
def _contexts(model: nn.Module) -> Iterator[None]:
    """Routing contexts tell padding; a plain Transformers model opens them only in here."""
    with ExitStack() as stack:
        for place in stacks(model, family(model.config)):
            if getattr(place.module, "_moestro_watch", None) is None:
                stack.callback(open_stack(place.module, place.spec.name))
        yield
