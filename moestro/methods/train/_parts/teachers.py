"""The teacher of a model that learns from one."""

from collections.abc import Mapping

from torch import nn

from moestro.core.errors import ConfigError


def only(teachers: Mapping[str, nn.Module]) -> nn.Module:
    """The one teacher of a student.

    Raises:
        ConfigError: none, or several.
    """
    if len(teachers) != 1:
        given = ", ".join(teachers) or "none"
        raise ConfigError(f"a student has one teacher, given: {given}; write teachers: {{teacher: FOLDER}}")
    return next(iter(teachers.values()))
