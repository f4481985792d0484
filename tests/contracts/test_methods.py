"""Every method under every check of its stage and entries: a new file is covered the moment it exists."""

import pytest

from moestro.core.errors import RegistryError
from moestro.core.registry import method_ids
from moestro.testing.contracts import check, checks_of, contract_of


CASES = [(method_id, name) for method_id in method_ids() for name in checks_of(method_id)]


@pytest.mark.parametrize(("method_id", "name"), CASES, ids=[f"{m}-{n}" for m, n in CASES])
def test_contract(method_id: str, name: str) -> None:
    check(method_id, name)


def test_every_method_is_under_a_contract() -> None:
    without = [method_id for method_id in method_ids() if not checks_of(method_id)]
    assert without == [], f"no contract for {without}; write methods/<stage>/_contract.py"


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(RegistryError, match=r"has no check 'build\.nothing'"):
        check("train.switch", "build.nothing")
    assert contract_of("no_such_stage") == {}
