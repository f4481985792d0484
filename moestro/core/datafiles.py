"""Reading the YAML tables that ship inside the package."""

from collections.abc import Mapping, Set
from importlib import resources
from typing import Any

import yaml

from moestro.core.errors import ConfigError


def read_yaml(package: str, name: str) -> Any:
    """Parse a YAML file that lies beside a package's modules.

    Args:
        package: dotted name of the package, for example ``moestro.core``.
        name: file name inside it.

    Raises:
        ConfigError: the file is missing or is not valid YAML.
    """
    try:
        text = resources.files(package).joinpath(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{package}/{name}: the file is missing from this installation") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{package}/{name}: not valid YAML: {reason}") from None


def check_keys(row: Any, where: str, required: Set[str], optional: Set[str] = frozenset()) -> dict[str, Any]:
    """Return ``row`` as a dict after checking which keys it has.

    Raises:
        ConfigError: ``row`` is no mapping, lacks a required key or has an unknown one.
    """
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {type(row).__name__}")
    missing = sorted(required - set(row))
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} missing")
    unknown = sorted(set(map(str, row)) - required - optional)
    if unknown:
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(required | optional))}")
    return dict(row)
