"""Write a model as a Moestro folder: config with base config and swaps, safetensors, tokenizer, receipt.

The tensors have the names of the open model: ``...mlp.router.weight [E, D]``, ``...mlp.bank.gate_up_proj [E, 2I, D]``.
Experts stay stacked, so one expert of one projection is one contiguous run of bytes and can be read alone.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import moestro
from moestro.core.errors import SaveError
from moestro.core.layer import mixture_layers
from moestro.models.atomic import atomic_folder
from moestro.models.auto import MODEL_TYPE, SCHEMA
from moestro.models.families import family
from moestro.models.source import MemorySource, TensorSource
from moestro.models.swap import state_of
from moestro.models.writer import write_source


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def save(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    receipt: Mapping[str, Any] | None = None,
) -> Path:
    """Save a model so that ``moestro.load`` and, after ``import moestro``, Transformers' auto classes reopen it.

    Args:
        model: a model that Moestro opened. folder: becomes complete or is left as it was.
        tokenizer: saved beside the weights; None copies the files of the folder the model came from.
        overwrite: replace a folder that Moestro wrote.
        receipt: further facts for ``receipt.json``.

    Raises:
        SaveError: the folder exists, cannot be written, or the model is not one that Moestro opened.
    """
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        _write(model, temporary, model.state_dict(), receipt or {})
        write_tokenizer(model, tokenizer, temporary)
    return Path(folder)


def save_into(model: Any, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> Path:
    """Save into a folder that may hold other files, replacing ours one by one, the config last.

    A folder of our own or one that is not there yet is written as a whole, as ``save`` does.
    """
    folder = Path(folder)
    tensors = model.state_dict() if state_dict is None else state_dict
    if not folder.is_dir() or not any(folder.iterdir()):
        with atomic_folder(folder) as temporary:
            _write(model, temporary, tensors, {})
        return folder
    beside = folder / ".moestro-save"
    with atomic_folder(beside, overwrite=True) as temporary:
        _write(model, temporary, tensors, {})
    files = sorted(beside.iterdir(), key=lambda file: file.name == "config.json")
    for file in files:
        file.replace(folder / file.name)
    # Last, so that at no moment there are no weights at all.
    for stale in {file.name for file in folder.glob("model*.safetensors*")} - {file.name for file in files}:
        (folder / stale).unlink()
    beside.rmdir()
    return folder


def _write(model: Any, folder: Path, tensors: Mapping[str, Tensor], receipt: Mapping[str, Any]) -> None:
    if not getattr(model, "is_moestro", False):
        raise SaveError(f"{type(model).__name__} was not opened by Moestro; use its own save_pretrained")
    source = weights(model, tensors)
    write_model(model, source, folder)
    write_json(folder / "receipt.json", {**receipt_values(model, source), **receipt})


def write_model(model: Any, source: TensorSource, folder: Path) -> None:
    """Write configs and weights. ``source`` holds the tensors of ``model``, which itself may be empty."""
    write_json(folder / "config.json", config_values(model))
    if model.can_generate():
        write_json(folder / "generation_config.json", json.loads(model.generation_config.to_json_string()))
    write_source(source, folder)


def weights(model: Any, tensors: Mapping[str, Tensor]) -> MemorySource:
    """The tensors to write: those of ``tensors`` that are no tied copies and that Transformers would write."""
    left_out = unsaved(model)
    return MemorySource({name: value.detach().cpu() for name, value in tensors.items() if name not in left_out})


def unsaved(model: Any) -> set[str]:
    """Names in a model's state dict that are not written: tied copies, and what Transformers leaves out."""
    return {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}


def config_values(model: Any) -> dict[str, Any]:
    """What ``config.json`` of a Moestro folder says."""
    return {
        "model_type": MODEL_TYPE,
        "schema": SCHEMA,
        "moestro_version": moestro.__version__,
        "base_config": base_config_values(model),
        "swaps": [entry.model_dump(mode="json") for entry in state_of(model).swaps],
    }


def base_config_values(model: Any) -> dict[str, Any]:
    """The config of the Transformers model underneath, with its architecture and the type of its parameters."""
    values: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    values["architectures"] = [type(model).__name__]
    values["dtype"] = str(model.dtype).removeprefix("torch.")
    return {name: value for name, value in values.items() if name not in ("_name_or_path", "name_or_path")}


def receipt_values(model: Any, source: TensorSource) -> dict[str, Any]:
    """What ``receipt.json`` says: where the model came from, what stands in it, how much was written."""
    state = state_of(model)
    return {
        "moestro_version": moestro.__version__,
        "family": family(model.config).name,
        "tensors": len(source.keys()),
        "bytes": sum(map(source.nbytes, source.keys())),
        "mixtures": {site: layer.bank.num_experts for site, layer in mixture_layers(model).items()},
        "swaps": [entry.method for entry in state.swaps],
        "loss_weights": dict(state.loss_weights),
        **state.facts,
    }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a small JSON file."""
    path.write_text(json.dumps(values, indent=1, sort_keys=False) + "\n", encoding="utf-8")


def write_tokenizer(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer, or copy the files of the folder the model came from."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return
    origin = state_of(model).folder
    if origin is None:
        return
    for name in TOKENIZER_FILES:
        source = origin / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
