"""Reading YAML: the tables that ship inside the package, and what users write."""

from collections.abc import Mapping, Set
from importlib import resources
from typing import Any

import yaml

from moestro.core.errors import ConfigError


class _OnceOnly(yaml.SafeLoader):
    """A key given twice is an error, not a value that quietly wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value that YAML text stands for; plain types only.

    Raises:
        yaml.YAMLError: not YAML, or a mapping with one key twice.
    """
    return yaml.load(text, _OnceOnly)


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
        return parse_yaml(text)
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
