"""Small files, small functions: what does not fit on a few screens is cut."""

import ast

from tests.repo.files import name, tracked, tree


FILE, METHOD, FUNCTION, TEST = 400, 300, 60, 500


def lines(path: str) -> dict[str, int]:
    return {name(file): len(file.read_text(encoding="utf-8").splitlines()) for file in tracked(path)}


def test_source_files() -> None:
    long = {path: count for path, count in lines("moestro/*.py").items() if count > FILE}
    assert long == {}, f"at most {FILE} lines a file"


def test_method_files() -> None:
    long = {path: count for path, count in lines("moestro/methods/*/*.py").items() if count > METHOD}
    assert long == {}, f"at most {METHOD} lines a method"


def test_test_files() -> None:
    long = {path: count for path, count in lines("tests/*.py").items() if count > TEST}
    assert long == {}, f"at most {TEST} lines a test file"


def test_functions() -> None:
    long = {}
    for pattern in ("moestro/*.py", "scripts/*.py", "tests/*.py"):
        for path in tracked(pattern):
            for node in ast.walk(tree(path)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    count = (node.end_lineno or node.lineno) - node.lineno + 1
                    if count > FUNCTION:
                        long[f"{name(path)}:{node.lineno} {node.name}"] = count
    assert long == {}, f"at most {FUNCTION} lines a function"


def test_the_readme_is_short() -> None:
    assert lines("README.md")["README.md"] <= 150
