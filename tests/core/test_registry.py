"""Methods by id, found in the tree and read without being imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from moestro.core import registry
from moestro.core.card import MethodCard
from moestro.core.errors import RegistryError
from moestro.core.registry import infos, method, method_ids


def test_the_card_read_from_source_is_the_card_of_the_module() -> None:
    for method_id, info in infos().items():
        assert info.card == method(method_id).card
        assert all(hasattr(method(method_id).module, entry) for entry in info.entries)


def test_listing_imports_no_method() -> None:
    code = (
        "import sys; from moestro.core.registry import infos; assert infos(); "
        "assert not [m for m in sys.modules if m.startswith(('torch', 'transformers', 'moestro.methods.'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_an_unknown_id_names_the_nearest() -> None:
    with pytest.raises(RegistryError, match=r"train\.softmax_topk"):
        method("train.softmax_top_k")


def test_ids_are_paths() -> None:
    assert "train.switch" in method_ids("train")
    assert not method_ids("simulate") or all(i.startswith("simulate.") for i in method_ids("simulate"))


def test_a_missing_entry_is_named() -> None:
    with pytest.raises(RegistryError, match="no entry 'plan'; it has build"):
        method("train.switch").entry("plan")


def test_a_card_that_is_not_literal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("YEAR = 2024\nCARD = MethodCard(title='t', year=YEAR)\ndef build(a, b, c): ...\n")
    with pytest.raises(RegistryError, match="literals, line 2"):
        registry._read("train.bad", path)
    path.write_text("def build(a, b, c): ...\n")
    with pytest.raises(RegistryError, match="needs `CARD"):
        registry._read("train.bad", path)


def test_cards_check_their_words() -> None:
    with pytest.raises(Exception, match="needs 'modell'"):
        MethodCard(title="t", year=2024, summary="s", taxonomy="x", needs=("modell",))  # type: ignore[arg-type]
