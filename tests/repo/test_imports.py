"""Who imports whom, and what an import costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.files import ROOT, name, run_fresh, tracked, tree


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of a file, also those inside functions; `from a import b` counts as a and a.b."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.lineno, node.module))
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def at_module_level(path: Path) -> set[str]:
    """Top packages that importing the file imports; blocks under TYPE_CHECKING are not run."""
    found = set()
    for node in tree(path).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_the_rooms_import_downwards_only() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([str(lint), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_methods_do_not_import_each_other() -> None:
    wrong = []
    for path in tracked("moestro/methods/*/*.py"):
        stage = path.relative_to(ROOT / "moestro" / "methods").parts[0]
        allowed = (f"moestro.methods.{stage}._parts", f"moestro.methods.{stage}._contract")
        for line, module in imported(path):
            inside = module.startswith("moestro.methods.") and not module.startswith(allowed)
            # `from moestro.methods.train import _parts` names the package first.
            if inside and module != f"moestro.methods.{stage}":
                wrong.append(f"{name(path)}:{line} imports {module}")
    assert wrong == [], "a method reaches another by id through moestro.core.registry"


def test_nothing_inside_leans_on_the_facade() -> None:
    public = set(json.loads(run_fresh("import moestro, json; print(json.dumps(moestro.__all__))"))) - {"__version__"}
    wrong = []
    for room in ("ops", "core", "models", "data", "observe", "surgery", "methods", "training", "engine", "report"):
        for path in tracked(f"moestro/{room}/*.py"):
            wrong += [
                f"{name(path)}:{line}" for line, module in imported(path) if module in {f"moestro.{p}" for p in public}
            ]
    assert wrong == [], "import from the module that defines the name"


# Hooks belong to moestro/observe. Elsewhere each has a reason.
HOOKS = {
    "moestro/core/context.py": "the pair that opens and closes a stack's context",
    "moestro/models/swap.py": "gives a swapped module the return type of the stock one",
    "moestro/training/finite.py": "looks for the first module whose output is not finite",
}


def test_hooks_stay_where_they_belong() -> None:
    found = {
        name(path)
        for path in tracked("moestro/*.py")
        if not name(path).startswith("moestro/observe/")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr.startswith("register_") and node.attr.endswith("_hook")
    }
    assert found == set(HOOKS), "observe a model with moestro.observe"


def test_verbs_are_light_to_list() -> None:
    heavy = {"torch", "transformers", "numpy", "scipy", "pyarrow", "matplotlib", "rich", "plotly", "safetensors"}
    wrong = {name(path): sorted(at_module_level(path) & heavy) for path in tracked("moestro/cli/*.py")}
    assert {path: found for path, found in wrong.items() if found} == {}, "import it inside the verb's function"


def test_the_engine_needs_neither_torch_nor_transformers_to_start() -> None:
    heavy = {"torch", "transformers"}
    wrong = {name(path): sorted(at_module_level(path) & heavy) for path in tracked("moestro/engine/*.py")}
    assert {path: found for path, found in wrong.items() if found} == {}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import moestro", ["torch", "transformers", "numpy", "pydantic", "typer"]),
        ("import moestro.cli", ["torch", "transformers", "numpy"]),
        ("import moestro.core.registry as r; r.cards()", ["torch", "transformers"]),
        ("import moestro.core.layer, moestro.core.session, moestro.core.plan", ["transformers"]),
    ],
)
def test_imports_are_light(statement: str, absent: list[str]) -> None:
    loaded = json.loads(run_fresh(f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"))
    assert [module for module in absent if module in loaded] == []


def test_importing_opens_no_socket_and_writes_nothing() -> None:
    code = """
import sys
events = []
sys.addaudithook(lambda event, args: events.append(event) if event.startswith("socket.") or event == "os.mkdir" else 0)
import moestro
moestro.session, moestro.method
print(sorted(set(events)))
"""
    assert run_fresh(code).strip() == "[]"
