"""`__all__` says what is public, and nothing else is."""

import ast
from pathlib import Path

from tests.repo.files import name, run_fresh, tracked, tree


def exported(path: Path) -> list[str] | None:
    """The literal `__all__` of a file, or None."""
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            try:
                return list(ast.literal_eval(node.value))
            except ValueError:
                return None
    return None


def bound(path: Path) -> tuple[set[str], set[str]]:
    """(every name bound at module level, public functions and classes defined there)."""
    names, public = set(), set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
            if not node.name.startswith("_"):
                public.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)}
    return names, public


def test_all_names_exist_and_nothing_public_is_left_out() -> None:
    wrong = []
    for path in tracked("moestro/*.py"):
        listed = exported(path)
        if listed is None:
            continue
        names, public = bound(path)
        wrong += [f"{name(path)}: __all__ names {missing!r}, which is not there" for missing in set(listed) - names]
        # A verb's surface is its command; whatever else its file defines is for tests and sibling verbs.
        left_out = set() if name(path).startswith("moestro/cli/") else public - set(listed)
        wrong += [f"{name(path)}: {extra!r} is public but not in __all__" for extra in left_out]
        if len(set(listed)) != len(listed):
            wrong.append(f"{name(path)}: __all__ names something twice")
    assert wrong == []


def test_the_facade_keeps_its_promises() -> None:
    code = "import moestro; print(len([getattr(moestro, n) for n in moestro.__all__]), len(dir(moestro)))"
    got, listed = run_fresh(code).split()
    assert got == listed
    assert "NameError" in run_fresh("import moestro\ntry: moestro.nope\nexcept AttributeError: print('NameError')")


def explained_elsewhere() -> set[str]:
    """Names of methods that a protocol or an abstract class declares with a docstring: whoever fills them in need not
    say it again.
    """
    return {
        inner.name
        for path in tracked("moestro/*.py")
        for node in tree(path).body
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & {"Protocol", "ABC"}
        for inner in node.body
        if isinstance(inner, ast.FunctionDef) and ast.get_docstring(inner)
    }


def bare_methods(node: ast.ClassDef, explained: set[str]) -> list[ast.FunctionDef]:
    """Public methods without a docstring; what overrides is explained where it is declared."""
    return [
        inner
        for inner in node.body
        if isinstance(inner, ast.FunctionDef)
        and not inner.name.startswith("_")
        and not inner.decorator_list
        and not node.bases
        and inner.name not in explained
        and ast.get_docstring(inner) is None
    ]


def test_every_public_name_of_the_library_has_a_docstring() -> None:
    bare, explained = [], explained_elsewhere()
    for path in tracked("moestro/*.py"):
        module = tree(path)
        if ast.get_docstring(module) is None:
            bare.append(name(path))
        for node in module.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if ast.get_docstring(node) is None:
                    bare.append(f"{name(path)}:{node.lineno} {node.name}")
                if isinstance(node, ast.ClassDef):
                    bare += [f"{name(path)}:{m.lineno} {node.name}.{m.name}" for m in bare_methods(node, explained)]
    assert bare == [], "say what it is, with shapes, units and errors"
