"""Moestro: one toolkit for the whole life of mixture-of-experts models.

``import moestro`` is light: PyTorch and Transformers are imported when a name that needs them is first used.
"""

import importlib
from typing import Any

from moestro.core.version import VERSION as __version__
from moestro.models.auto import install as _install


# Public name -> the module that defines it.
_PUBLIC = {
    "session": "moestro.core.session",
    "Edit": "moestro.core.session",
    "checkpoint": "moestro.core.context",
    "method": "moestro.core.registry",
    "method_ids": "moestro.core.registry",
    "load": "moestro.models.load",
    "save": "moestro.models.save",
    "export": "moestro.models.export",
    "apply": "moestro.surgery",
    "trace": "moestro.core.trace",
    "MoELayer": "moestro.core.layer",
    "Router": "moestro.core.router",
    "Routing": "moestro.core.routing",
    "Scores": "moestro.core.routing",
    "MoestroError": "moestro.core.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moestro' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_install()
