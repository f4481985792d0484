"""A tensor source over names and empty tensors whose values are fetched when they are asked for."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moestro.core.errors import PlanError


class LazySource:
    """See TensorSource.

    Args:
        name: for messages. tensors: what tells shapes and types; they may be without storage. fetch: gives the values.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, name: str, tensors: Mapping[str, Tensor], fetch: Callable[[str], Tensor]) -> None:
        self.name = name
        self._tensors = tensors
        self._fetch = fetch

    def keys(self) -> list[str]:
        """All names."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        """Type of a tensor."""
        return self._tensors[key].dtype

    def nbytes(self, key: str) -> int:
        """Bytes of a tensor."""
        return self._tensors[key].numel() * self._tensors[key].element_size()

    def get(self, key: str) -> Tensor:
        """The tensor.

        Raises:
            PlanError: it has no storage, as in a dry run.
        """
        found = self._fetch(key)
        if found.is_meta:
            raise PlanError(f"{self.name}: this plan looks at weights ({key}), and none were read; it needs a real run")
        return found.to("cpu", self.dtype(key))

    def close(self) -> None:
        """Nothing is held."""
