"""Typed settings: frozen, keyword-only, checked when built, with errors a person can act on."""

import difflib
import json
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from moestro.core.errors import ConfigError


T = TypeVar("T", bound="Config")

_BUILDING: ContextVar[bool] = ContextVar("moestro_config_building", default=False)


class Config(BaseModel):
    """Base of every settings class. Building one with a wrong value raises ConfigError, never later."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        inner = _BUILDING.get()
        token = _BUILDING.set(True)
        try:
            super().__init__(**values)
        except ValidationError as error:
            text = explain(error, type(self))
            # Inside another Config a ValueError is what pydantic turns into an error that carries the field's path.
            raise (ValueError(text) if inner else ConfigError(text)) from None
        finally:
            _BUILDING.reset(token)

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Build from a mapping read from a file.

        Args:
            values: field name to value.
            where: what to call the source in an error, for example ``recipe.yaml: train``.

        Raises:
            ConfigError: an unknown field (the nearest known one is named), a missing or an unfit value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where or cls.__name__}: expected a mapping, got {type(values).__name__}")
        odd = next((key for key in values if not isinstance(key, str)), None)
        if odd is not None:
            raise ConfigError(
                f"{where or cls.__name__}: the key {odd!r} is no name; known: {', '.join(cls.model_fields)}"
            )
        try:
            return cls.model_validate(dict(values))
        except (ValidationError, ConfigError) as error:
            text = explain(error, cls) if isinstance(error, ValidationError) else str(error)
            raise ConfigError(f"{where}: {text}" if where else text) from None


def explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """One line for the first thing wrong: field, value, what would be right."""
    found = error.errors(include_url=False)
    # A union reports every alternative; the one that looked inside the value says more than "not a number".
    first = next((e for e in found if e["type"] in ("value_error", "extra_forbidden")), found[0])
    field = ".".join(str(part) for part in first["loc"]) or cls.__name__
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        known = sorted(cls.model_fields)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"unknown key {field!r}; {hint}{more}"
    if first["type"] == "missing":
        return f"{field} is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"{message}{more}"
    if isinstance(first.get("input"), Mapping):
        return f"{field}: {message}{more}"
    return f"{field}={first.get('input')!r}: {message}{more}"


def read_kept(kind: type[T], path: Path) -> T | None:
    """What was kept as JSON; None where the file is missing, damaged or of another version: it is made again."""
    try:
        return kind.parse(json.loads(path.read_text(encoding="utf-8")), where=str(path))
    except (OSError, ValueError, ConfigError):
        return None
