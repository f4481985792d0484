"""After ``import moestro``, Transformers' auto classes open Moestro folders.

Neither torch nor transformers is imported for that: when Transformers loads its table of configs or its table of
models, now or later, the entries are added. ``sys.meta_path`` gets one finder that only watches for those two modules.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


MODEL_TYPE = "moestro"
SCHEMA = 1
"""Version of what ``config.json`` of a Moestro folder says."""

TASKS = {
    "base": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}
"""What a model can be opened for, and the Transformers auto class that names the architecture."""

CONFIGS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"


def register_configs(module: ModuleType) -> None:
    """Make ``AutoConfig`` know ``model_type: moestro``."""
    from moestro.models.hf import MoestroConfig

    module.CONFIG_MAPPING.register(MoestroConfig.model_type, MoestroConfig, exist_ok=True)


def register_models(module: ModuleType) -> None:
    """Make the auto classes open Moestro folders with ``moestro.load``."""
    from moestro.models.hf import MoestroConfig, opener

    for task, name in TASKS.items():
        getattr(module, name).register(MoestroConfig, opener(task), exist_ok=True)


_WATCHED: dict[str, Callable[[ModuleType], None]] = {CONFIGS: register_configs, MODELS: register_models}


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself: hands the two modules to the finders after it and registers once they are loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        register = _WATCHED.get(name)
        if register is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, register)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Another loader, with something to do once a module is loaded."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.then = then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def install() -> None:
    """Register with what is loaded already and watch for the rest; once, however often it is called."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    for name, register in _WATCHED.items():
        module = sys.modules.get(name)
        if module is not None:
            register(module)
