"""What Transformers' auto classes get for a Moestro folder: a config, and openers in the place of model classes."""

import functools
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from moestro.core.errors import LoadError
from moestro.models.auto import MODEL_TYPE


# Options of from_pretrained that concern the hub, memory or formats Moestro does not use: taken and without effect.
_WITHOUT_EFFECT = {
    *("adapter_kwargs", "cache_dir", "code_revision", "force_download", "local_files_only", "low_cpu_mem_usage"),
    *("max_memory", "offload_buffers", "offload_folder", "offload_state_dict", "proxies", "revision", "subfolder"),
    *("token", "trust_remote_code", "use_safetensors", "variant", "weights_only", "_from_auto", "_commit_hash"),
}


class MoestroConfig(PreTrainedConfig):  # type: ignore[misc]
    """The config of a Moestro folder. What it does not hold itself is read from the config of the model underneath.

    Attributes:
        base_config: values of that config. swaps: what was exchanged.
        overrides: values that were set on this object afterwards; the model is opened with them.
    """

    model_type = MODEL_TYPE

    def __init__(
        self, base_config: dict[str, Any] | None = None, swaps: list[Any] | None = None, **values: Any
    ) -> None:
        super().__init__(**values)
        self.base_config = dict(base_config or {})
        self.swaps = list(swaps or [])
        object.__setattr__(self, "overrides", {})

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("base_config", {})
        if name in base:
            return base[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        overrides = self.__dict__.get("overrides")
        if overrides is not None and (name in self.base_config or name == "num_labels"):
            overrides[name] = value
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``config.json`` has them."""
        values: dict[str, Any] = super().to_dict()
        values.pop("overrides", None)
        return values


@functools.cache
def opener(task: str) -> type[Any]:
    """A stand-in for a model class whose ``from_pretrained`` opens a Moestro folder for ``task``."""

    def from_pretrained(cls: type[Any], /, ref: str | Path, *args: Any, config: Any = None, **options: Any) -> Any:
        from moestro.models.load import load_for

        overrides = dict(getattr(config, "overrides", {}))
        # Transformers moves this option into the config before it calls here.
        attention = options.pop("attn_implementation", None) or getattr(config, "_attn_implementation", None)
        if attention is not None:
            overrides["attn_implementation"] = attention
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None) or "auto"
        device = _one_device(options.pop("device_map", None))
        unknown = [name for name, value in options.items() if name not in _WITHOUT_EFFECT and value is not None]
        if args or unknown:
            raise LoadError(f"{ref}: a Moestro folder cannot be opened with the option {(unknown or ['*args'])[0]!r}")
        return load_for(ref, task, dtype=dtype, device=device, overrides=overrides)

    def _from_config(cls: type[Any], /, config: Any, **options: Any) -> Any:
        raise LoadError("a Moestro model is opened from its folder with from_pretrained, not made from a config alone")

    name = "Moestro" + "".join(word.capitalize() for word in task.replace("-", " ").split())
    body = {
        "__module__": __name__,
        "config_class": MoestroConfig,
        "from_pretrained": classmethod(from_pretrained),
        "_from_config": classmethod(_from_config),
    }
    return type(name, (), body)


def _one_device(device_map: Any) -> Any:
    """The device of a ``device_map`` that names one; None leaves the model on the CPU."""
    if device_map is None or device_map == "auto":
        return None
    if isinstance(device_map, dict):
        places = set(map(str, device_map.values()))
        if len(places) != 1:
            raise LoadError(f"device_map spreads the model over {sorted(places)}; Moestro opens a model on one device")
        return next(iter(device_map.values()))
    return device_map
