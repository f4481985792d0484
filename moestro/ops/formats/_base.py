"""What a format of packed matrices is, how its use at one matrix is spelled, and where formats are found.

A format says which numbers a weight may become (``fit``, ``round``, ``values``) and how codes and scales lie in bytes
(``parts``, ``pack``, ``unpack``). Quantisers, banks and files know formats by name only: another format is one more
file in this folder, with an instance of ``Format`` in its ``FORMATS``.
"""

import functools
import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moestro.core.errors import ConfigError


Params = dict[str, Tensor]
"""What codes of a group share, by name: [..., out, groups], such as ``scale`` and ``zero``."""

Parts = dict[str, Tensor]
"""The stored tensors of a stack of equal matrices by name, [E, ...]."""

SCALE_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Packing:
    """A format as it is used for one matrix [out, in].

    Attributes:
        format: its name. group: weights along the input that share a scale, None for a whole row; a last group may be
            short. scale: type of what is stored beside the codes.
        sizes: what a coder whose length depends on the weights must remember, as (name, number).
    """

    format: str
    group: int | None = None
    scale: str = "f32"
    sizes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        more = "".join(f":{name}={number}" for name, number in self.sizes)
        return f"{self.format}:{'row' if self.group is None else f'g{self.group}'}:{self.scale}{more}"

    def groups(self, width: int) -> int:
        """Groups of a row of ``width`` inputs."""
        return 1 if self.group is None else -(-width // self.group)

    def fitting(self, width: int) -> "Packing":
        """The same for rows of ``width`` inputs: a group that is as wide means the whole row."""
        return self if self.group is None or self.group < width else replace(self, group=None)

    @property
    def scale_type(self) -> torch.dtype:
        """Type of the scales."""
        return SCALE_TYPES[self.scale]


_SPELLING = re.compile(r"(\w+)(?::(row|g[1-9]\d*))?(?::(f32|f16|bf16))?((?::\w+=\d+)*)")


def packing(spelled: str) -> Packing:
    """The packing of its spelling: ``int4``, ``int4:g64``, ``uint2:row:f16``.

    Raises:
        ConfigError: no such format, or not a spelling.
    """
    found = _SPELLING.fullmatch(spelled)
    if found is None:
        raise ConfigError(f"{spelled!r} is no packing; write FORMAT:GROUP:SCALE such as int4:g64:f32 or uint2:row:f16")
    name, group, scale, more = found.groups()
    format_named(name)
    sizes = tuple((key, int(value)) for key, value in (item.split("=") for item in more.split(":")[1:]))
    return Packing(name, None if group in (None, "row") else int(group[1:]), scale or "f32", sizes)


class Format(ABC):
    """One format.

    Attributes:
        name: as packings spell it. bits: of a code, without what is stored beside it.
        ragged: the bytes of a matrix depend on its weights, so that matrices are packed one by one.
    """

    name: str
    bits: float
    ragged: bool = False

    @abstractmethod
    def fit(self, weight: Tensor, packing: Packing) -> Params:
        """What one group shares: params [..., 1] of float32 weights [..., n], as they will be stored.

        Raises:
            ConfigError: a scale that ``packing.scale`` cannot hold.
        """

    @abstractmethod
    def round(self, weight: Tensor, params: Params) -> Tensor:
        """The nearest codes, uint8 [..., n], of weights [..., n] in the groups of params [..., 1]."""

    @abstractmethod
    def values(self, codes: Tensor, params: Params) -> Tensor:
        """The weights float32 [..., n] that codes stand for, params as in ``round``."""

    @abstractmethod
    def parts(self, shape: tuple[int, int], packing: Packing) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every stored tensor of one matrix [out, in]."""

    @abstractmethod
    def pack(self, codes: Tensor, params: Params, packing: Packing) -> tuple[Parts, Packing]:
        """Codes uint8 [E, out, in] and params [E, out, groups] as stored tensors.

        Returns:
            The tensors [E, ...], and the packing with what the coder must remember.
        """

    @abstractmethod
    def unpack(self, parts: Parts, shape: tuple[int, int], packing: Packing) -> tuple[Tensor, Params]:
        """The inverse of ``pack``, for parts with or without a leading [E]."""

    def dequantise(self, parts: Parts, shape: tuple[int, int], packing: Packing) -> Tensor:
        """The weights float32 [..., out, in]."""
        codes, params = self.unpack(parts, shape, packing)
        spread = {name: spread_groups(value, packing, shape[1]) for name, value in params.items()}
        return self.values(codes, spread)

    def rows(self, parts: Parts, start: int, stop: int) -> Parts:
        """The stored tensors of some rows of one matrix; for formats whose parts all have rows first."""
        return {name: part[start:stop] for name, part in parts.items()}

    def nbytes(self, shape: tuple[int, int], packing: Packing) -> int:
        """Stored bytes of one matrix; for coders whose length depends on the weights and is not known yet, at most."""
        total = 0
        for size, kind in self.parts(shape, packing).values():
            total += functools.reduce(lambda a, b: a * b, size, kind.itemsize)
        return total


def stored(value: Tensor, packing: Packing) -> Tensor:
    """Positive scales as they will be stored, in float32 again.

    Raises:
        ConfigError: one of them is too large or too small for the type: more than 1 % would be lost.
    """
    kept = value.to(packing.scale_type).float()
    bad = ~((kept - value).abs() <= 0.01 * value)
    if bool(bad.any()):
        worst = float(value[bad][0])
        raise ConfigError(f"a scale of {worst:.3g} does not fit {packing.scale}; store scales as bf16 or f32")
    return kept


def spread_groups(param: Tensor, packing: Packing, width: int) -> Tensor:
    """Params [..., groups] as [..., width], or [..., 1] where a group is a whole row."""
    if packing.group is None or param.shape[-1] == 1:
        return param
    return param.repeat_interleave(packing.group, -1)[..., :width]


@functools.cache
def formats() -> Mapping[str, Format]:
    """Every format by name, found in this folder."""
    found: dict[str, Format] = {}
    parent = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(parent).__path__):
        if module.name.startswith("_"):
            continue
        for one in importlib.import_module(f"{parent}.{module.name}").FORMATS:
            assert one.name not in found, f"two formats are called {one.name}"
            found[one.name] = one
    return found


def format_named(name: str) -> Format:
    """A format.

    Raises:
        ConfigError: no format of that name.
    """
    known = formats()
    if name not in known:
        raise ConfigError(f"no format {name!r}; there are {', '.join(known)}")
    return known[name]


def check_packing(used: Packing, width: int) -> Packing:
    """The packing for rows of ``width`` inputs, a group as wide as a row spelled as a row.

    Raises:
        ConfigError: a group wider than the row.
    """
    if used.group is not None and used.group > width:
        raise ConfigError(f"groups of {used.group} do not fit rows of {width} inputs; use at most {width}, or row")
    return replace(used, group=None) if used.group == width else used
