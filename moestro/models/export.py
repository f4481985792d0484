"""Write a model as a stock Transformers architecture where one can express it, and prove it by its logits.

A mixture family exports to itself, with as many experts, as wide, as its layers now have. A dense family whose
feed-forwards became mixtures exports to the mixture family with the same attention (``TO_MIXTURE``). Everything else is
refused in one line that says what no stock architecture has. Layers with different numbers of experts are filled up
where the router can switch the fillers off (``masked.py``).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.core.errors import LoadError, SaveError
from moestro.core.layer import MoELayer
from moestro.models.atomic import atomic_folder
from moestro.models.headers import TensorInfo
from moestro.models.keymap import Entry, Mixture, Shape, entries
from moestro.models.masked import uniform
from moestro.models.save import write_json, write_tokenizer
from moestro.models.sites import stacks
from moestro.models.skeleton import config_from, empty_model
from moestro.models.source import DTYPE_CODES, TableSource
from moestro.models.spec import FamilySpec, Layout
from moestro.models.stock import Target, find_target
from moestro.models.swap import state_of
from moestro.models.weights import split
from moestro.models.writer import write_source


RTOL = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""Largest difference of logits over their largest size: rounding of sums in another order, layer after layer."""


def export(
    model: Any, folder: str | Path, *, tokenizer: Any = None, overwrite: bool = False, check: bool = True
) -> Path:
    """Write ``model`` so that plain Transformers opens it, without Moestro.

    Args:
        model: a model that Moestro opened.
        folder: becomes complete or is left as it was. tokenizer, overwrite: as in ``moestro.save``.
        check: reopen the result with Transformers alone and compare logits before it is kept; needs memory for a second
            model.

    Raises:
        SaveError: no stock architecture expresses the model (the message says what stands in the way), the logits
            differ, or the folder cannot be written.
    """
    with uniform(model):
        target = find_target(model)
        source = StockSource(model, _map(model, target))
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        write_json(temporary / "config.json", target.values)
        if model.can_generate():
            write_json(temporary / "generation_config.json", json.loads(model.generation_config.to_json_string()))
        write_source(source, temporary)
        write_tokenizer(model, tokenizer, temporary)
        if check:
            check_logits(model, target.cls, temporary)
    return Path(folder)


def _map(model: Any, target: Target) -> dict[str, Entry]:
    """The model's tensors under the names of the target's checkpoints, held against the target's own shapes."""
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    shapes: dict[str, Shape] = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in left_out
    }
    where = _mixtures(model, target.spec)
    if target.spec.moe is None:
        return entries(shapes, where, None)
    stock = entries(shapes, where, target.spec.moe.stock)
    _check_shapes(stock, target)
    return entries(shapes, where, _layout(target.spec, state_of(model).facts.get("layout")))


def _mixtures(model: Any, spec: FamilySpec) -> list[Mixture]:
    """The mixture layers that stand in the model now."""
    found = []
    for place in stacks(model):
        for path, module in place.module.named_modules():
            if isinstance(module, MoELayer):
                layer = next(int(part) for part in path.split(".") if part.isdigit())
                found.append(Mixture(place.within(path), place.path, layer, module.bank.num_experts))
    return found


def _layout(spec: FamilySpec, name: Any) -> Layout:
    """The packing the model was read from, else the first of the family, which is the hub's."""
    assert spec.moe is not None
    return next((layout for layout in spec.moe.layouts if layout.name == name), spec.moe.layouts[0])


def _check_shapes(stock: Mapping[str, Entry], target: Target) -> None:
    """Raise SaveError unless the target class has exactly these tensors."""
    try:
        plain = empty_model(target.cls, config_from(target.values, "export"))
    except LoadError as error:
        raise SaveError(f"cannot export to {target.spec.name}: {error}") from None
    wanted = {n: tuple(t.shape) for n, t in plain.state_dict().items() if n not in plain.all_tied_weights_keys}
    ours = {piece.key: piece.shape for entry in stock.values() for piece in entry.pieces}
    for name in (*wanted, *ours):
        if wanted.get(name) != ours.get(name):
            raise SaveError(
                f"cannot export to {target.spec.name}: it has {_shape(wanted.get(name))} for {name}, "
                f"the model has {_shape(ours.get(name))}; use moestro.save"
            )


def _shape(shape: Shape | None) -> str:
    return "no tensor" if shape is None else f"shape {list(shape)}"


class StockSource(TableSource):
    """The tensors of an open model under other names and in other pieces, cut when they are asked for."""

    def __init__(self, model: Any, wanted: Mapping[str, Entry]) -> None:
        self.name = type(model).__name__
        self.metadata: Mapping[str, str] = {}
        self._tensors: dict[str, Tensor] = dict(model.state_dict())
        self._pieces: dict[str, tuple[Entry, int]] = {}
        self._infos = {}
        for entry in wanted.values():
            dtype = self._tensors[entry.name].dtype
            for index, piece in enumerate(entry.pieces):
                self._pieces[piece.key] = (entry, index)
                nbytes = math.prod(piece.shape) * dtype.itemsize
                self._infos[piece.key] = TensorInfo(piece.key, DTYPE_CODES[dtype], piece.shape, 0, nbytes)

    def get(self, key: str) -> Tensor:
        """See TensorSource."""
        entry, index = self._pieces[key]
        return split(self._tensors[entry.name], entry.chain)[index].detach().cpu().contiguous()

    def close(self) -> None:
        """See TensorSource."""


@torch.no_grad()
def check_logits(model: Any, cls: type[Any], folder: Path) -> float:
    """Open ``folder`` with plain Transformers and compare its first output with ``model``'s.

    Returns:
        The largest difference.

    Raises:
        SaveError: it exceeds ``RTOL`` of the type times the largest value.
    """
    stock = _open_plain(cls, folder, model.dtype).to(model.device).eval()
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2, 9), generator=generator).to(model.device)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    try:
        ours, theirs = model(**inputs)[0].float(), stock(**inputs)[0].float()
    finally:
        model.train(training)
    worst: float = (ours - theirs).abs().max().item()
    allowed = RTOL.get(model.dtype, 1e-5) * max(1.0, ours.abs().max().item())
    if not worst <= allowed:  # also when either is NaN
        raise SaveError(
            f"the exported {cls.__name__} differs from the model by {worst:.3g} in its logits, allowed {allowed:.3g}; "
            "nothing was written"
        )
    return worst


def _open_plain(cls: type[Any], folder: Path, dtype: torch.dtype) -> Any:
    """``cls.from_pretrained`` without its progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # "eager" is Transformers' reference; its grouped product refuses some widths in half precision.
        return cls.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    finally:
        if shown:
            logging.enable_progress_bar()
