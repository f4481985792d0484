"""What a model reference means: `folder | hub id | file.gguf | wheel:NAME`, always resolved to a folder on
disk.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moestro.core.errors import LoadError
from moestro.models.atomic import check_complete, recover
from moestro.models.cache import convert_gguf
from moestro.models.headers import PICKLE_SUFFIXES, check_not_pickled, read_json, shown
from moestro.models.safety import check_no_remote_code
from moestro.models.source import SafetensorsSource
from moestro.models.wheels import find_model


Kind = Literal["folder", "hub", "gguf", "wheel"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
# Top level only, and nothing that is code or a pickle.
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A resolved reference: a Hugging Face folder whose config asks for no code, and the config itself."""

    ref: str
    kind: Kind
    folder: Path
    config: dict[str, Any]

    def source(self) -> SafetensorsSource:
        """Open the weights; all headers are checked. Raises `LoadError`."""
        return SafetensorsSource(self.folder)


def resolve(ref: str | Path) -> ModelFiles:
    """Find the folder of a reference. Raises `LoadError` in one line, `FamilyError` for an unknown GGUF
    architecture.

    An existing path wins over a hub id of the same spelling. GGUF files, and wheels that carry one, are
    converted into the cache at the first use. A hub id may end with `@revision`. A folder with a manifest of
    ours must be complete; what a kill between the two renames of a save left is put back first.
    """
    text = str(ref)
    if text.startswith("wheel:"):
        model = find_model(text.removeprefix("wheel:"))
        return _opened(text, "wheel", convert_gguf(model.path) if model.kind == "gguf" else model.path)
    path = Path(text).expanduser()
    recover(path)
    if path.is_dir():
        return _opened(text, "folder", path)
    if path.exists():
        return _opened(text, "gguf", convert_gguf(_checked_file(path)))
    is_file_name = path.suffix in (".gguf", ".safetensors", *PICKLE_SUFFIXES)
    if isinstance(ref, Path) or is_file_name or not _HUB_ID.fullmatch(text):
        raise LoadError(f"{text}: no such file or folder, and not a hub id (name or organisation/name)")
    return _opened(text, "hub", _download(text))


def _checked_file(path: Path) -> Path:
    if path.suffix == ".gguf":
        return path
    if path.suffix == ".safetensors":
        raise LoadError(f"{path}: give the folder that holds this file and its config.json")
    if path.suffix in PICKLE_SUFFIXES:
        raise LoadError(f"{path}: a pickled checkpoint can run code when it is read; convert it to safetensors")
    raise LoadError(f"{path}: is neither a model folder nor a .gguf file")


def _opened(ref: str, kind: Kind, folder: Path) -> ModelFiles:
    check_complete(folder)
    if not (folder / "config.json").is_file():
        check_not_pickled(folder)
        raise LoadError(f"{folder}: no config.json; is it a model folder?")
    check_no_remote_code(folder)
    return ModelFiles(ref, kind, folder, read_json(folder / "config.json"))


def _download(ref: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = ref.partition("@")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=_HUB_FILES,
            ignore_patterns=["*/*", "consolidated*"],
        )
    except Exception as error:
        # The hub's client has a type for each failure, and the HTTP library beneath it has others.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise LoadError(f"{shown(ref)}: not a local path, and the hub did not give it ({reason[:200]})") from None
    return Path(folder)
