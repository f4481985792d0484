"""Pack the experts of a checkpoint: one layer is read, packed and written before the next one is looked at.

Each packed layer is a file of its own, all other tensors follow unchanged, and the index comes last. A rounding that
calibrates runs the model block by block: a block's weights are in memory during its turn only.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.errors import PlanError
from moestro.core.layer import MoELayer
from moestro.core.ledger import Ledger
from moestro.core.packed import PackedFFN
from moestro.core.plan import BitPlan
from moestro.models.atomic import atomic_folder, check_room
from moestro.models.load import load
from moestro.models.save import config_values, receipt_values, unsaved, write_json, write_tokenizer
from moestro.models.sites import sites
from moestro.models.skeleton import put
from moestro.models.source import MemorySource
from moestro.models.swap import stand, state_of
from moestro.models.writer import SHARD_BYTES, write_file, write_index
from moestro.surgery.bits import BitWork, check_bits, check_finite, expect, pack_layer, sites_of, touch
from moestro.surgery.bits_receipt import add_parity, bytes_by_class, compared, receipt_of
from moestro.surgery.disk import Folder
from moestro.surgery.lazy import LazySource
from moestro.surgery.opened import OpenModel
from moestro.surgery.parity import Choices, answers, call_of
from moestro.surgery.receipt import Calib, count_parameters
from moestro.surgery.record import record
from moestro.surgery.rounding import Rounding, rounding_of


def apply_bits_folder(
    ref: str | Path, plan: BitPlan, out: str | Path, *, calib: Calib | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write a checkpoint with packed experts; peak memory is that of the largest layer, whatever the model's size.

    Parity figures open both models, so ``calib`` costs their memory unless the rounding needs it anyway.

    Args:
        ref: the float checkpoint. out: the folder to write; it becomes complete or is left as it was.

    Returns:
        The receipt; ``receipt.json`` holds it too.

    Raises:
        PlanError: the plan does not fit, or weights are NaN or infinite. SaveError: the disk is too small. Both before
            the first layer is packed.
    """
    folder = Folder(ref)
    opened = OpenModel(folder.model, folder.name, folder.read)
    works = check_bits(plan, opened)
    rounding = rounding_of(plan)
    if rounding.calibrates and not calib:
        raise PlanError(
            f"the rounding of {plan.method} looks at data; give calib=<batches>, or --data on the command line"
        )
    _check_room(folder, works, Path(out))
    for work in works:
        check_finite(work, opened)
        folder.release()
    sizes, count = bytes_by_class(folder.model), count_parameters(folder.model)
    with atomic_folder(out, overwrite=overwrite) as temporary:
        writer = _Writer(folder, temporary)
        ledger = Ledger(f"{plan.method}: surgery.apply")
        for work in works:
            expect(ledger, work)
        for work, layer in _packed(folder, opened, works, rounding, calib):
            touch(ledger, work, layer)
            writer.layer(work, layer)
        record(folder.model, works)
        source = writer.rest()
        write_json(temporary / "config.json", config_values(folder.model))
        _generation_config(folder, temporary)
        receipt = receipt_of(folder.model, plan, works, ledger, sizes, count)
        if calib is not None:
            before, after = Choices(), Choices()
            first = answers(load(ref), compared(calib), before)
            add_parity(receipt, (first, before), (answers(load(temporary), compared(calib), after), after))
        state_of(folder.model).facts.setdefault("surgery", []).append(receipt)
        write_json(temporary / "receipt.json", receipt_values(folder.model, source))
        write_tokenizer(folder.model, None, temporary)
    return receipt


def _generation_config(folder: Folder, temporary: Path) -> None:
    import json

    if folder.model.can_generate():
        values = json.loads(folder.model.generation_config.to_json_string())
        write_json(temporary / "generation_config.json", values)


def _packed(
    folder: Folder, opened: OpenModel, works: list[BitWork], rounding: Rounding, calib: Calib | None
) -> Iterable[tuple[BitWork, MoELayer]]:
    """Every layer, packed; it stands without storage in the folder's model when the next one is asked for."""
    shared = state_of(folder.model).shared
    if not rounding.calibrates:
        for work in works:
            layer = pack_layer(work, opened, rounding, None, shared)
            yield work, layer
            stand(folder.model, work.place.site, _emptied(layer))
            del opened.places[work.layer]
            folder.release()
        return
    by_layer = {work.layer: work for work in works}
    turn = _Turn(folder)
    batches = [call_of(batch, torch.device("cpu")) for batch in calib or ()]
    for index, seen in rounding.walk(folder.model, batches, sites_of(works), turn.enter, turn.leave):
        work = by_layer[index]
        layer = pack_layer(work, opened, rounding, seen, shared).train(False)
        yield work, layer
        stand(folder.model, work.place.site, layer)
        del opened.places[index]
    turn.end()


def _emptied(layer: MoELayer) -> MoELayer:
    layer.bank.to("meta")
    return layer.train(False)


class _Turn:
    """Brings a block's weights for its turn and drops them after it; what is in no block stays."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.paths = {id(site.module): site.path for site in sites(folder.model, "block")}
        inside = tuple(f"{path}." for path in self.paths.values())
        self.around = [name for name in folder.entries if not name.startswith(inside)]
        self._bring(self.around)
        folder.model.tie_weights(recompute_mapping=False)

    def _bring(self, names: Iterable[str]) -> None:
        model = self.folder.model
        for name in names:
            owner, _, leaf = name.rpartition(".")
            kind = getattr(model.get_submodule(owner), leaf).dtype
            put(model, name, self.folder.tensor(name).to(kind, copy=True))

    def enter(self, index: int, block: nn.Module) -> None:
        """Fill the block."""
        start = f"{self.paths[id(block)]}."
        self._bring(name for name in self.folder.entries if name.startswith(start))
        self.folder.release()

    def leave(self, index: int, block: nn.Module) -> None:
        """Empty the block: parameters, and what is packed."""
        self._empty(block)
        for module in block.modules():
            if isinstance(module, PackedFFN):
                module.to("meta")

    def end(self) -> None:
        """Empty what is in no block."""
        self._empty(self.folder.model)

    def _empty(self, module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters()):
            put(module, name, parameter.detach().to("meta"))


class _Writer:
    """Writes packed layers as they come, then everything else.

    Args:
        folder: the old checkpoint. target: where to write.
    """

    def __init__(self, folder: Folder, target: Path) -> None:
        self.folder, self.target = folder, target
        self.where: dict[str, str] = {}

    def layer(self, work: BitWork, layer: MoELayer) -> None:
        """The packed matrices of one layer as a file."""
        start = f"{work.place.shape.site}.bank."
        tensors = {f"{start}{name}": buffer.cpu() for name, buffer in layer.bank.named_buffers()}
        file = f"model-experts-{work.layer:05}.safetensors"
        write_file(MemorySource(tensors), self.target / file, list(tensors))
        self.where |= dict.fromkeys(tensors, file)

    def rest(self) -> LazySource:
        """Every other tensor of the model as it is on disk, and the index.

        Returns:
            All tensors of the model by name; those that are written already cannot be fetched.
        """
        model = self.folder.model
        left_out = unsaved(model)
        tensors: Mapping[str, Tensor] = {k: t for k, t in model.state_dict().items() if k not in left_out}
        source = LazySource(self.folder.name, tensors, self._fetch)
        shards: list[list[str]] = [[]]
        filled = 0
        for name in (name for name in tensors if name not in self.where):
            if shards[-1] and filled + source.nbytes(name) > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += source.nbytes(name)
        for number, names in enumerate(shards, 1):
            file = f"model-rest-{number:05}.safetensors"
            write_file(source, self.target / file, names, workers=1)
            self.where |= dict.fromkeys(names, file)
        write_index(self.target, self.where, sum(map(source.nbytes, tensors)))
        return source

    def _fetch(self, name: str) -> Tensor:
        return self.folder.tensor(name)


def _check_room(folder: Folder, works: list[BitWork], out: Path) -> None:
    """Raise SaveError where the packed model does not fit on the disk."""
    packed = {
        name
        for work in works
        for name in folder.entries
        if name in (f"{work.place.shape.site}.bank.{leaf}" for leaf in ("gate_up_proj", "up_proj", "down_proj"))
    }
    needed = sum(work.nbytes for work in works)
    needed += sum(folder.nbytes(name) for name in folder.entries if name not in packed)
    check_room(out, needed)
