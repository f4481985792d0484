"""What the inner units of dense feed-forwards do on data: which are active together, and on which kind of text."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.context import current_context, open_stack
from moestro.core.errors import ConfigError, DataError
from moestro.core.session import session
from moestro.models.families import family
from moestro.models.sites import dense_ffn, sites_by_layer, stacks
from moestro.observe.passing import watched


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

    def add(layer: int, args: tuple[Any, ...], output: Any) -> None:
        rows_TI = _rows(args).float().abs()
        gram_II = rows_TI.T @ rows_TI
        found[layer] = gram_II if layer not in found else found[layer].add_(gram_II)

    training, ran = model.training, False
    model.eval()
    try:
        with ExitStack() as hooks, torch.no_grad(), session(collect=False):
            hooks.enter_context(_contexts(model))
            hooks.enter_context(watched(_downs(model, layers), add))
            for batch in batches:
                model(**({"input_ids": batch} if isinstance(batch, Tensor) else batch))
                ran = True
    finally:
        model.train(training)
    if not ran:
        raise DataError("no calibration batches; co-activation needs at least one")
    return found


ALL = "all"
"""The domain of batches that name none."""


def domain_activity(
    model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], layers: Iterable[int] | None = None
) -> dict[int, dict[str, tuple[Tensor, int]]]:
    """For each dense feed-forward and domain the mean of |a_t| over its tokens, float32 [I], and how many they were.

    Args:
        batches: as for ``coactivation``; a mapping may have the key ``domain``, a word, which the model does not see.

    Raises:
        ConfigError: a layer that is not dense. DataError: no batches.
    """
    found: dict[int, dict[str, tuple[Tensor, int]]] = {}
    ran = False
    for batch in batches:
        call = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        domain = str(call.pop("domain", ALL))
        for layer, rows_TI in unit_activity(model, call, layers).items():
            total_I, count = found.setdefault(layer, {}).get(domain, (torch.zeros(rows_TI.shape[1]), 0))
            found[layer][domain] = (total_I + rows_TI.sum(0).cpu(), count + len(rows_TI))
        ran = True
    if not ran:
        raise DataError("no calibration batches; the activity of domains needs at least one")
    return {
        layer: {name: (total_I / max(count, 1), count) for name, (total_I, count) in domains.items()}
        for layer, domains in found.items()
    }


def unit_activity(model: nn.Module, call: Mapping[str, Any], layers: Iterable[int] | None = None) -> dict[int, Tensor]:
    """|a_t| of each dense feed-forward for the tokens of one forward without padding, row by row: float32 [T, I]."""
    found: dict[int, Tensor] = {}
    training = model.training
    model.eval()

    def keep(layer: int, args: tuple[Any, ...], output: Any) -> None:
        found[layer] = _rows(args).float().abs()

    try:
        with ExitStack() as hooks, torch.no_grad(), session(collect=False):
            hooks.enter_context(_contexts(model))
            hooks.enter_context(watched(_downs(model, layers), keep))
            model(**call)
    finally:
        model.train(training)
    return found


def _rows(args: tuple[Any, ...]) -> Tensor:
    """What a down projection is given, [T, I], without padding."""
    rows_TI: Tensor = args[0].detach().reshape(-1, args[0].shape[-1])
    ctx = current_context()
    return rows_TI if ctx is None or ctx.tokens is None else rows_TI[ctx.tokens.valid_T]


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


@contextmanager
def _contexts(model: nn.Module) -> Iterator[None]:
    """Routing contexts tell padding; a plain Transformers model opens them only in here."""
    with ExitStack() as stack:
        for place in stacks(model, family(model.config)):
            if getattr(place.module, "_moestro_watch", None) is None:
                stack.callback(open_stack(place.module, place.spec.name))
        yield
