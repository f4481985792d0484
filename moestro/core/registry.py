"""Methods by id. A method's path is its id: ``moestro/methods/train/switch.py`` is ``train.switch``.

Nothing is registered by hand: files are found by walking the tree, packages of others by the entry-point group
``moestro.methods`` (entry-point name = id, value = module). Listing reads cards without importing a method.
"""

import ast
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from moestro.core.card import ENTRIES, STAGES, MethodCard, Tolerance
from moestro.core.config import Config
from moestro.core.errors import ConfigError, RegistryError
from moestro.core.plan import MethodUse


METHODS = Path(__file__).parent.parent / "methods"
GROUP = "moestro.methods"


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """What a listing knows of a method without importing it.

    Attributes:
        acts: what the entry ``policy`` says it returns, such as ``CachePolicy`` or ``Decoder``; "" without one.
    """

    id: str
    card: MethodCard
    entries: tuple[str, ...]
    acts: str = ""

    @property
    def stage(self) -> str:
        """First part of the id."""
        return self.id.partition(".")[0]

    @property
    def shape(self) -> str:
        """module, planner, policy, forecast, meter or objective: from the first entry the file defines."""
        return ENTRIES[self.entries[0]]


@dataclass(frozen=True, slots=True)
class Method:
    """An imported method."""

    id: str
    module: ModuleType

    @property
    def config_type(self) -> type[Config]:
        """Its settings class."""
        config: type[Config] = self.module.Config
        return config

    @property
    def card(self) -> MethodCard:
        """Its card."""
        card: MethodCard = self.module.CARD
        return card

    def configure(self, values: dict[str, Any] | None = None) -> Config:
        """Its settings from a mapping; errors name the method and the field."""
        return self.config_type.parse(values or {}, where=self.id)

    def entry(self, name: str) -> Callable[..., Any]:
        """The entry function ``build``, ``plan``, ``policy``, ``forecast``, ``measure`` or ``objective``.

        Raises:
            RegistryError: the method does not have it.
        """
        function = getattr(self.module, name, None)
        if function is None:
            has = ", ".join(e for e in ENTRIES if hasattr(self.module, e))
            raise RegistryError(f"{self.id} has no entry {name!r}; it has {has}")
        found: Callable[..., Any] = function
        return found

    def build(self, site: Any, config: Config, shared: Any) -> Any:
        """Call the entry ``build``; the module it makes remembers how in ``made_by``."""
        module = self.entry("build")(site, config, shared)
        if not hasattr(module, "forward"):
            raise ConfigError(f"{self.id} built a {type(module).__name__}; it must build a module")
        module.made_by = MethodUse(method=self.id, config=config.model_dump(mode="json"))
        return module

    def plan(self, inputs: Any, config: Config) -> Any:
        """Call the entry ``plan``."""
        return self.entry("plan")(inputs, config)


def method_ids(stage: str | None = None) -> tuple[str, ...]:
    """All ids, sorted; of one stage if given."""
    ids = (*_files(), *_foreign())
    return tuple(sorted(i for i in ids if stage is None or i.startswith(f"{stage}.")))


def method(method_id: str) -> Method:
    """Import a method.

    Raises:
        RegistryError: no method of that id; the nearest known ids are named. An error inside the method's own file is
            not hidden.
    """
    if method_id in _files():
        return Method(method_id, importlib.import_module(f"moestro.methods.{method_id}"))
    foreign = _foreign()
    if method_id in foreign:
        return Method(method_id, foreign[method_id].load())
    known = method_ids()
    near = difflib.get_close_matches(method_id, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "see `moestro methods`"
    raise RegistryError(f"no method {method_id!r}; {hint}")


@functools.cache
def infos() -> dict[str, MethodInfo]:
    """Every method by id, cards read from the source text."""
    found = {method_id: _read(method_id, path) for method_id, path in _files().items()}
    for method_id, point in _foreign().items():
        spec = importlib.util.find_spec(point.module)
        if spec is None or spec.origin is None:
            raise RegistryError(f"entry point {method_id} names {point.value}, which is not installed")
        found[method_id] = _read(method_id, Path(spec.origin))
    return dict(sorted(found.items()))


def cards() -> dict[str, MethodCard]:
    """Every method's card by id."""
    return {method_id: info.card for method_id, info in infos().items()}


@functools.cache
def _files() -> dict[str, Path]:
    return {
        f"{stage}.{path.stem}": path
        for stage in STAGES
        for path in sorted((METHODS / stage).glob("*.py"))
        if not path.stem.startswith("_")
    }


@functools.cache
def _foreign() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def _read(method_id: str, path: Path) -> MethodInfo:
    """Card and entries from the file's syntax tree."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    entries = tuple(e for e in ENTRIES if any(isinstance(n, ast.FunctionDef) and n.name == e for n in tree.body))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "CARD" for t in node.targets):
            card = _literal(method_id, node.value)
            if isinstance(card, MethodCard) and entries:
                return MethodInfo(method_id, card, entries, _acts(tree))
    raise RegistryError(f"{method_id}: {path.name} needs `CARD = MethodCard(...)` and an entry of {', '.join(ENTRIES)}")


def _acts(tree: ast.Module) -> str:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "policy" and node.returns is not None:
            return ast.unparse(node.returns)
    return ""


def _literal(method_id: str, node: ast.expr) -> Any:
    """The value of a literal, or of a MethodCard / Tolerance call with literal arguments."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        makers: dict[str, Callable[..., Any]] = {"MethodCard": MethodCard, "Tolerance": Tolerance}
        if node.func.id in makers:
            values = {k.arg: _literal(method_id, k.value) for k in node.keywords if k.arg is not None}
            return makers[node.func.id](**values)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise RegistryError(f"{method_id}: the card must be written with literals, line {node.lineno} is not") from None
