"""The families Moestro knows: one file each, found by walking this folder."""

import importlib
import pkgutil
from functools import cache
from typing import Any

from moestro.core.errors import FamilyError
from moestro.models.spec import FamilySpec, Get


@cache
def families() -> dict[str, FamilySpec]:
    """Every known ``model_type`` and its spec, in alphabetical order of the files."""
    found: dict[str, FamilySpec] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name.startswith("_"):
            continue
        spec = importlib.import_module(f"{__name__}.{info.name}").SPEC
        for model_type in spec.model_types:
            if model_type in found:
                raise FamilyError(f"model type {model_type!r} is claimed by {found[model_type].name} and {spec.name}")
            found[model_type] = spec
    return found


def family(config: Any) -> FamilySpec:
    """The spec of a model.

    Args:
        config: a Transformers config, the mapping of a ``config.json``, or a model type.

    Raises:
        FamilyError: no file here claims the model type.
    """
    model_type = config if isinstance(config, str) else Get(config)("model_type", default=None)
    spec = families().get(model_type) if isinstance(model_type, str) else None
    if spec is None:
        known = ", ".join(sorted(families()))
        raise FamilyError(f"model_type {model_type!r} is not a family Moestro knows; it knows {known}")
    return spec
