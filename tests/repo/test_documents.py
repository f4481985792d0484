"""What the documents say is true of the tree."""

import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

import moestro
from moestro.core import errors
from tests.repo.files import ROOT, name, tracked


DRAWN = re.compile(r"^(?P<lead>[│ ]*)(?:[├└]── )?(?P<name>[A-Z]\w+) {2,}\S")


def drawn_tree() -> dict[str, str | None]:
    """Error -> the one it hangs under, as drawn at the top of core/errors.py."""
    stack: list[tuple[int, str]] = []
    parents: dict[str, str | None] = {}
    for line in (errors.__doc__ or "").splitlines():
        found = DRAWN.match(line)
        if found is None:
            continue
        depth = line.index(found["name"]) // 4
        while stack and stack[-1][0] >= depth:
            stack.pop()
        parents[found["name"]] = stack[-1][1] if stack else None
        stack.append((depth, found["name"]))
    return parents


def test_the_drawn_error_tree_is_the_real_one() -> None:
    real = {
        key: value.__base__.__name__ if value is not errors.MoestroError else None
        for key, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert drawn_tree() == real


def test_every_error_is_explained_to_users() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert [key for key in drawn_tree() if f"`{key}`" not in page] == []


def test_the_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert heads[0] == "Unreleased"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == moestro.__version__


def test_every_dependency_is_pinned_once() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    names = [re.sub(r"[-_.]+", "-", key).lower() for key in pins]
    assert len(set(names)) == len(names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(dep for deps in project["optional-dependencies"].values() for dep in deps)]
    for wish in wanted:
        package = re.split(r"[\[<>=! ]", wish)[0].lower()
        assert package in {*names, "moestro"}, f"{package} is not pinned"


@pytest.mark.parametrize("path", [*tracked("*.md")], ids=name)
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), f"{name(path)} links to {target}"


def test_every_verb_of_the_makefile_is_explained() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert phony is not None
    explained = set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))
    assert set(phony.group(1).split()) == explained


def test_headings_go_down_one_step_at_a_time() -> None:
    for path in tracked("docs/*.md"):
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
        assert levels[:1] == [1], f"{name(path)}: starts with one title"
        assert levels.count(1) == 1, f"{name(path)}: has more than one title"
        assert all(b - a <= 1 for a, b in pairwise(levels)), f"{name(path)}: skips a level"
