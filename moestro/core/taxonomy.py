"""The map of the field: a tree of slugs, and which of its leaves have a method here.

The tree itself is data (``taxonomy.yaml``). Nothing in the data says what is implemented: that is worked
out from the method cards each time it is asked, so the map cannot go stale.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from moestro.core.datafiles import check_keys, read_yaml
from moestro.core.errors import ConfigError


SOURCES = ("survey-moe", "survey-inference", "moestro")


class HasTaxonomy(Protocol):
    """What the map needs from a method card: one path, or several."""

    @property
    def taxonomy(self) -> str | Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class TaxonomyNode:
    """One place on the map.

    Attributes:
        path: slugs from the root joined by ``/``; empty for the root.
        title: the words to show a reader.
        source: key of the survey the words come from, or ``moestro``.
        systems: representative systems the source names here.
        children: nodes one level down, in reading order.
        methods: ids of the methods that name exactly this place.
    """

    path: str
    title: str
    source: str
    systems: tuple[str, ...] = ()
    children: tuple["TaxonomyNode", ...] = ()
    methods: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The last slug of the path."""
        return self.path.rpartition("/")[2]

    @property
    def implemented(self) -> bool:
        """Whether a method stands here or anywhere below."""
        return bool(self.methods) or any(child.implemented for child in self.children)

    def walk(self) -> Iterator["TaxonomyNode"]:
        """This node and everything below, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def leaves(self) -> tuple["TaxonomyNode", ...]:
        """The nodes below (or this one) that have no children."""
        return tuple(node for node in self.walk() if not node.children)


@cache
def taxonomy_paths() -> frozenset[str]:
    """Every path that may be named, inner nodes included."""
    return frozenset(node.path for node in taxonomy_tree().walk() if node.path)


def check_path(path: str, where: str) -> str:
    """Return ``path`` if it is on the map.

    Raises:
        ConfigError: it is not; the message names the longest part that is, and what may follow.
    """
    known = taxonomy_paths()
    if path in known:
        return path
    parent = path
    while parent and parent not in known:
        parent = parent.rpartition("/")[0]
    depth = parent.count("/") + 1 if parent else 0
    below = {other.split("/")[depth] for other in known if other.startswith(f"{parent}/" if parent else "")}
    choices = ", ".join(sorted(below)) or "nothing, it is a leaf"
    raise ConfigError(f"{where}: taxonomy {path!r} is unknown; below {parent or 'the root'!r}: {choices}")


def taxonomy_tree(cards: Mapping[str, HasTaxonomy] | None = None) -> TaxonomyNode:
    """The map, with every method at the place its card names.

    Args:
        cards: method id to method card; None gives the bare map.

    Raises:
        ConfigError: a card names a place that is not on the map, or the data file is damaged.
    """
    placed: dict[str, list[str]] = {}
    for method, card in sorted((cards or {}).items()):
        paths = (card.taxonomy,) if isinstance(card.taxonomy, str) else tuple(card.taxonomy)
        for path in paths:
            placed.setdefault(check_path(path, method), []).append(method)
    table = read_yaml("moestro.core", "taxonomy.yaml")
    return TaxonomyNode("", "Mixture of experts", "survey-moe", children=_children(table, "", None, placed))


def _children(
    table: Any, parent: str, source: str | None, placed: Mapping[str, Sequence[str]]
) -> tuple[TaxonomyNode, ...]:
    if not isinstance(table, Mapping) or not table:
        raise ConfigError(f"taxonomy.yaml: {parent or 'the root'}: expected a mapping of slugs")
    nodes = []
    for slug, row in table.items():
        path = f"{parent}/{slug}" if parent else str(slug)
        fields = check_keys(row, f"taxonomy.yaml: {path}", {"title"}, {"source", "systems", "under"})
        origin = fields.get("source", source)
        if origin not in SOURCES:
            raise ConfigError(f"taxonomy.yaml: {path}: source {origin!r} is not one of {', '.join(SOURCES)}")
        below = _children(fields["under"], path, origin, placed) if "under" in fields else ()
        systems = tuple(str(system) for system in fields.get("systems", ()))
        methods = tuple(placed.get(path, ()))
        nodes.append(TaxonomyNode(path, str(fields["title"]), origin, systems, below, methods))
    return tuple(nodes)
