"""Writing a packed model: one layer of the checkpoint is read, rounded and written before the next one is looked at."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from moestro.core.errors import ConfigError, LoadError, SaveError
from moestro.core.ledger import Ledger
from moestro.engine import pack_ternary
from moestro.engine.dialect import VECTOR
from moestro.engine.layout import Bytes, matrix_bytes, pack, unpack
from moestro.engine.packed import EXPERTS, FORMAT, INDEX, OLDEST, PAGE, RAW, RESIDENT, VERSION, Packed, Piece
from moestro.engine.ternary import CODED


if TYPE_CHECKING:
    from moestro.engine.pack_bank import BankReader
    from moestro.engine.pack_model import Contents, Entry

BITS: Final = (4, 8, 16, 32)
Progress = Callable[[str], None]


def pack_model(
    ref: str | Path,
    out: str | Path,
    *,
    bits: int = 8,
    resident_bits: int | None = None,
    exact: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a packed model; peak memory is that of the largest layer, whatever the model's size.

    Args:
        ref: a folder, hub id, GGUF file, or ``wheel:name``. out: the folder; it becomes complete or is left as it was.
        bits: 4, 8, 16 or 32 for matrices. Experts that are packed already keep their codes where a layout holds them.
        resident_bits: for what every token needs, ``bits`` when None; routers and norms stay float32.
        exact: refuse experts that are packed already and whose codes or scales no layout holds as they are.
        progress: is told a line now and then.

    Returns:
        The receipt; ``receipt.json`` holds it too.

    Raises:
        LoadError: the checkpoint is damaged, holds NaN, is of a form that cannot be packed, or not ``exact``.
        SaveError: the disk is too small or fails. ConfigError: other bits.
    """
    from moestro.engine.pack_model import contents
    from moestro.models.atomic import atomic_folder
    from moestro.surgery.disk import Folder
    from moestro.surgery.opened import OpenModel

    tell = progress or (lambda text: None)
    for given in (bits, bits if resident_bits is None else resident_bits):
        if given not in BITS:
            raise ConfigError(f"bits={given}; matrices are packed in {', '.join(map(str, BITS))} bits")
    folder = Folder(ref)
    found = contents(folder, bits, bits if resident_bits is None else resident_bits)
    if exact:
        _refuse_rounding(folder.name, found)
    work = _Work(folder, found)
    work.check_room(Path(out))
    found.model = found.model.model_copy(
        update={"hash": OpenModel(folder.model, folder.name, folder.read).fingerprint()}
    )
    with atomic_folder(out, overwrite=overwrite) as temporary:
        tell(f"{RESIDENT}: {len(found.tensors)} tensors, {work.resident_bytes:,} bytes")
        work.write_resident(temporary)
        work.write_experts(temporary, tell)
        if exact and work.scales:
            raise LoadError(
                f"{folder.name}: scales of packed experts change by up to {work.scales:.2g} of themselves when they "
                "become float16; compress with float16 scales, or pack without --exact"
            )
        receipt = work.receipt(bits)
        work.write_rest(temporary, receipt)
        Packed.open(temporary)
    return receipt


class _File:
    """A file that is written once from front to back and hashed on the way."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: Bytes | bytes) -> None:
        """Append, padded with zeros to a whole page."""
        for part in (memoryview(data).cast("B"), bytes(-len(data) % PAGE)):
            self._file.write(part)
            self._hash.update(part)
            self.size += len(part)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def facts(self) -> dict[str, Any]:
        """What ``pack.json`` says of the file."""
        return {"size": self.size, "sha256": self._hash.hexdigest()}


class _Work:
    """One model on its way."""

    def __init__(self, folder: Any, found: "Contents") -> None:
        self.folder, self.found = folder, found
        self.ledger = Ledger("pack")
        self.tensors: dict[str, Any] = {}
        self.files: dict[str, Any] = {}
        self.experts: dict[str, Any] = {}
        self.errors = {"resident": 0.0, "experts": 0.0}
        self._lay_out()

    def _lay_out(self) -> None:
        """Offsets of the resident file, and how large both files become, before anything is written."""
        offset = 0
        for name, entry in self.found.tensors.items():
            nbytes = _nbytes(entry)
            shape = list(entry.shape)
            self.tensors[name] = {"file": RESIDENT, "offset": offset, "nbytes": nbytes, "layout": entry.layout,
                                  "shape": shape}  # fmt: skip
            offset += _whole(nbytes, PAGE)
        self.resident_bytes = offset
        # Of coded slabs this is what they take at most; how large they are shows when they are written.
        self.expert_bytes = sum(
            _whole(sum(_whole(part.nbytes, 64) for part in bank.parts(expert).values()), PAGE)
            for bank in self.found.banks.values()
            for expert in range(bank.num)
        )

    def check_room(self, out: Path) -> None:
        """Raise SaveError where the packed model does not fit on the disk."""
        there = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
        needed, free = self.resident_bytes + self.expert_bytes, shutil.disk_usage(there).free
        if needed > free:
            raise SaveError(
                f"{out}: the packed model takes {needed:,} bytes, {free:,} are free; name a place on a larger disk or "
                "fewer bits"
            )

    def write_resident(self, folder: Path) -> None:
        """Every tensor that all tokens need."""
        with _File(folder / RESIDENT) as file:
            for name, entry in self.found.tensors.items():
                file.write(self._resident(name, entry))
        self.files[RESIDENT] = file.facts()
        self.folder.release()

    def _resident(self, name: str, entry: "Entry") -> Bytes:
        """Bytes of one tensor; how far it was rounded goes into the receipt."""
        from moestro.engine.pack_bank import Rows

        tensor = entry.fetch().detach()
        if entry.layout == VECTOR:
            return np.ascontiguousarray(tensor.float().numpy()).view(np.uint8)
        if entry.layout in RAW:
            return _raw_bytes(tensor)
        try:
            data = pack(Rows(tensor), entry.layout)
        except ConfigError as error:
            raise LoadError(f"{self.folder.name}: {name}: {error}") from None
        head = Rows(tensor)[slice(0, 256)]
        far = _error(head, unpack(data, entry.layout, *entry.shape)[: len(head)])
        self.errors["resident"] = max(far, self.errors["resident"])
        return data

    def write_experts(self, folder: Path, tell: Progress) -> None:
        """All slabs, layer by layer."""
        for layer, bank in self.found.banks.items():
            for expert in range(bank.num):
                for name in bank.projections:
                    self.ledger.expect(layer, expert, name)
        with _File(folder / EXPERTS) as file:
            for layer, bank in self.found.banks.items():
                tell(f"{EXPERTS}: layer {layer}, {bank.num} experts")
                self.experts[str(layer)] = self._layer(layer, bank, file)
                self.folder.release()
        self.files[EXPERTS] = file.facts()
        self.expert_bytes = file.size

    def _layer(self, layer: int, bank: "BankReader", file: _File) -> dict[str, Any]:
        """The slabs of one layer, and their entry in the index."""
        kinds: list[dict[str, Any]] = []
        kind_of = []
        entry: dict[str, Any] = {"num": bank.num, "offset": file.size}
        for expert in range(bank.num):
            slab, kind = _slab(bank, expert)
            for name in bank.projections:
                self.ledger.touch(layer, expert, name)
            file.write(slab)
            if kind not in kinds:
                kinds.append(kind)
            kind_of.append(kinds.index(kind))
            if expert == 0:
                self.errors["experts"] = max(self.errors["experts"], _bank_error(bank, kind["parts"], slab))
        return entry | (kinds[0] if len(kinds) == 1 else {"kinds": kinds, "kind_of": kind_of})

    def receipt(self, bits: int) -> dict[str, Any]:
        """What was done, for the reader and for ``receipt.json``."""
        import moestro

        rounded = [f"layer {i}: {', '.join(b.rounded)}" for i, b in self.found.banks.items() if b.rounded]
        return {
            "moestro_version": moestro.__version__,
            "verb": "pack",
            "from": self.folder.name,
            "dialect": self.found.model.dialect,
            "why": self.found.model.why,
            "bits": bits,
            "expert_layouts": sorted(self._layouts()),
            "rounded_again": rounded,
            "scales_changed_by": self.scales,
            "bytes": {"resident": self.resident_bytes, "experts": self.expert_bytes},
            "relative_error": {name: float(value) for name, value in self.errors.items()},
            "ledger": self.ledger.close(),
        }

    @property
    def scales(self) -> float:
        """Largest relative change of a scale of packed experts."""
        return max((bank.scales for bank in self.found.banks.values()), default=0.0)

    def _layouts(self) -> set[str]:
        """Layouts of the experts' matrices."""
        return {each for bank in self.found.banks.values() for some in bank.layouts.values() for each in some}

    def _is_new(self) -> bool:
        """Whether there is something that readers of the first version do not know."""
        return bool(self._layouts() & {CODED, "s1"}) or any("kinds" in entry for entry in self.experts.values())

    def write_rest(self, folder: Path, receipt: dict[str, Any]) -> None:
        """The index, the configs, the tokenizer, the receipt."""
        from moestro.models.save import config_values, write_json, write_tokenizer

        model = self.folder.model
        index = {
            "format": FORMAT,
            "version": VERSION if self._is_new() else OLDEST,
            "model": self.found.model.model_dump(mode="json"),
            "files": self.files,
            "tensors": self.tensors,
            "experts": self.experts,
            "notes": {"from": self.folder.name, "bits": receipt["bits"]},
        }
        write_json(folder / INDEX, index)
        write_json(folder / "config.json", config_values(model))
        if model.can_generate():
            write_json(folder / "generation_config.json", json.loads(model.generation_config.to_json_string()))
        write_json(folder / "receipt.json", receipt)
        write_tokenizer(model, None, folder)


def _whole(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


def _nbytes(entry: "Entry") -> int:
    if entry.layout == VECTOR:
        return 4 * entry.shape[0]
    if entry.layout in RAW:
        total = RAW[entry.layout]
        for dim in entry.shape:
            total *= dim
        return total
    return matrix_bytes(entry.layout, *entry.shape)


def _raw_bytes(tensor: Any) -> Bytes:
    import torch

    flat: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def _error(before: Any, after: Any) -> float:
    """Root mean square of the difference over that of the matrix."""
    size = float(np.sqrt(np.mean(np.square(before, dtype=np.float64))))
    return float(np.sqrt(np.mean(np.square(before - after, dtype=np.float64)))) / size if size else 0.0


def _slab(bank: "BankReader", expert: int) -> tuple[Bytes, dict[str, Any]]:
    """The bytes of an expert without the padding to a page, and the form of its slab."""
    parts: dict[str, Any] = {}
    found = {name: bank.data(expert, name) for name in bank.parts(expert)}
    inside = 0
    for name, part in bank.parts(expert).items():
        size = len(found[name])
        parts[name] = {"offset": inside, "nbytes": size, "layout": part.layout, "shape": list(part.shape)}
        inside += _whole(size, 64)
    slab = np.zeros(inside, dtype=np.uint8)
    for name, data in found.items():
        slab[parts[name]["offset"] :][: len(data)] = data
    return slab, {"stride": _whole(inside, PAGE), "parts": parts}


def _bank_error(bank: "BankReader", parts: dict[str, Any], slab: Bytes) -> float:
    """The largest relative error among the matrices of expert 0."""
    worst = 0.0
    for name in bank.projections:
        piece = Piece(parts[name]["offset"], parts[name]["nbytes"], parts[name]["layout"], tuple(parts[name]["shape"]))
        table = pack_ternary.book(bank.zeros).table if piece.layout == CODED else None
        found = piece.array(slab[piece.offset :][: piece.nbytes], table)
        worst = max(worst, _error(bank.weight(0, name), found))
    return worst


def _refuse_rounding(name: str, found: "Contents") -> None:
    """Raise LoadError where packed experts would be rounded a second time."""
    for layer, bank in found.banks.items():
        for projection, experts in bank.rounded.items():
            expert, why = next(iter(experts.items()))
            raise LoadError(
                f"{name}: layer {layer} expert {expert} {projection} cannot keep its codes: {why}; compress it "
                "otherwise, or pack without --exact, which rounds it again"
            )
