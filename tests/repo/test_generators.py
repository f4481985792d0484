"""What scripts write: generated pages are fresh, a generated method works as it is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.files import ROOT, tracked


STAGES = sorted(path.name for path in (ROOT / "scripts" / "templates").iterdir())


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python on a tree, whatever is installed."""
    environment = os.environ | {"PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_generated_pages_are_fresh() -> None:
    run = python("scripts/generate_docs.py", "--check")
    assert run.returncode == 0, run.stderr


def test_pages_of_verbs_that_are_stages_lead_to_their_methods() -> None:
    for stage in STAGES:
        if (ROOT / "docs" / "methods" / f"{stage}.md").exists():
            page = (ROOT / "docs" / "verbs" / f"{stage}.md").read_text(encoding="utf-8")
            assert f"(../methods/{stage}.md)" in page
            assert "No method" not in page


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The tree without its history, to write into."""
    for path in tracked():
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return tmp_path


@pytest.mark.parametrize("stage", STAGES)
def test_a_generated_method_passes_every_check_as_it_is(stage: str, copy: Path) -> None:
    made = python("scripts/new_method.py", stage, "freshly_made", cwd=copy)
    assert made.returncode == 0, made.stderr
    files = [f"moestro/methods/{stage}/freshly_made.py", f"tests/methods/{stage}/test_freshly_made.py"]
    assert made.stdout.splitlines()[:2] == [f"wrote {file}" for file in files]
    quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    tests = python("-m", "pytest", *quiet, files[1], "tests/contracts", "-k", "freshly_made", cwd=copy)
    assert tests.returncode == 0, tests.stdout
    listed = python("-m", "moestro", "methods", "--json", cwd=copy)
    assert f'"{stage}.freshly_made"' in listed.stdout
    for tool in (["check"], ["format", "--check"]):
        run = python("-m", "ruff", *tool, *files, cwd=copy)
        assert run.returncode == 0, run.stdout
    again = python("scripts/new_method.py", stage, "freshly_made", cwd=copy)
    assert (again.returncode, again.stderr) == (2, f"error: {files[0]} exists; choose another NAME\n")


@pytest.mark.slow
def test_generated_methods_are_typed(copy: Path) -> None:
    for stage in STAGES:
        assert python("scripts/new_method.py", stage, "freshly_made", cwd=copy).returncode == 0
    run = python("-m", "mypy", "--strict", *(f"moestro/methods/{stage}/freshly_made.py" for stage in STAGES), cwd=copy)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "foo"], "STAGE='trian' has no template; one of"),
        (["train", "Foo"], "NAME='Foo' cannot be an id"),
        (["train", "class"], "NAME='class' cannot be an id"),
        (["train", ""], "make new-method STAGE=train NAME=foo"),
    ],
)
def test_a_wrong_wish_is_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    run = python("scripts/new_method.py", *arguments, str(tmp_path))
    assert run.returncode == 2
    assert words in run.stderr
    assert run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
