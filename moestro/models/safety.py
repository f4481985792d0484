"""Configs that ask Transformers to run code of their own are refused; there is no option that allows it."""

import re
from pathlib import Path
from typing import Any

from moestro.core.errors import LoadError
from moestro.models.headers import read_json, shown


CONFIG_NAMES = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
_IMPLEMENTATION = re.compile("(attn|experts)_implementation")


def check_no_remote_code(folder: Path) -> None:
    """Refuse a folder whose configs ask for code of their own. Raises `LoadError`; no option turns it off.

    Refused: `auto_map` anywhere in a config, and attention or expert implementations that name a hub
    repository (Transformers would fetch and run a kernel from there).
    """
    for name in CONFIG_NAMES:
        if (folder / name).exists():
            check_config_safe(read_json(folder / name), str(folder / name))


def check_config_safe(config: Any, where: str) -> None:
    """The check of `check_no_remote_code` for one parsed config. Raises `LoadError`."""
    for key, value in _items(config):
        if key == "auto_map" and value:
            raise LoadError(
                f"{where}: auto_map asks to run code that comes with the model; Moestro never runs remote code"
            )
        if _IMPLEMENTATION.search(key) and "/" in str(value):
            raise LoadError(
                f"{where}: {key} {shown(value)} asks to run a kernel from a hub; Moestro never runs remote code"
            )


def _items(value: Any) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, dict):
            found += current.items()
            pending += current.values()
        elif isinstance(current, list):
            pending += current
    return found
