"""Built-in corpora: real text that every installation has, so that studies, tests and the demo need no download.

``stdlib-docs``  English prose: the documentation strings of Python's standard library and the language reference
                 that ships as ``pydoc_data.topics`` (doctest paragraphs are left out).
``stdlib-code``  Python: the standard library's source files.
``german``       German prose: short pieces written for Moestro (no Python package of ours carries running text in
                 another language; message catalogues are not prose).

Each corpus is split by file into *train* and *heldout* (one file in eight, by a hash of its name), so that a
document never stands on both sides; paragraphs of held-out files that also occur in a train file (copied
documentation strings, licence headers) are removed from the held-out side. The standard library differs between
Python versions, so ``fingerprint`` names what was read.
"""

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from moestro.core.errors import DataError
from moestro.data.sources import Split


HELDOUT_OF = 8  # one file in this many is held out
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "pydoc_data"}
    | {"ensurepip", "turtledemo", "encodings"}
)
MIN_DOCSTRING = 80  # characters; shorter ones are labels, not prose
MIN_SHARED_PARAGRAPH = 40  # characters; shorter ones ("See also") may stand on both sides


def corpus(name: str, split: Split = "all") -> list[str]:
    """Documents of a built-in corpus, one string a file, in a fixed order.

    Args:
        name: ``stdlib-docs``, ``stdlib-code`` or ``german``.
        split: ``train``, ``heldout``, or ``all`` (both, as the files are).

    Raises:
        DataError: no such corpus, or this Python was installed without its library's sources.
    """
    if name not in CORPORA:
        raise DataError(f"no built-in corpus {name!r}; there are {', '.join(sorted(CORPORA))}")
    files = _files(name)
    if not files:
        raise DataError(f"built-in corpus {name!r}: this Python was installed without its library's sources")
    if split == "all":
        return [text for _, text in files]
    heldout = heldout_keys([key for key, _ in files])
    train = [text for key, text in files if key not in heldout]
    if split == "train":
        return train
    shared = {paragraph for text in train for paragraph in _paragraphs(text)}
    kept = (_without(text, shared) for key, text in files if key in heldout)
    return [text for text in kept if text]


def fingerprint(name: str, split: Split = "all") -> str:
    """First 16 hexadecimal digits of the SHA-256 over the corpus's documents, for receipts."""
    digest = hashlib.sha256()
    for text in corpus(name, split):
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    return digest.hexdigest()[:16]


def heldout_keys(keys: list[str]) -> frozenset[str]:
    """The files that are held out: one in ``HELDOUT_OF`` (rounded up), those whose names hash highest."""
    ranked = sorted(keys, key=lambda key: hashlib.sha256(key.encode("utf-8")).digest())
    return frozenset(ranked[len(keys) - -(-len(keys) // HELDOUT_OF) :])


@functools.cache
def _files(name: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(CORPORA[name]()))


def _paragraphs(text: str) -> list[str]:
    found = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return [paragraph for paragraph in found if len(paragraph) >= MIN_SHARED_PARAGRAPH]


def _without(text: str, shared: set[str]) -> str:
    kept = [part for part in text.split("\n\n") if " ".join(part.split()) not in shared]
    return "\n\n".join(kept).strip()


def _library_sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            try:
                yield relative.as_posix(), path.read_text("utf-8")
            except UnicodeDecodeError:  # a few files declare another encoding; they are test data, not code
                continue


def _library_code() -> Iterator[tuple[str, str]]:
    return ((key, text) for key, text in _library_sources() if text.strip())


def _library_docs() -> Iterator[tuple[str, str]]:
    for key, source in _library_sources():
        try:
            tree = ast.parse(source)
        except SyntaxError:  # templates such as lib/venv scripts are not modules
            continue
        prose = "\n\n".join(_docstrings(tree))
        if prose:
            yield key, prose
    import pydoc_data.topics

    # The topics quote one another, so they are one file and stand on one side.
    topics = (_prose(pydoc_data.topics.topics[topic]) for topic in sorted(pydoc_data.topics.topics))
    yield "pydoc_data/topics.py", "\n\n".join(topics)


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            prose = _prose(ast.get_docstring(node) or "")
            if len(prose) >= MIN_DOCSTRING:
                yield prose


def _prose(text: str) -> str:
    parts = (part.rstrip() for part in text.split("\n\n"))
    return "\n\n".join(part for part in parts if part and not part.lstrip().startswith((">>>", "...")))


def _german() -> Iterator[tuple[str, str]]:
    for path in sorted((Path(__file__).parent / "texts" / "german").glob("*.txt")):
        yield f"german/{path.name}", path.read_text("utf-8")


CORPORA: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "stdlib-docs": _library_docs,
    "stdlib-code": _library_code,
    "german": _german,
}
