"""What packed experts hold: zeros, entropy of their codes, and bits a weight with and without what stands beside codes.

For the codes q of all matrices of a projection with one format, p_q the share of code q:

    zeros      share of weights that are exactly 0
    entropy    -sum_q p_q log2 p_q, the least that independent codes of these shares take
    codes      stored bits of codes a weight;  beside  the bits of scales, values, counts, zero points

Source: the figures by which QMoE (2310.16795, section 4 and table 6) judges a code.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.inputs import MeterInputs
from moestro.core.layer import mixture_layers
from moestro.core.packed import PackedFFN
from moestro.core.report import Report, Table
from moestro.ops.formats import Packing, format_named


COLUMNS = ["site", "projection", "format", "matrices", "weights", "zeros", "entropy", "codes", "beside", "bits"]


class Config(BaseConfig):
    """No settings."""


class Tally:
    """Sums over matrices."""

    def __init__(self) -> None:
        self.matrices = self.weights = self.zeros = self.codes = self.beside = 0
        self.symbols = torch.zeros(256, dtype=torch.int64)

    def add(self, weight_OI: Tensor, codes_OI: Tensor | None, codes: int, beside: int) -> None:
        """One matrix: dequantised, its codes, bytes."""
        self.matrices += 1
        self.weights += weight_OI.numel()
        self.zeros += int((weight_OI == 0).sum())
        self.codes += codes
        self.beside += beside
        if codes_OI is not None:
            self.symbols += torch.bincount(codes_OI.flatten().long().cpu(), minlength=256)

    def merge(self, other: "Tally") -> None:
        """Join another one's sums."""
        for name in ("matrices", "weights", "zeros", "codes", "beside", "symbols"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def entropy(self) -> float | None:
        """Bits a weight; None for formats whose codes are the weights."""
        total = int(self.symbols.sum())
        if not total:
            return None
        share = self.symbols[self.symbols > 0].double() / total
        return float(-(share * share.log2()).sum())

    def cells(self) -> list[float | int | None]:
        """As in COLUMNS, from ``matrices`` on."""
        each = 8 / self.weights
        return [
            self.matrices, self.weights, self.zeros / self.weights, self.entropy,
            self.codes * each, self.beside * each, (self.codes + self.beside) * each,
        ]  # fmt: skip


def tallies(bank: PackedFFN) -> Iterator[tuple[str, str, Tally]]:
    """(projection, format, sums) for each format that a projection of a bank has."""
    for name, each in bank.packings.items():
        found: dict[str, Tally] = {}
        for expert, used in enumerate(each):
            parts, shape = bank.parts(expert, name), bank.shape(name)
            codes_OI = None if used.format == "wide" else format_named(used.format).unpack(parts, shape, used)[0]
            size = {key: part.numel() * part.element_size() for key, part in parts.items()}
            codes = size.get("codes", size.get("weight", 0))
            tally = found.setdefault(used.format, Tally())
            tally.add(bank.weight(expert, name), codes_OI, codes, sum(size.values()) - codes)
        yield from ((name, spelled, tally) for spelled, tally in found.items())


def measure(subject: MeterInputs, config: Config) -> Report:
    """A row for each layer, projection and format, and the figures of all ternary experts and of all packed ones."""
    rows = []
    whole: dict[str, Tally] = {"packed": Tally(), "ternary": Tally()}
    for site, layer in mixture_layers(subject.model).items() if subject.model is not None else ():
        if not isinstance(layer.bank, PackedFFN):
            continue
        for name, spelled, tally in tallies(layer.bank):
            rows.append([site, name, spelled, *tally.cells()])
            whole["packed"].merge(tally)
            if "low" in format_named(spelled).parts((1, 1), Packing(spelled)):
                whole["ternary"].merge(tally)
    numbers: dict[str, float] = {}
    for what, tally in whole.items():
        cells = dict(zip(COLUMNS[3:], tally.cells(), strict=True)) if tally.weights else {"matrices": 0}
        numbers |= {f"{what}_{key}": float(value) for key, value in cells.items() if value is not None}
    return Report(
        method="inspect.packed_codes",
        config=config.model_dump(mode="json"),
        subject=subject.name,
        numbers=numbers,
        tables={"codes": Table(columns=COLUMNS, rows=rows)},
    )


CARD = MethodCard(
    title="QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models",
    year=2024,
    arxiv="2310.16795",
    summary="Zeros, entropy and bits a weight of packed experts, apart by codes and what stands beside them.",
    taxonomy="inference/model/compression/quantisation",
    needs=("model",),
)
