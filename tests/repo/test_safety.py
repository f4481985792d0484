"""Nothing is unpickled, no foreign code runs, and the project speaks of itself alone."""

import ast
import re

from tests.repo.files import name, tracked, tree


UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Put together, so that this file does not contain what it looks for.
FORBIDDEN = {
    "a path of one machine": "/wo" + r"rk/|/ro" + r"ot/|/ho" + r"me/\w",
    "a number on a tracker of one's own": r"\b(issue|ticket|pull request) #?\d+",
    "an assistant": r"\b(cl" + r"aude|chat" + r"gpt|cop" + r"ilot|co-auth" + r"ored-by)\b",
    "a note to oneself": r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
}
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".json", ".svg", ".html", ".css", ".js", ""}


def test_nothing_can_be_unpickled() -> None:
    wrong = []
    for pattern in ("moestro/*.py", "scripts/*.py", "benchmarks/*.py"):
        for path in tracked(pattern):
            for node in ast.walk(tree(path)):
                where = f"{name(path)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.Import) and UNSAFE_MODULES & {alias.name for alias in node.names}:
                    wrong.append(where)
                if isinstance(node, ast.ImportFrom) and node.module in UNSAFE_MODULES:
                    wrong.append(where)
                if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}:
                    wrong.append(where)
                if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                    wrong.append(where)
    assert wrong == [], "weights are safetensors or GGUF, everything else is JSON or Parquet"


def test_remote_code_is_never_switched_on() -> None:
    wrong = []
    for pattern in ("moestro/*.py", "scripts/*.py", "benchmarks/*.py"):
        for path in tracked(pattern):
            for node in ast.walk(tree(path)):
                given = isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
                if given and ast.unparse(node.value) != "False":  # type: ignore[attr-defined]
                    wrong.append(f"{name(path)}:{node.lineno}")  # type: ignore[attr-defined]
    assert wrong == []


def test_errors_are_not_swallowed() -> None:
    wrong = []
    for path in tracked("moestro/*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
            ):
                silent = all(isinstance(inner, ast.Pass | ast.Continue) for inner in node.body)
                if silent or node.type is None:
                    wrong.append(f"{name(path)}:{node.lineno}")
    assert wrong == [], "catch what is expected, by name"


def test_the_tree_speaks_of_itself_alone() -> None:
    wrong = []
    for path in tracked():
        if path.suffix not in TEXT or path.stat().st_size > 2_000_000:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for what, pattern in FORBIDDEN.items():
            for match in re.finditer(pattern, text, re.IGNORECASE if what != "a note to oneself" else 0):
                line = text.count("\n", 0, match.start()) + 1
                wrong.append(f"{name(path)}:{line} {what}: {match.group(0)!r}")
    assert wrong == []


def test_no_stubs() -> None:
    wrong = [
        f"{name(path)}:{node.lineno}"
        for path in tracked("moestro/*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc)
    ]
    assert wrong == [], "an abstract method is marked as one; everything else works"
