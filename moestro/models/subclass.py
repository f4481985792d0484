"""The class of an opened model: the Transformers class with one method of its own, ``save_pretrained``.

A plain ``save_pretrained`` would write a config that says nothing of the swapped modules, and the folder would reopen
with fresh feed-forwards in their place, in silence.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from moestro.core.errors import SaveError


_CLASSES: dict[type[Any], type[Any]] = {}


def moestro_class(base: type[Any]) -> type[Any]:
    """The subclass of ``base`` whose ``save_pretrained`` writes a Moestro folder; the same one at every call.

    It carries the name of ``base``: Transformers looks classes up by name to tell what a model is for.
    """
    if getattr(base, "is_moestro", False):
        return base
    if base not in _CLASSES:
        body = {
            "__module__": __name__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "is_moestro": True,
            "save_pretrained": save_pretrained,
        }
        _CLASSES[base] = type(base.__name__, (base,), body)
    return _CLASSES[base]


def save_pretrained(
    self: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Write a Moestro folder, see ``moestro.save``; a model with PEFT adapters attached writes the adapters only.

    Unlike ``moestro.save`` it writes into a folder that holds other files, as training loops expect.

    Raises:
        SaveError: see ``moestro.save``; ``push_to_hub`` was asked for.
    """
    from moestro.models.save import save_into

    if getattr(self, "_hf_peft_config_loaded", False):
        super(moestro_class(type(self)), self).save_pretrained(
            save_directory, is_main_process, state_dict, push_to_hub, **options
        )
        return
    if push_to_hub:
        raise SaveError("push_to_hub is not done while saving; save to a folder and upload it with `hf upload`")
    if is_main_process:
        save_into(self, save_directory, state_dict=state_dict)
