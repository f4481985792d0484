"""A checkpoint on disk: its config, its tensors, and whether Moestro wrote it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.core.errors import LoadError
from moestro.models.auto import MODEL_TYPE, SCHEMA
from moestro.models.headers import read_headers, read_json, shown
from moestro.models.refs import resolve
from moestro.models.source import TensorSource
from moestro.models.swap import Swap


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        name: as the user gave it. folder: where it is.
        config: its ``config.json``. source: its tensors. files: tensor name -> file name.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    source: TensorSource
    files: Mapping[str, str]

    @property
    def is_moestro(self) -> bool:
        """Whether Moestro wrote it: the tensors then have the model's own names."""
        return self.config.get("model_type") == MODEL_TYPE

    @property
    def base_config(self) -> dict[str, Any]:
        """The config of the Transformers model underneath.

        Raises:
            LoadError: a Moestro config without one.
        """
        if not self.is_moestro:
            return dict(self.config)
        base = self.config.get("base_config")
        if not isinstance(base, dict) or "model_type" not in base:
            raise LoadError(f"{self.name}: config.json of a Moestro model needs a base_config with a model_type")
        return dict(base)

    @property
    def swaps(self) -> list[Swap]:
        """The swaps to do on the empty model, in order.

        Raises:
            LoadError: a Moestro config without the list. ConfigError: an entry of it.
        """
        if not self.is_moestro:
            return []
        return read_swaps(self.config, self.name)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A small file of the folder, None if it is not there."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None


def read_swaps(config: Mapping[str, Any], name: str) -> list[Swap]:
    """The list of swaps in a Moestro model's ``config.json``. Errors as ``Checkpoint.swaps``."""
    schema = config.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise LoadError(f"{name}: config.json has schema {shown(schema)}, this version of Moestro reads {SCHEMA}")
    entries = config.get("swaps")
    if not isinstance(entries, list):
        raise LoadError(f"{name}: config.json of a Moestro model needs a list of swaps, it has {shown(entries)}")
    return [Swap.parse(entry, where=f"{name}: swaps[{i}]") for i, entry in enumerate(entries)]


def open_checkpoint(ref: str | Path) -> Checkpoint:
    """Find a checkpoint and check its config and all its headers; no tensor is read.

    Raises:
        LoadError: nothing is there, a file is damaged or incomplete, or the config asks for code of its own.
    """
    found = resolve(ref)
    files = {key: header.path.name for header in read_headers(found.folder).values() for key in header.tensors}
    return Checkpoint(str(ref), found.folder, found.config, found.source(), files)
