"""What the repository's own tests read: its files and their syntax trees."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def tracked(pattern: str = "") -> tuple[Path, ...]:
    """Files of the repository, new ones included, ignored ones not; by suffix or prefix pattern as git takes it."""
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(listing + [pattern] * bool(pattern), capture_output=True, text=True, check=False)
    if answer.returncode:
        pytest.skip("not a git checkout: the repository's own tests need one")
    return tuple(path for line in sorted(answer.stdout.splitlines()) if (path := ROOT / line).is_file())


@functools.cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name(path: Path) -> str:
    """A path as messages show it."""
    return path.relative_to(ROOT).as_posix()


def run_fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout
