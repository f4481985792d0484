"""The experts of one layer of a checkpoint, expert by expert, as the matrices of a slab."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from moestro.core.errors import ConfigError, LoadError
from moestro.engine.dialect import VECTOR, LayerSpec, Shape
from moestro.engine.layout import GROUP, OF_BITS, ZERO, Bytes, matrix_bytes, pack, pack_codes
from moestro.engine.ternary import CODED, most_bytes


if TYPE_CHECKING:
    from torch import Tensor, nn

    from moestro.surgery.disk import Folder


READ_ME: Final = "train.read_me"
"""The method of routers that read token ids only; what they choose weighs 1."""


class Rows:
    """A tensor [N, K] of any float type that gives slices of rows as float32 arrays."""

    def __init__(self, tensor: "Tensor") -> None:
        self.tensor, self.shape = tensor, tuple(tensor.shape)

    def __getitem__(self, rows: slice) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = self.tensor[rows].detach().float().numpy()
        return found


@dataclass(frozen=True)
class Part:
    """A matrix or bias of an expert: its shape and layout."""

    shape: Shape
    layout: str

    @property
    def nbytes(self) -> int:
        """Stored bytes; of coded matrices, whose words are not counted yet, what they take at most."""
        if self.layout == CODED:
            return most_bytes(*self.shape)
        return 4 * self.shape[0] if self.layout == VECTOR else matrix_bytes(self.layout, *self.shape)


def bank_at(folder: "Folder", path: str, module: "nn.Module", bits: int, *, coded: bool = False) -> "BankReader | None":
    """The experts of a mixture, or None where they are no plain feed-forwards or something changes what they do."""
    from moestro.core.bank import PooledFFN, StackedFFN
    from moestro.core.dispatch import LocalDispatcher
    from moestro.core.layer import MoELayer, add_shared
    from moestro.core.packed import PackedFFN
    from moestro.core.remap import RemapRouter

    if not isinstance(module, MoELayer) or type(module.bank) not in (StackedFFN, PackedFFN, PooledFFN):
        return None
    plain = module.pre is None and module.post is None and module.combine is add_shared
    if not plain or type(module.dispatcher) is not LocalDispatcher or isinstance(module.router, RemapRouter):
        return None
    if isinstance(module.bank, PooledFFN):
        pool = module.bank.pool
        return None if module.router.num_null or pool.out != pool.dim else PoolReader(folder, path, module, bits)
    if module.router.num_null or module.bank.out != module.bank.dim:
        return None
    return BankReader(folder, f"{path}.bank", module.bank, bits, coded=coded)


class BankReader:
    """See the top of the file.

    Args:
        path: of the bank in the model. bank: without storage. bits: of matrices that are floats now, and of those whose
            codes no layout holds. coded: ternary matrices stay coded.

    Attributes:
        layouts: projection -> layout of each expert's matrix.
        rounded: projection -> experts whose packed matrices are dequantised and rounded again, and why.
        scales: largest relative change of a scale that was rounded to float16, so far.
        zeros: in a thousand symbols, what the table of ternary words is made for; whoever packs says it.
    """

    def __init__(self, folder: "Folder", path: str, bank: Any, bits: int, *, coded: bool = False) -> None:
        self.folder, self.path, self.bank = folder, path, bank
        self.bits, self.coded = bits, coded
        self.num = bank.num_experts
        self.bias = bank.up_bias is not None
        self.projections: tuple[str, ...] = bank.projections
        self.rounded: dict[str, dict[int, str]] = {}
        self.scales = 0.0
        self.zeros = 0
        self.layouts = {name: [self._layout(name, expert) for expert in range(self.num)] for name in bank.projections}

    def layer(self, site: str) -> LayerSpec:
        """The settings of a layer with these experts."""
        bank = self.bank
        form: dict[str, Any] = {"gated": bank.gated, "bias": self.bias, "activation": bank.activation}
        return LayerSpec(experts=self.num, inner=bank.inner, site=site, **form)

    def parts(self, expert: int) -> dict[str, Part]:
        """An expert's parts in the order of its slab."""
        shapes = self.layer("").parts(self.bank.dim)
        return {
            name: Part(shape, self.layouts[name][expert] if name in self.layouts else VECTOR)
            for name, shape in shapes.items()
        }

    def shares_of_zeros(self) -> list[int]:
        """Zeros in a thousand that each coded matrix expects."""
        from moestro.ops.formats.ternary import ZEROS

        return [
            dict(self.bank.packings[name][expert].sizes).get("zeros") or ZEROS
            for name, layouts in self.layouts.items() for expert, layout in enumerate(layouts) if layout == CODED
        ]  # fmt: skip

    def names(self) -> set[str]:
        """Tensors of the checkpoint that these experts are made of."""
        return {name for name in self.folder.entries if name.startswith(f"{self.path}.")}

    def slot(self, expert: int, name: str) -> tuple[str, Any]:
        """Name of the tensor, and the index of the part of it, that holds a matrix or bias of a float bank."""
        projection, bias, _ = name.partition("_bias")
        bank = self.bank
        if projection == "down":
            return f"{self.path}.down_proj{bias}", (expert,)
        if not bank.gated:
            return f"{self.path}.up_proj{bias}", (expert,)
        half = slice(0, bank.inner) if projection == "gate" else slice(bank.inner, 2 * bank.inner)
        return f"{self.path}.gate_up_proj{bias}", (expert, half)

    def data(self, expert: int, name: str) -> Bytes:
        """A part as its place in a slab holds it.

        Raises:
            LoadError: a weight is NaN, infinite, or too large for the layout.
        """
        part = self.parts(expert)[name]
        try:
            if part.layout == VECTOR:
                return np.ascontiguousarray(self._float(expert, name).float().numpy()).view(np.uint8)
            if not self._is_packed() or expert in self.rounded.get(name, {}):
                return pack(Rows(self._float(expert, name)), part.layout)
            return self._ternary(expert, name) if part.layout == CODED else self._codes(expert, name, part)
        except ConfigError as error:
            raise LoadError(f"{self.folder.name}: {self.path} expert {expert} {name}: {error}") from None

    def weight(self, expert: int, name: str) -> npt.NDArray[np.float32]:
        """A matrix as the checkpoint has it, float32 [out, in]."""
        found: npt.NDArray[np.float32] = self._float(expert, name).detach().float().numpy()
        return found

    def _is_packed(self) -> bool:
        return hasattr(self.bank, "packings")

    def _float(self, expert: int, name: str) -> "Tensor":
        from moestro.ops.formats import dequantise

        if self._is_packed() and not name.endswith("_bias"):
            used = self.bank.packings[name][expert]
            return dequantise(self._stored(expert, name), self.bank.shape(name), used)
        leaf, index = self.slot(expert, name)
        return self.folder.tensor(leaf)[index]

    def _stored(self, expert: int, name: str) -> "dict[str, Tensor]":
        """The stored tensors of a packed matrix."""
        number, place = self.bank._where[name][expert]
        parts = self.bank.parts(expert, name)
        return {part: self.folder.tensor(f"{self.path}.{name}_{number}_{part}")[place] for part in parts}

    # -- packed banks: codes move as they are where a layout holds them --------------------------------------------

    def _layout(self, name: str, expert: int) -> str:
        """The layout of a matrix: that of its codes, or of ``bits``."""
        wanted = OF_BITS[self.bits]
        if not self._is_packed():
            return wanted
        used = self.bank.packings[name][expert]
        layout, why = layout_of(used, self.bank.shape(name)[1], coded=self.coded)
        if layout is None:
            self.rounded.setdefault(name, {})[expert] = why
        return layout or wanted

    def _codes(self, expert: int, name: str, part: Part) -> Bytes:
        """A packed matrix in its layout: the same steps times the same scales, rounded to float16."""
        used = self.bank.packings[name][expert]
        codes, params = self._unpacked(expert, name)
        groups = -(-part.shape[1] // GROUP)
        scale = _spread(params["scale"], used.group, groups)
        if np.abs(scale).max() > np.finfo(np.float16).max:
            raise ConfigError(f"a scale of {np.abs(scale).max():.3g} does not fit float16")
        change = np.abs(scale.astype(np.float16).astype(np.float32) - scale) / np.maximum(np.abs(scale), 1e-30)
        self.scales = max(self.scales, float(change.max()))
        if part.layout == "s1":
            return pack_codes(codes, scale, None, part.layout)
        if used.format.startswith("u"):
            zero = _spread(params["zero"], used.group, groups).astype(np.int16)
        else:
            zero = np.full(scale.shape, 1 << (int(used.format.lstrip("uint")) - 1), dtype=np.int16)
        if part.layout not in ZERO:
            return pack_codes(codes, scale, zero.astype(np.uint8), part.layout)
        wide = np.repeat(zero, GROUP, axis=1)[:, : part.shape[1]]
        return pack_codes((codes - wide + ZERO[part.layout]).astype(np.uint8), scale, None, part.layout)

    def _ternary(self, expert: int, name: str) -> Bytes:
        """A ternary matrix: the same symbols in other words, the same two values a row."""
        from moestro.engine import pack_ternary

        codes, params = self._unpacked(expert, name)
        return pack_ternary.pack(codes, params["low"][:, 0], params["high"][:, 0], self.zeros)

    def _unpacked(self, expert: int, name: str) -> tuple[npt.NDArray[Any], dict[str, npt.NDArray[Any]]]:
        """Codes [N, K] and what their groups share, as the checkpoint has them."""
        from moestro.ops.formats import format_named

        used = self.bank.packings[name][expert]
        codes, params = format_named(used.format).unpack(self._stored(expert, name), self.bank.shape(name), used)
        return codes.numpy(), {key: value.numpy() for key, value in params.items()}


class PoolReader(BankReader):
    """Experts that are lists of units of one pool; each becomes matrices of its own.

    Where the router is one of token ids, whose chosen expert always weighs 1, units of every expert can be computed for
    all tokens: ``permanent`` lists them, for a branch beside the experts, and the slabs hold only what an expert has
    for itself.

    Attributes:
        permanent: units of every expert that the slabs leave out, int64 [P]; at least one unit stays in each slab.
    """

    def __init__(self, folder: "Folder", path: str, module: Any, bits: int) -> None:
        bank = module.bank
        rows = folder.tensor(f"{path}.bank.rows_EW").numpy()
        units, count = np.unique(rows, return_counts=True)
        router = getattr(module.router, "made_by", None)
        always = router is not None and router.method == READ_ME and module.shared is None
        common = units[count == len(rows)] if always and bank.pool.up_bias is None else units[:0]
        self.permanent = common[: max(rows.shape[1] - 1, 0)]
        self.rows = np.stack([row[~np.isin(row, self.permanent)] for row in rows])
        super().__init__(folder, f"{path}.bank", bank.pool, bits)
        self.num = bank.num_experts
        self.layouts = {name: of_pool * self.num for name, of_pool in self.layouts.items()}  # the pool is one expert

    def layer(self, site: str) -> LayerSpec:
        """See BankReader."""
        return super().layer(site).model_copy(update={"inner": self.rows.shape[1]})

    def slot(self, expert: int, name: str) -> tuple[str, Any]:
        """See BankReader."""
        return self.units(self.rows[expert], name)

    def units(self, rows: npt.NDArray[np.int64], name: str) -> tuple[str, Any]:
        """Where the part of a matrix or bias stands that some units need."""
        import torch

        leaf, _ = super().slot(0, name)
        leaf = leaf.replace(f"{self.path}.", f"{self.path}.pool.", 1)
        unit = torch.from_numpy(rows + (self.bank.inner if name.startswith("up") and self.bank.gated else 0))
        if name == "down_bias":
            return leaf, (0,)
        return leaf, (0, slice(None), unit) if name == "down" else (0, unit)


# int4 has its zero at 8 like q4. uint4 may have it anywhere: steps of at most 15 either way, which q8 holds.
_OWN = {
    "int8": "q8", "int4": "q4", "uint4": "q8", "int3": "q3", "uint3": "q3", "int2": "q2", "uint2": "q2", "sign1": "s1",
}  # fmt: skip
_TERNARY = ("trits", "ternary", "ternary14")


def layout_of(used: Any, width: int, *, coded: bool) -> tuple[str | None, str]:
    """The layout that holds what a packing says, or None and why there is none.

    Args:
        used: the packing. width: inputs of a row. coded: the model has a table of ternary words.
    """
    whole_rows = used.group is None or used.group >= width
    if used.format in _TERNARY:
        if not whole_rows:
            return None, f"ternary values in groups of {used.group}; a row has two"
        if used.scale != "bf16":
            return None, f"ternary values of type {used.scale}; slabs hold bf16"
        return (CODED, "") if coded else (None, "only a native model has a table of ternary words")
    if used.format not in _OWN:
        return None, f"no layout holds {used.format}"
    if not whole_rows and used.group % GROUP:
        return None, f"groups of {used.group} are no multiple of {GROUP}"
    return _OWN[used.format], ""


def _spread(values: npt.NDArray[Any], group: int | None, groups: int) -> npt.NDArray[Any]:
    """[N, own groups] -> [N, groups of 64] by repetition."""
    times = groups if group is None or values.shape[1] == 1 else group // GROUP
    return np.repeat(values, times, axis=1)[:, :groups]
