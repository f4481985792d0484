"""The ledger: which experts a verb had to touch, and which it touched. A missing row is an error, never a warning."""

from dataclasses import dataclass, field
from typing import Any

from moestro.core.errors import LedgerError


Row = tuple[int, int, str]  # layer, expert, projection


@dataclass
class Ledger:
    """Rows (layer, expert, projection) expected and touched by one verb.

    Attributes:
        verb: what was done, for messages: ``load``, ``convert.upcycle`` ...
    """

    verb: str
    expected: dict[Row, int] = field(default_factory=dict)
    touched: dict[Row, int] = field(default_factory=dict)

    def expect(self, layer: int, expert: int, projection: str, times: int = 1) -> None:
        """A row that must be touched ``times`` times."""
        row = (layer, expert, projection)
        self.expected[row] = self.expected.get(row, 0) + times

    def touch(self, layer: int, expert: int, projection: str) -> None:
        """A row that was touched."""
        row = (layer, expert, projection)
        self.touched[row] = self.touched.get(row, 0) + 1

    def missing(self) -> list[Row]:
        """Rows touched fewer times than expected, sorted."""
        return sorted(row for row, times in self.expected.items() if self.touched.get(row, 0) < times)

    def extra(self) -> list[Row]:
        """Rows touched more often than expected, sorted."""
        return sorted(row for row, times in self.touched.items() if times > self.expected.get(row, 0))

    def close(self) -> dict[str, Any]:
        """The ledger's account for a receipt.

        Raises:
            LedgerError: a row is missing or was touched too often; the first is named, the rest counted.
        """
        for rows, fault in (
            (self.missing(), "was not touched"),
            (self.extra(), "was touched more often than planned"),
        ):
            if rows:
                layer, expert, projection = rows[0]
                more = f" ({len(rows) - 1} more such rows)" if len(rows) > 1 else ""
                raise LedgerError(
                    f"{self.verb}: layer {layer} expert {expert} projection {projection} {fault}{more}; "
                    f"{len(self.expected)} rows were expected"
                )
        layers = sorted({row[0] for row in self.expected})
        return {
            "verb": self.verb,
            "rows_expected": sum(self.expected.values()),
            "rows_touched": sum(self.touched.values()),
            "layers": layers,
            "experts_per_layer": [len({r[1] for r in self.expected if r[0] == layer}) for layer in layers],
        }
