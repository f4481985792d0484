"""State that crosses decode steps: it lives on the Transformers cache object and follows its rows."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from moestro.core.errors import ContextError


_SLOT = "moestro_state"
# How a cache method changes the rows of what it holds: called with the method's own arguments.
_ROW_MOVES: dict[str, Callable[..., Tensor]] = {
    "reorder_cache": lambda value, index: value.index_select(0, index.to(value.device)),
    "batch_select_indices": lambda value, index: value[index],
    "batch_repeat_interleave": lambda value, times: value.repeat_interleave(times, 0),
}


def cache_state(cache: Any) -> dict[str, Tensor]:
    """The dictionary of row-wise tensors [B, ...] that travels with ``cache``; made on first use.

    Beam search reorders, repeats and selects rows, and ``reset`` empties the cache: the same is done to these tensors.
    A deep copy of the cache has a state of its own.

    Raises:
        ContextError: there is no cache (``use_cache=False``), so nothing can outlive this forward.
    """
    if cache is None:
        raise ContextError("this router keeps state across decode steps; call the model with use_cache=True")
    if _SLOT not in vars(cache):
        setattr(cache, _SLOT, {})
        plain: Any = type(cache)
        cache.__class__ = _following(plain)
    state: dict[str, Tensor] = getattr(cache, _SLOT)
    return state


@functools.cache
def _following(cls: type[Any]) -> type[Any]:
    """A subclass whose row operations move the state too; patched methods would be shared by a deep copy."""
    methods: dict[str, Any] = {
        name: _moving(getattr(cls, name), move) for name, move in _ROW_MOVES.items() if hasattr(cls, name)
    }
    if hasattr(cls, "reset"):
        methods["reset"] = _clearing(cls.reset)
    return type(cls.__name__, (cls,), methods)


def _moving(original: Callable[..., Any], move: Callable[..., Tensor]) -> Callable[..., Any]:
    @functools.wraps(original)
    def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = getattr(self, _SLOT)
        for name, value in state.items():
            state[name] = move(value, *args, *kwargs.values())
        return original(self, *args, **kwargs)

    return moved


def _clearing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def cleared(self: Any, *args: Any, **kwargs: Any) -> Any:
        getattr(self, _SLOT).clear()
        return original(self, *args, **kwargs)

    return cleared
