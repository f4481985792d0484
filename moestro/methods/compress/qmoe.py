"""Experts in less than one bit a weight: three values a row, chosen by GPTQ on every expert's own tokens, and coded.

A row of a matrix W [O, I] may have the values {low, 0, high}, low = min(0, min w), high = max(0, max w): most weights
become 0. Which one a weight becomes is decided column by column, each column's error spread over those to come
(``_parts/gptq``), with the second moments H_e of what reaches expert e under its own routing; up to ``expert_group``
experts are rounded together. H_e comes from a buffer of the layer's tokens when the group's turn comes
(``_parts/streaming``), so only that of a group is ever in memory, however many experts there are. Layers are taken in
order, and each sees what the packed ones before it return.

The symbols go as they come from the quantiser into words of 16 bits that stand for strings of symbols of any length
(``ops/formats/_codebook``), with one number of words and two values for each row: 48 bits with bfloat16 values, so
rows should have 512 inputs or more. Decoding is exact and needs no other row: a product decodes some rows at a time.

Source: QMoE (2310.16795): section 3 for the calibration, section 4 for the code.
"""

import dataclasses
from typing import Literal

from pydantic import Field, field_validator, model_validator

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError
from moestro.core.inputs import PlanInputs
from moestro.core.plan import BitPlan, MethodUse
from moestro.methods.compress._parts.mixtures import float_mixtures
from moestro.methods.compress._parts.streaming import Streaming
from moestro.ops.formats import Packing, format_named, packing
from moestro.surgery.rounding import Nearest


NARROW = 512
"""Inputs below which a row's values and count alone take more than a tenth of a bit a weight."""


class Config(BaseConfig):
    """Settings.

    Attributes:
        up: packing of the gate and up projections. down: of the down projection, which often deserves more bits. Any
            packing of docs/formats.md: ``ternary`` with the shortest code, ``ternary14`` with the paper's, ``trits``
            without one, ``uint2:row:bf16`` for the paper's 2 bits, ``wide`` for none.
        p0: share of zeros that the code is made for; None counts those of every matrix. The paper has 0.885.
        rounding: gptq, or nearest, which needs no data. percdamp, blocksize: of GPTQ.
        expert_group: experts rounded together.
        max_tokens_mul: an expert is measured on at most so many times the tokens of an even load.
        gate_weighted: weigh tokens by the square of their routing weight instead of alike.
        skip_tokens: ids left out of calibration (beginnings, masks, template words), at their position, at the one
            before, which predicts them, or at both (``skip``).
        skip_unlabelled: leave out positions whose label is -100.
        least: tokens below which an expert is starved. allow_starved: go on with half or more of a layer's experts
            starved; those that no token reached are rounded to the nearest.
    """

    up: str = "ternary:row:bf16"
    down: str = "ternary:row:bf16"
    p0: float | None = Field(default=None, ge=0.334, le=0.999)
    rounding: Literal["gptq", "nearest"] = "gptq"
    percdamp: float = Field(default=0.1, gt=0)
    blocksize: int = Field(default=128, ge=1)
    expert_group: int = Field(default=16, ge=1)
    max_tokens_mul: float = Field(default=4.0, gt=0)
    gate_weighted: bool = False
    skip_tokens: tuple[int, ...] = ()
    skip: Literal["at", "before", "both"] = "at"
    skip_unlabelled: bool = False
    least: int = Field(default=1, ge=1)
    allow_starved: bool = False

    @field_validator("up", "down")
    @classmethod
    def _spelled(cls, spelled: str) -> str:
        packing(spelled)
        return spelled

    @model_validator(mode="after")
    def _used(self) -> "Config":
        if self.p0 is not None and not any(format_named(packing(one).format).ragged for one in (self.up, self.down)):
            raise ConfigError(f"p0={self.p0:g} is for codes of variable length; {self.up} and {self.down} have none")
        if self.skip_tokens and min(self.skip_tokens) < 0:
            raise ConfigError(f"skip_tokens={list(self.skip_tokens)} are token ids, which are 0 or more")
        return self


def rounding(config: Config) -> Streaming | Nearest:
    """How surgery rounds by a plan of this method."""
    if config.rounding == "nearest":
        return Nearest()
    return Streaming(
        percdamp=config.percdamp,
        blocksize=config.blocksize,
        batch=config.expert_group,
        max_tokens_mul=config.max_tokens_mul,
        gate_weighted=config.gate_weighted,
        skip_tokens=config.skip_tokens,
        skip=config.skip,
        skip_unlabelled=config.skip_unlabelled,
        least=config.least,
        allow_starved=config.allow_starved,
    )


def streams(config: Config) -> bool:
    """The plan needs no more than shapes, so a checkpoint can be packed layer by layer."""
    return True


def packing_of(projection: str, width: int, config: Config) -> Packing:
    """The packing of a projection whose rows have ``width`` inputs: a group that is wider means the whole row."""
    used = packing(config.down if projection == "down" else config.up).fitting(width)
    if format_named(used.format).ragged and "zeros" not in dict(used.sizes):
        zeros = 0 if config.p0 is None else round(1000 * config.p0)
        used = dataclasses.replace(used, sizes=(("zeros", zeros), *used.sizes))
    return used


def plan(inputs: PlanInputs, config: Config) -> BitPlan:
    """A packing for every expert matrix; which codes they get is decided when the plan is applied.

    Raises:
        PlanError: no mixtures.
    """
    bits: dict[str, float] = {}
    formats: dict[str, str] = {}
    matrices: dict[str, list[int]] = {}
    narrow: set[int] = set()
    for layer, there in float_mixtures(inputs).items():
        for name in there.projections:
            out, width = there.matrix(name)
            used = packing_of(name, width, config)
            form = format_named(used.format)
            if form.ragged and width < NARROW:
                narrow.add(width)
            for expert in range(there.num_experts or 0):
                bits[f"{layer}/{expert}/{name}"] = form.bits
                formats[f"{layer}/{expert}/{name}"] = str(used)
                found = matrices.setdefault(f"{name}: {used}", [0, 0])
                found[0] += 1
                found[1] += out * width
    lines = [f"{what}: {count} matrices, {weights:,} weights" for what, (count, weights) in matrices.items()]
    if narrow:
        worst = min(narrow)
        lines.append(
            f"rows of {worst} inputs: what is stored for a row besides its words takes about {48 / worst:.2f} bits a "
            f"weight; below {NARROW} inputs trits, which need no count of words, may be smaller"
        )
    settings = config.model_dump(mode="json")
    return BitPlan(
        method="compress.qmoe",
        config=settings,
        seed=inputs.seed,
        model_hash=inputs.subject.fingerprint(),
        bits=bits,
        formats=formats,
        rounding=MethodUse(method="compress.qmoe", config=settings),
        notes={"keeps": "nothing", "lines": lines},
    )


CARD = MethodCard(
    title="QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models",
    year=2024,
    arxiv="2310.16795",
    paper="qmoe",
    summary="Ternary experts by GPTQ over streamed tokens, coded in less than one bit a weight.",
    taxonomy="inference/model/compression/quantisation",
    needs=("model",),
    deviations=(
        "the default code has the leaves of a Tunstall tree as words; ternary14 is the paper's dictionary",
        "rows store 16 bits for their number of words, the paper 32 for an offset",
        "symbols come from the quantiser; the paper finds them again by comparing values",
        "codebooks are made for the zeros of each matrix unless p0 says otherwise",
        "of an expert with many tokens those at even distances are measured, the paper takes the first",
        "inputs that never occurred are rounded to the nearest; the paper leaves them to the damping",
        "decoding runs in PyTorch, panel by panel; the paper has CUDA kernels for six shapes",
    ),
)
