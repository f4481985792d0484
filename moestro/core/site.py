"""What a method's ``build`` is told: where it stands, and what it may share with other sites."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from moestro.core.errors import ConfigError


SiteKind = Literal["mlp", "attention", "linear", "norm", "embedding", "block", "stack", "head"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in a model where a module can be exchanged.

    Attributes:
        path: module path, for example ``model.layers.3.mlp``. kind: what stands there by the family's table.
        layer: index of the block it belongs to, None outside blocks. num_layers: blocks of its stack.
        module: what stands there now; a mixture keeps what it needs of it. dim: width of its input, D.
        out: width of its output, O. ordinal: place among the sites of the same kind in this stack, from 0.
        model_config: the model's configuration object, None for plain modules. family: name of the family, or None.
    """

    path: str
    kind: SiteKind
    module: nn.Module
    dim: int
    out: int | None = None
    layer: int | None = None
    num_layers: int | None = None
    ordinal: int = 0
    model_config: Any = None
    family: str | None = None


class SharedParts(nn.ModuleDict):
    """Where shared parts live. They run, and cost operations, at the sites that borrow them."""

    def flops_per_token(self, work: object) -> float:
        """Nothing: see ``moestro.core.cost``."""
        return 0.0


@dataclass
class Shared:
    """Parts used by several sites: made once, kept once under the model, saved once."""

    modules: nn.ModuleDict = field(default_factory=SharedParts)

    def __call__(self, name: str, factory: Callable[[], nn.Module]) -> nn.Module:
        """The part ``name``, made by ``factory`` at the first call.

        A module that keeps the part must do so without registering it a second time: store ``Borrowed(part)``.
        """
        if not name or "." in name:
            raise ConfigError(f"shared part {name!r}: a name must be non-empty and without dots")
        if name not in self.modules:
            self.modules[name] = factory()
        return self.modules[name]


class Borrowed:
    """Holds a module that lives elsewhere, so that its parameters are not registered, saved or trained twice."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)
