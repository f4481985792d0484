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
from moestro.engine.dialect import VECTOR
from moestro.engine.layout import Bytes, aligned, matrix_bytes, pack, unpack
from moestro.engine.packed import EXPERTS, FORMAT, INDEX, PAGE, RAW, RESIDENT, VERSION, Packed


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
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a packed model; peak memory is that of the largest layer, whatever the model's size.

    Args:
        ref: a folder, hub id, GGUF file, or ``wheel:name``. out: the folder; it becomes complete or is left as it was.
        bits: 4, 8, 16 or 32 for matrices. Experts that are packed already keep their codes where a layout holds them.
        resident_bits: for what every token needs, ``bits`` when None; routers and norms stay float32.
        progress: is told a line now and then.

    Returns:
        The receipt; ``receipt.json`` holds it too.

    Raises:
        LoadError: the checkpoint is damaged, holds NaN, or is of a form that cannot be packed.
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
    work = _Work(folder, found)
    work.check_room(Path(out))
    found.model = found.model.model_copy(
        update={"hash": OpenModel(folder.model, folder.name, folder.read).fingerprint()}
    )
    with atomic_folder(out, overwrite=overwrite) as temporary:
        tell(f"{RESIDENT}: {len(found.tensors)} tensors, {work.resident_bytes:,} bytes")
        work.write_resident(temporary)
        work.write_experts(temporary, tell)
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
        """Every offset, before anything is written."""
        offset = 0
        for name, entry in self.found.tensors.items():
            nbytes = _nbytes(entry)
            shape = list(entry.shape)
            self.tensors[name] = {"file": RESIDENT, "offset": offset, "nbytes": nbytes, "layout": entry.layout,
                                  "shape": shape}  # fmt: skip
            offset += _whole(nbytes, PAGE)
        self.resident_bytes, offset = offset, 0
        for layer, bank in self.found.banks.items():
            parts, inside = {}, 0
            for name, part in bank.parts().items():
                parts[name] = {"offset": inside, "nbytes": part.nbytes, "layout": part.layout,
                               "shape": list(part.shape)}  # fmt: skip
                inside += _whole(part.nbytes, 64)
            stride = _whole(inside, PAGE)
            self.experts[str(layer)] = {"num": bank.num, "offset": offset, "stride": stride, "parts": parts}
            offset += bank.num * stride
        self.expert_bytes = offset

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
                entry = self.experts[str(layer)]
                tell(f"{EXPERTS}: layer {layer}, {bank.num} experts of {entry['stride']:,} bytes")
                self._layer(layer, bank, entry, file)
                self.folder.release()
        self.files[EXPERTS] = file.facts()

    def _layer(self, layer: int, bank: "BankReader", entry: dict[str, Any], file: _File) -> None:
        """The slabs of one layer."""
        slab = aligned(entry["stride"], PAGE)
        for expert in range(bank.num):
            for name, part in entry["parts"].items():
                bank.store(expert, name, slab[part["offset"] : part["offset"] + part["nbytes"]])
                if not name.endswith("_bias"):
                    self.ledger.touch(layer, expert, name)
            file.write(slab)
            if expert == 0:
                self.errors["experts"] = max(self.errors["experts"], _bank_error(bank, entry["parts"], slab))

    def receipt(self, bits: int) -> dict[str, Any]:
        """What was done, for the reader and for ``receipt.json``."""
        import moestro

        layouts = sorted({p["layout"] for e in self.experts.values() for p in e["parts"].values()} - {VECTOR})
        rounded = [f"layer {i}: {', '.join(b.rounded)}" for i, b in self.found.banks.items() if b.rounded]
        return {
            "moestro_version": moestro.__version__,
            "verb": "pack",
            "from": self.folder.name,
            "dialect": self.found.model.dialect,
            "why": self.found.model.why,
            "bits": bits,
            "expert_layouts": layouts,
            "rounded_again": rounded,
            "bytes": {"resident": self.resident_bytes, "experts": self.expert_bytes},
            "relative_error": {name: float(value) for name, value in self.errors.items()},
            "ledger": self.ledger.close(),
        }

    def write_rest(self, folder: Path, receipt: dict[str, Any]) -> None:
        """The index, the configs, the tokenizer, the receipt."""
        from moestro.models.save import config_values, write_json, write_tokenizer

        model = self.folder.model
        index = {
            "format": FORMAT,
            "version": VERSION,
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


def _bank_error(bank: "BankReader", parts: dict[str, Any], slab: Bytes) -> float:
    """The largest relative error among the matrices of expert 0."""
    worst = 0.0
    for name in bank.projections:
        part = parts[name]
        data = slab[part["offset"] : part["offset"] + part["nbytes"]]
        worst = max(worst, _error(bank.weight(0, name), unpack(data, part["layout"], *part["shape"])))
    return worst
