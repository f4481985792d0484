"""Reports: what a meter found, as data that can be read, compared and stored."""

import json
import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from moestro.core.config import Config
from moestro.core.errors import ConfigError, DataError
from moestro.core.files import write_text


Cell = float | int | str | None


class Table(Config):
    """Rows under named columns."""

    columns: list[str]
    rows: list[list[Cell]]

    @model_validator(mode="after")
    def _even(self) -> Self:
        odd = next((row for row in self.rows if len(row) != len(self.columns)), None)
        if odd is not None:
            raise ConfigError(f"a row of {len(odd)} cells in a table of {len(self.columns)} columns: {odd}")
        return self


class Report(Config):
    """What ``measure`` gives back.

    Attributes:
        method, config: who measured, with which settings. subject: name of the model or trace.
        numbers: name -> finite number; a thing that could not be measured is left out.
        tables: name -> table. notes: whatever else a reader needs, JSON values.
    """

    model_config = ConfigDict(allow_inf_nan=True)  # so that ``_finite`` says what to do about it

    schema_version: Literal[1] = 1
    method: str
    config: dict[str, Any] = Field(default_factory=dict)
    subject: str = ""
    numbers: dict[str, float] = Field(default_factory=dict)
    tables: dict[str, Table] = Field(default_factory=dict)
    notes: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _finite(self) -> Self:
        for name, number in self.numbers.items():
            if not math.isfinite(number):
                raise ConfigError(f"{self.method}: {name} is {number}; leave out what could not be measured")
        return self

    def save(self, path: str | Path) -> Path:
        """Write JSON. Raises SaveError when the file cannot be written."""
        return write_text(path, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            DataError: not a report.
        """
        try:
            return cls.parse(json.loads(Path(path).read_text(encoding="utf-8")), where=str(path))
        except (OSError, ValueError, RecursionError, ConfigError) as error:
            raise DataError(f"{path}: not a readable report ({error})") from None
