"""Numbers and nested facts as a reader wants them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final


_LONG: Final = 40
NARROW: Final = "\u202f"  # narrow no-break space between thousands


def number(value: Any) -> str:
    """A number with thousands apart and at most four significant decimals; anything else as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", NARROW)
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not a number" if math.isnan(value) else ("−∞" if value < 0 else "∞")
        if value == int(value) and abs(value) < 1e15:
            return number(int(value))
        if abs(value) >= 1000:
            return f"{value:,.1f}".replace(",", NARROW)
        return f"{value:.4g}"
    return "—" if value is None else str(value)


def share(part: float, whole: float) -> str:
    """A percentage with one decimal; a dash of nothing."""
    return f"{100 * part / whole:.1f}{NARROW}%" if whole else "—"


def times(ratio: float) -> str:
    """A multiple: 2.3×."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"


@dataclass
class Node:
    """A fact or a group of facts, ready for the page.

    Attributes:
        name: key. value: text of a leaf. children: parts of a group. head, rows: a table, for lists of equal records.
        more: how many items of a long list are not shown.
    """

    name: str
    value: str | None = None
    children: list["Node"] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    more: int = 0


def nodes(facts: Mapping[str, Any]) -> list[Node]:
    """Nested facts (a receipt) as nodes: mappings become groups, lists of records tables, the rest text."""
    return [_node(str(name), value) for name, value in facts.items()]


def _node(name: str, value: Any) -> Node:
    if isinstance(value, Mapping):
        return Node(name, children=nodes(value)) if value else Node(name, "—")
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        shown, more = value[:_LONG], max(0, len(value) - _LONG)
        if shown and all(isinstance(item, Mapping) for item in shown):
            head = list(dict.fromkeys(str(key) for item in shown for key in item))
            return Node(name, head=head, rows=[[plain(item.get(key)) for key in head] for item in shown], more=more)
        return Node(name, ", ".join(plain(item) for item in shown) or "—", more=more)
    return Node(name, number(value))


def plain(value: Any) -> str:
    """One cell: a number, or nested facts on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) or "—"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return ", ".join(plain(item) for item in value[:_LONG]) or "—"
    return number(value)
