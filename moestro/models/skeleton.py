"""Models without weights: build the Transformers class with parameters on the meta device, then fill it.

Only parameters are without storage. Buffers are computed by the constructors as always, so rotary frequencies,
position ids and embedding scales are there whether or not a checkpoint would hold them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moestro.core.bank import unfilled_banks
from moestro.core.errors import LoadError
from moestro.models.auto import TASKS
from moestro.models.headers import shown
from moestro.models.keymap import Entry
from moestro.models.weights import join, split


POSITIVE = (
    *("hidden_size", "d_model", "vocab_size", "num_attention_heads", "num_heads", "num_key_value_heads"),
    *("head_dim", "d_kv", "num_hidden_layers", "num_layers"),
)
"""Values of a config that divide others, or that no tensor can have as a size if they are under 1."""


class Tensors(Protocol):
    """What is needed of a checkpoint to fill a model from it."""

    def get(self, key: str) -> Tensor:
        """One tensor."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter that a module registers loses its storage and keeps its shape and type.

    New banks do not fill their matrices first: that would bring a whole layer's experts into memory.
    """
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        with unfilled_banks():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def config_from(values: Mapping[str, Any], where: str) -> Any:
    """The Transformers config object of a ``config.json``.

    Raises:
        LoadError: Transformers refuses a value; its first line is in the message.
    """
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise LoadError(f"{where}: Transformers refuses this config: {reason}") from None
    for name in POSITIVE:
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 1:
            raise LoadError(f"{where}: {name}={value}; must be at least 1")
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise LoadError(f"{where}: num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    return config


def known_values(model_type: str) -> frozenset[str]:
    """Names that a config of this type gives a meaning to; Transformers takes any other without a word."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    return frozenset(
        {*cls().to_dict(), *getattr(cls, "attribute_map", {}), "decoder_start_token_id", "attn_implementation"}
    )


def model_class(config: Any, task: str | None) -> type[Any]:
    """The Transformers class of a config: for a task, else the one its ``architectures`` name.

    Raises:
        LoadError: no such task, no class of the family for it, or an architecture that is none of the family's.
    """
    import transformers

    family = config.model_type
    if task is None and config.architectures:
        if not isinstance(config.architectures, list):
            raise LoadError(f"config.json: architectures={shown(config.architectures)} must be a list of class names")
        name = config.architectures[0]
        found = getattr(transformers, name, None) if re.fullmatch(r"\w+", str(name)) else None
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise LoadError(f"config.json: architecture {name!r} is not a model class of Transformers")
        if getattr(found, "config_class", None) is not type(config):
            raise LoadError(f"config.json: architecture {name!r} does not belong to model_type {family!r}")
        return found
    tasks = [task] if task else ["seq2seq-lm" if config.is_encoder_decoder else "causal-lm", "base"]
    for word in tasks:
        if word not in TASKS:
            raise LoadError(f"no task {word!r}; known: {', '.join(TASKS)}")
        mapping = getattr(transformers, TASKS[word])._model_mapping
        if type(config) in mapping:
            entry = mapping[type(config)]
            chosen: type[Any] = entry[0] if isinstance(entry, tuple) else entry
            return chosen
    raise LoadError(f"Transformers has no {family} class for {tasks[0]}; leave the task out to open what was saved")


def empty_model(cls: type[Any], config: Any) -> Any:
    """An instance of ``cls`` in evaluation mode whose parameters have shapes only. Errors as ``construct``."""
    with parameters_on_meta():
        return construct(cls, config, "config.json").eval()


def construct(cls: type[Any], config: Any, where: str) -> Any:
    """An instance of ``cls``.

    Raises:
        LoadError: its constructor fails, since Transformers checks most values of a config only there.
    """
    try:
        return cls(config)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise LoadError(f"{where}: {cls.__name__} cannot be built from these values ({reason})") from None


def fill(
    model: nn.Module,
    wanted: Iterable[Entry],
    source: Tensors,
    *,
    dtype: torch.dtype,
    keep: re.Pattern[str] | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Read every tensor once and put it where it belongs.

    Args:
        wanted: checked entries. dtype: of floating-point parameters; buffers keep the type their module gave them.
        keep: names of parameters that stay in float32.
    """
    for entry in wanted:
        kinds = [_type_of(model, target, dtype, keep) for target in entry.targets]
        whole = _read(entry, source, kinds[0]).to(device=device)
        for target, part, kind in zip(entry.targets, split(whole, entry.out), kinds, strict=True):
            put(model, target, part.contiguous().to(kind))


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make ``tensor`` the parameter or buffer ``name`` of a model, without a copy."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return
    old = module._parameters[leaf]
    assert old is not None
    module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)


def _type_of(model: nn.Module, name: str, dtype: torch.dtype, keep: re.Pattern[str] | None) -> torch.dtype:
    """The type a tensor of the model gets; buffers keep the one their module gave them."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    buffer = module._buffers.get(leaf)
    if buffer is not None:
        return buffer.dtype
    param = module._parameters[leaf]
    assert param is not None
    if not param.is_floating_point():
        return param.dtype
    return torch.float32 if keep is not None and keep.search(name) else dtype


def _read(entry: Entry, source: Tensors, dtype: torch.dtype) -> Tensor:
    if not entry.chain:
        return source.get(entry.pieces[0].key).to(dtype)
    return join((source.get(piece.key) for piece in entry.pieces), entry.shape, entry.chain, dtype)


def float32_names(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Parameters that Transformers keeps in float32 when the rest has type ``dtype``."""
    names = set()
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not names:
        return None
    return re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in sorted(names)))


def materialise(model: Any, names: Iterable[str], dtype: torch.dtype) -> None:
    """Give storage to parameters that no checkpoint holds (a new head) and initialise them as the family does."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    for owner in owners:
        module = model.get_submodule(owner)
        for name, param in module.named_parameters(recurse=False):
            if param.is_meta:
                module._parameters[name] = nn.Parameter(torch.zeros(param.shape, dtype=dtype))
        module._is_hf_initialized = False
        model._init_weights(module)


def check_filled(model: nn.Module) -> None:
    """Raise LoadError if any tensor of the model is still without storage."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise LoadError(f"{name} was never filled; its module must register it before the weights are read")
