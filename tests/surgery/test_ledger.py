"""A row that surgery misses or writes twice is found by the ledger, and named."""

import pytest

from moestro import surgery
from moestro.core.errors import LedgerError
from moestro.core.plan import ExpertPlan
from moestro.surgery import fill as filling
from tests.surgery.helpers import keep, mixture


def test_a_row_that_is_skipped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(filling.Ledger):
        def touch(self, layer: int, expert: int, projection: str) -> None:
            if (layer, expert, projection) != (0, 1, "up"):
                super().touch(layer, expert, projection)

    monkeypatch.setattr("moestro.surgery.memory.Ledger", Forgetful)
    with pytest.raises(LedgerError, match=r"test: surgery.apply: layer 0 expert 1 projection up was not touched"):
        surgery.apply(mixture(), ExpertPlan(method="test", layers=[keep(0, [0, 1])]))


def test_a_row_that_is_written_twice_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(filling.Ledger):
        def touch(self, layer: int, expert: int, projection: str) -> None:
            super().touch(layer, expert, projection)
            if (expert, projection) == (0, "router.weight"):
                super().touch(layer, expert, projection)

    monkeypatch.setattr("moestro.surgery.memory.Ledger", Twice)
    with pytest.raises(LedgerError, match=r"expert 0 projection router.weight was touched more often than planned"):
        surgery.apply(mixture(), ExpertPlan(method="test", layers=[keep(0, [0, 1])]))
