"""Weight-only quantisation that chooses for each expert matrix how many weights share a scale.

For a matrix W [O, I] in groups of g inputs let R(g) be the mean over groups and rows of the range 2 max |w| of a group.
Where weights are like normal draws, halving a group shrinks R by little, in the ratio of r(g) = E max of g half-normal
draws; where single inputs are outliers, their groups alone keep a large range and R falls. With margin m:

    scan      the coarsest g that no finer h undercuts:  R(h) / R(g) >= r(h) / r(g) - m  for all finer h
    halving   from a whole row on, halve while  R(g/2) / R(g) < r(g/2) / r(g) - m

``halving`` is the paper's walk and can stop too early: with several outliers of one size every half still holds one.
Scales: ``symmetric`` max |w| / (2^(b-1) - 1); ``ft`` (FasterTransformer) max |w| / 2^(b-1), which clips the largest
positive weight; ``kim`` (MoQE) 2 max |w| / (2^b - 1). Weights are rounded to the nearest; no data is looked at.

Source: FineQuant (2308.09723, section 3: adaptive granularity). Its threshold is not public; r(g) stands in for it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from moestro.core.card import MethodCard
from moestro.core.config import Config as BaseConfig
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import PlanInputs
from moestro.core.plan import BitPlan, MethodUse
from moestro.methods.compress._parts.mixtures import float_mixtures
from moestro.ops.formats import Packing, Params, nearest, packed_nbytes
from moestro.ops.formats.integer import RULES, Signed
from moestro.surgery.rounding import Nearest


class Config(BaseConfig):
    """Settings.

    Attributes:
        bits: 2, 3, 4 or 8. group_size: adaptive, inputs that share a scale, or None for whole rows.
        sizes: groups that ``adaptive`` chooses among, besides a whole row; those as wide as a row or wider drop out.
        rule, margin: see the top of the file. compare: whether ``halving`` holds R(g/2) against the last step
            (stepwise) or against a whole row (cumulative).
        scale: how a scale follows from the largest weight. scale_type: f32, f16 or bf16.
    """

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal["adaptive"] | int | None = "adaptive"
    sizes: tuple[int, ...] = (512, 256, 128, 64)
    rule: Literal["scan", "halving"] = "scan"
    compare: Literal["stepwise", "cumulative"] = "stepwise"
    margin: float = Field(default=0.05, ge=0, lt=1)
    scale: Literal["symmetric", "ft", "kim"] = "symmetric"
    scale_type: Literal["f32", "f16", "bf16"] = "f32"

    @model_validator(mode="after")
    def _sizes_fall(self) -> "Config":
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise ConfigError(f"group_size={self.group_size}; must be at least 1, adaptive, or null for whole rows")
        if not self.sizes or min(self.sizes) < 1 or list(self.sizes) != sorted(set(self.sizes), reverse=True):
            raise ConfigError(f"sizes={list(self.sizes)} must fall and be at least 1")
        return self


@dataclass(frozen=True)
class GroupChoice:
    """A group size, None for a whole row, and (group, R) of every size that was looked at, coarse to fine."""

    size: int | None
    trace: tuple[tuple[int, float], ...]


def group_range(weight_OI: Tensor, group: int) -> float:
    """R(g): mean over rows and groups of 2 max |w|. A short last group counts as any other."""
    out, width = weight_OI.shape
    full = width // group * group
    largest = weight_OI[:, :full].reshape(out, -1, group).abs().amax(-1).double()
    total, count = largest.sum(), largest.numel()
    if full < width:
        total, count = total + weight_OI[:, full:].abs().amax(-1).double().sum(), count + out
    return 2 * float(total) / count


@functools.cache
def normal_range(group: int) -> float:
    """r(g): the expected largest of g half-normal draws, the integral of 1 - erf(x / sqrt 2)^g."""
    x = np.linspace(0.0, 12.0, 24001)
    below = np.array([math.erf(value / math.sqrt(2)) for value in x]) ** group
    return float(np.trapezoid(1 - below, x))


def expected_range(width: int, group: int) -> float:
    """What R(g) / 2 would be for normal draws: the mean of r over the groups of a row, a short last one included."""
    full, rest = divmod(width, group)
    return (full * normal_range(group) + (normal_range(rest) if rest else 0.0)) / (full + (rest > 0))


def choose_group_size(
    weight_OI: Tensor,
    sizes: Sequence[int] = (512, 256, 128, 64),
    rule: Literal["scan", "halving"] = "scan",
    margin: float = 0.05,
    compare: Literal["stepwise", "cumulative"] = "stepwise",
) -> GroupChoice:
    """The coarsest group that does not inflate ranges, see the top of the file.

    Raises:
        ConfigError: weights that are no floats.
    """
    if not weight_OI.is_floating_point():
        raise ConfigError(f"weights of type {weight_OI.dtype} are no floats; quantise the float checkpoint")
    width = weight_OI.shape[1]

    def shrinks(fine: tuple[int, float], coarse: tuple[int, float]) -> bool:
        if coarse[1] == 0:
            return False
        return fine[1] / coarse[1] < expected_range(width, fine[0]) / expected_range(width, coarse[0]) - margin

    trace = [(width, group_range(weight_OI, width))]
    if rule == "halving":
        best = trace[0]
        while (half := -(-trace[-1][0] // 2)) >= min(sizes) and half < trace[-1][0]:
            trace.append((half, group_range(weight_OI, half)))
            if not shrinks(trace[-1], best if compare == "stepwise" else trace[0]):
                break
            best = trace[-1]
    else:
        trace += [(size, group_range(weight_OI, size)) for size in sizes if size < width]
        best = next(
            one for place, one in enumerate(trace) if not any(shrinks(finer, one) for finer in trace[place + 1 :])
        )
    return GroupChoice(None if best[0] == width else best[0], tuple(trace))


class Scaled(Nearest):
    """A ``Rounding`` to the nearest code with the scales of a rule."""

    def __init__(self, rule: str) -> None:
        self.rule = rule

    def __call__(self, weight_EOI: Tensor, used: Packing, gram_EII: Tensor | None) -> tuple[Tensor, Params]:
        """See Rounding."""
        return nearest(weight_EOI, used, Signed(int(used.format.removeprefix("int")), self.rule))


def rounding(config: Config) -> Scaled:
    """How surgery rounds by a plan of this method."""
    return Scaled(config.scale)


def streams(config: Config) -> bool:
    """Whether a plan needs nothing but matrices, read one at a time: the command line then never opens the model."""
    return True


def chosen(weight_OI: Tensor, config: Config) -> GroupChoice:
    """The group of one matrix by the settings."""
    width = weight_OI.shape[1]
    if config.group_size == "adaptive":
        return choose_group_size(weight_OI, config.sizes, config.rule, config.margin, config.compare)
    if config.group_size is not None and config.group_size > width:
        raise PlanError(f"group_size={config.group_size} is wider than rows of {width} inputs; use at most {width}")
    return GroupChoice(None if config.group_size == width else config.group_size, ())


def table(found: Mapping[str, tuple[Packing, tuple[int, int]]]) -> list[str]:
    """Lines for people: matrices by packing for each layer and projection, and the bytes of all."""
    counts: dict[tuple[int, str], dict[str, int]] = {}
    for key, (used, _) in found.items():
        layer, _, projection = key.split("/")
        row = counts.setdefault((int(layer), projection), {})
        row[str(used)] = row.get(str(used), 0) + 1
    lines = [
        f"layer {layer} {projection}: " + ", ".join(f"{count} x {name}" for name, count in sorted(row.items()))
        for (layer, projection), row in counts.items()
    ]
    weights = sum(out * width for _, (out, width) in found.values())
    total = sum(packed_nbytes(shape, used) for used, shape in found.values())
    codes = sum(out * -(-width * int(used.format[-1]) // 8) for used, (out, width) in found.values())
    return [
        *lines,
        f"experts: {total:,} bytes, of these {total - codes:,} of scales; {8 * total / weights:.3f} bits a weight",
    ]


def plan(inputs: PlanInputs, config: Config) -> BitPlan:
    """A packing for every expert matrix, from the weights alone. Its notes hold the table and every descent.

    Raises:
        PlanError: no mixtures, or a fixed group wider than a row.
    """
    found: dict[str, tuple[Packing, tuple[int, int]]] = {}
    traces: dict[str, list[list[float]]] = {}
    for layer, there in float_mixtures(inputs).items():
        for expert in range(there.num_experts or 0):
            for name in there.projections:
                weight_OI = inputs.subject.tensor(layer, expert, name)
                choice = chosen(weight_OI, config)
                used = Packing(f"int{config.bits}", choice.size, config.scale_type)
                found[f"{layer}/{expert}/{name}"] = (used, (weight_OI.shape[0], weight_OI.shape[1]))
                traces[f"{layer}/{expert}/{name}"] = [[size, float(f"{mean:.6g}")] for size, mean in choice.trace]
    return BitPlan(
        method="compress.finequant",
        config=config.model_dump(mode="json"),
        seed=inputs.seed,
        model_hash=inputs.subject.fingerprint(),
        bits=dict.fromkeys(found, float(config.bits)),
        formats={key: str(used) for key, (used, _) in found.items()},
        rounding=MethodUse(method="compress.finequant", config=config.model_dump(mode="json")),
        notes={"keeps": "nothing", "lines": table(found), "scale": RULES[config.scale], "ranges": traces},
    )


CARD = MethodCard(
    title="FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs",
    year=2023,
    arxiv="2308.09723",
    paper="finequant",
    summary="Experts in few bits without data, each matrix with the coarsest groups that do not inflate its ranges.",
    taxonomy="inference/model/compression/quantisation",
    needs=("model",),
    deviations=(
        "the default looks at all sizes (scan), since halving misses several outliers of one size",
        "the threshold on the shrinking of ranges is that of normal draws less a margin; the paper's is not public",
        "attention and all other matrices stay as they are; the paper also quantises dense layers",
    ),
)
