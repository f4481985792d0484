"""Every method file has the same five parts in the same order, and a test of its own."""

import ast
from pathlib import Path

import pytest

from moestro.core.card import ENTRIES, STAGES
from moestro.core.registry import infos, method_ids
from moestro.core.taxonomy import taxonomy_paths
from tests.repo.files import ROOT, name, tracked, tree


FILES = [path for path in tracked("moestro/methods/*/*.py") if "/_" not in name(path)]


def ids(path: Path) -> str:
    return path.relative_to(ROOT / "moestro" / "methods").with_suffix("").as_posix()


def label(node: ast.stmt) -> str:
    """docstring, import, config, entry, card, or maths."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return "docstring"
    if isinstance(node, ast.Import | ast.ImportFrom) or (
        isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node)
    ):
        return "import"
    if isinstance(node, ast.ClassDef) and node.name == "Config":
        return "config"
    if isinstance(node, ast.FunctionDef) and node.name in ENTRIES:
        return "entry"
    if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "CARD" for t in node.targets):
        return "card"
    return "maths"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_the_parts_stand_in_order(path: Path) -> None:
    labels = [label(node) for node in tree(path).body]
    # Constants and type aliases may stand above Config; classes and functions may not.
    first = next(i for i, node in enumerate(tree(path).body) if isinstance(node, ast.ClassDef | ast.FunctionDef))
    assert labels[0] == "docstring", "a method starts with what it is for, its formula and its source"
    assert labels[first] == "config", "Config is the first definition"
    assert labels[-1] == "card", "CARD comes last"
    assert labels.count("card") == labels.count("config") == 1
    entries = [i for i, found in enumerate(labels) if found == "entry"]
    assert entries, f"no entry; one of {', '.join(ENTRIES)}"
    after = [found for found in labels[entries[0] : -1] if found != "entry"]
    assert after == [], "the entries come after the mathematics, CARD right after them"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_the_docstring_gives_a_source(path: Path) -> None:
    text = ast.get_docstring(tree(path)) or ""
    assert "Source" in text, "name paper and equation"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_the_method_has_a_test_of_its_own(path: Path) -> None:
    stage = path.parent.name
    assert (ROOT / "tests" / "methods" / stage / f"test_{path.stem}.py").exists()


def test_the_registry_sees_every_file() -> None:
    assert {f"{path.parent.name}.{path.stem}" for path in FILES} <= set(method_ids())
    assert {path.parent.name for path in FILES} <= set(STAGES)


def test_cards_stand_on_the_map_and_name_known_papers() -> None:
    from moestro.core.papers import load_papers

    papers = {paper.key: paper for paper in load_papers()}
    for method_id, info in infos().items():
        assert info.card.taxonomy in taxonomy_paths(), method_id
        if info.card.paper is not None:
            assert info.card.paper in papers, f"{method_id}: no paper {info.card.paper!r}"
        assert info.card.summary.endswith("."), f"{method_id}: a summary is one sentence"
        assert "\n" not in info.card.summary
        assert len(info.card.summary) <= 120, f"{method_id}: a summary is one short line"
