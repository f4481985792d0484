"""What goes through single modules while a model runs: watched, or changed on the way in."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn


Name = TypeVar("Name")


@contextmanager
def watched(modules: Mapping[Name, nn.Module], take: Callable[[Name, tuple[Any, ...], Any], None]) -> Iterator[None]:
    """Inside, ``take(name, positional inputs, output)`` is told of every forward; what modules compute stays."""
    with ExitStack() as stack:
        for name, module in modules.items():
            told = _teller(name, take)
            stack.callback(module.register_forward_hook(told).remove)
        yield


def _teller(
    name: Name, take: Callable[[Name, tuple[Any, ...], Any], None]
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def told(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        take(name, inputs, output)

    return told


@contextmanager
def scaled_inputs(factors: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Inside, the first input of each of these modules is multiplied by its factor; 0 silences a unit."""
    with ExitStack() as stack:
        for module, factor in factors.items():
            stack.callback(module.register_forward_pre_hook(_scaler(factor)).remove)
        yield


def _scaler(factor: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def scale(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] * factor, *inputs[1:])

    return scale
