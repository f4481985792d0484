"""NaN and infinity: noticed in the step they appear in, named, never saved.

The check that runs every step reads the loss, the gradients' global norm (which clipping needs anyway) and one sum per
weight. Only when one of them is not finite does the search for the culprit begin, and that may take its time.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from moestro.core.errors import NonFiniteError


def weights_are_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether every weight is finite, by one sum per tensor; a sum that overflows is looked at more closely."""
    suspects = [p for p in parameters if p.is_floating_point() and p.numel()]
    if not suspects:
        return True
    with torch.no_grad():
        sums = torch.stack([local(p).sum(dtype=torch.float32) for p in suspects])
        odd = (~torch.isfinite(sums)).nonzero().flatten().tolist()
        return all(bool(torch.isfinite(local(suspects[number])).all()) for number in odd)


def local(tensor: Tensor) -> Tensor:
    """The part of a (possibly sharded) tensor that this rank holds."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def first_bad(named: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """Name and description of the first tensor that is not finite, or None."""
    for name, tensor in named:
        part = local(tensor.detach())
        if part.is_floating_point() and not bool(torch.isfinite(part).all()):
            return name, describe(part)
    return None


def describe(tensor: Tensor) -> str:
    """How many values are NaN or infinite, and where the first one stands."""
    bad = ~torch.isfinite(tensor)
    nans = int(torch.isnan(tensor).sum())
    infinities = int(bad.sum()) - nans
    place = tuple(int(i) for i in bad.nonzero()[0]) if tensor.ndim else ()
    kinds = [f"{count} {word}" for count, word in ((nans, "NaN"), (infinities, "infinite")) if count]
    return f"{' and '.join(kinds)} of {tensor.numel()} values, first at {list(place)}"


def stop(step: int, model: nn.Module, terms: Mapping[str, Tensor], again: Callable[[], object] | None) -> NoReturn:
    """Find what is not finite and end the run.

    Looked at in the order of cause: weights and buffers, then (by running the forward again) the first module whose
    output is not finite, then gradients, then loss terms.

    Args:
        step: the optimiser step, from 0. terms: losses of the step by name. again: repeats the forward.

    Raises:
        NonFiniteError: always; the message names the tensor.
    """
    where = f"step {step + 1}: "
    stay = "; nothing of this step is saved, the last complete checkpoint stays"
    for kind, named in (("weight", model.named_parameters()), ("buffer", model.named_buffers())):
        if found := first_bad(named):
            raise NonFiniteError(f"{where}{kind} {found[0]} is not finite ({found[1]}){stay}")
    if again is not None and (found := _first_output(model, again)):
        raise NonFiniteError(f"{where}the output of {found[0]} is not finite ({found[1]}){stay}; try a lower lr")
    for name, term in terms.items():
        if not bool(torch.isfinite(term).all()):
            raise NonFiniteError(f"{where}loss {name} is {float(term.sum()):g}{stay}; try a lower lr")
    gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    if found := first_bad(gradients):
        raise NonFiniteError(f"{where}the gradient of {found[0]} is not finite ({found[1]}){stay}; try a lower lr")
    largest = max(
        ((float(local(p.grad).abs().max()), name) for name, p in model.named_parameters() if p.grad is not None),
        default=(0.0, "no parameter"),
    )
    raise NonFiniteError(
        f"{where}the global gradient norm overflows, the largest entry {largest[0]:g} is in {largest[1]}{stay}; "
        "try a lower lr"
    )


def _first_output(model: nn.Module, again: Callable[[], object]) -> tuple[str, str] | None:
    found: list[tuple[str, str]] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not found and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    found.append((name or type(module).__name__, describe(tensor)))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            again()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in _tensors(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in _tensors(value)]
    return []
