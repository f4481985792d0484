"""Write a method and its test: `python scripts/new_method.py STAGE NAME [ROOT]`, or `make new-method STAGE=.. NAME=..`.

Both files work as they are. Templates lie in scripts/templates/<stage>; a stage without one is refused.
"""

import keyword
import re
import sys
from datetime import date
from pathlib import Path


TEMPLATES = Path(__file__).resolve().parent / "templates"
ROOT = Path(__file__).resolve().parents[1]


class Refused(Exception):
    """The files cannot be written; the message says why and what would be right."""


def write(stage: str, name: str, root: Path = ROOT) -> list[Path]:
    """Write the two files and return their paths.

    Raises:
        Refused: no template for the stage, a name that cannot be an id, or a file that exists.
    """
    stages = sorted(path.name for path in TEMPLATES.iterdir() if path.is_dir())
    if stage not in stages:
        raise Refused(f"STAGE={stage!r} has no template; one of {', '.join(stages)}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise Refused(f"NAME={name!r} cannot be an id; use lower-case words joined by underscores, such as top_two")
    targets = {
        root / "moestro" / "methods" / stage / f"{name}.py": "method.py.txt",
        root / "tests" / "methods" / stage / f"test_{name}.py": "test.py.txt",
    }
    taken = [path for path in targets if path.exists()]
    if taken:
        raise Refused(f"{taken[0].relative_to(root)} exists; choose another NAME")
    words = {
        "@NAME@": name,
        "@CLASS@": "".join(word.capitalize() for word in name.split("_")),
        "@YEAR@": str(date.today().year),
    }
    for path, template in targets.items():
        text = (TEMPLATES / stage / template).read_text(encoding="utf-8")
        for mark, word in words.items():
            text = text.replace(mark, word)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(targets)


def main(arguments: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    if len(arguments) not in (2, 3) or not all(arguments):
        print("error: say which: make new-method STAGE=train NAME=foo", file=sys.stderr)
        return 2
    root = Path(arguments[2]) if len(arguments) == 3 else ROOT
    try:
        written = write(arguments[0], arguments[1], root)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 2
    for path in written:
        print(f"wrote {path.relative_to(root)}")
    print(f"next: docs/add-a-method.md; then pytest {written[1].relative_to(root)} tests/contracts -k {arguments[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
