"""FineQuant: are 4-bit experts as good as float ones, and do adaptive groups save what whole rows lose to outliers?

A float mixture is trained inside the job. Its experts are packed to the nearest codes in several ways, once as they are
and once after a change that leaves the function alone: in every expert some inner units are made c times larger and
their columns of the down projection c times smaller, and as many the other way round. Those columns are then outliers
among the inputs of ``down``, so the scale of a whole row is set by them. Only where scales stand can tell the arms
apart. ``column_more`` spends on whole rows what adaptive groups spend on scales: some matrices in 8 bits. ``hqq`` is an
upper reference, half-quadratic quantisation by the package of that name: scales and zero points that are fitted, in
groups twice as long as the finest, which take the same bytes.
"""

import copy
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moestro import surgery
from moestro.core.inputs import PlanInputs
from moestro.core.layer import mixture_layers
from moestro.core.plan import BitPlan
from moestro.core.registry import method
from moestro.ops.formats import packed_nbytes, packing
from moestro.studies._framework import Arm, Beats, Budget, Claim, Matches, NotWorse, Study
from moestro.studies._mixture import Mixture, corpus_of, rows_of, size_of, trained
from moestro.studies._rows import row_losses
from moestro.surgery.opened import OpenModel
from moestro.testing.peers import half_quadratic


FACTOR, UNITS = 50.0, 4  # of the change; units made larger, and as many made smaller
WAYS: Mapping[str, Mapping[str, Any]] = {
    "column": {"group_size": None},
    "column8": {"bits": 8, "group_size": None},
    "fixed": {},  # the finest size
    "adaptive": {},
}


def scale(budget: Budget) -> Mixture:
    """Experts wide enough that a row of ``down`` has several groups."""
    return size_of(budget, **budget.pick(ci={"inner": 48}, micro={"inner": 128}, full={"inner": 256, "steps": 600}))


def sizes(budget: Budget) -> tuple[int, ...]:
    """Groups that adaptive chooses among, besides whole rows."""
    return budget.pick(ci=(24, 12), micro=(64, 32), full=(128, 64, 32))


@functools.lru_cache(maxsize=2)
def _float(size: Mixture, seed: int, outliers: bool) -> nn.Module:
    model = trained(size, seed)
    if outliers:
        outlie(model, seed)
    return model


@torch.no_grad()
def outlie(model: nn.Module, seed: int) -> None:
    """Scale inner units of every expert up or down and their columns of ``down`` the other way; the same function."""
    draw = torch.Generator().manual_seed(seed)
    for layer in mixture_layers(model).values():
        bank = layer.bank
        for expert in range(bank.num_experts):
            units = torch.randperm(bank.weight(expert, "up").shape[0], generator=draw)
            for some, factor in ((units[:UNITS], FACTOR), (units[UNITS : 2 * UNITS], 1 / FACTOR)):
                bank.weight(expert, "up")[some] *= factor
                bank.weight(expert, "down")[:, some] /= factor


def plan_of(way: str, model: nn.Module, budget: Budget) -> BitPlan:
    """The plan of a way of packing, without data."""
    use = method("compress.finequant")
    values = {"scale_type": "f16", "sizes": sizes(budget), **WAYS[way]}
    if way == "fixed":
        values["group_size"] = sizes(budget)[-1]
    found: BitPlan = use.plan(PlanInputs(subject=OpenModel(model)), use.configure(values))
    return found


def nbytes(plan: BitPlan, model: nn.Module) -> dict[str, int]:
    """Stored bytes of every matrix."""
    shapes = OpenModel(model).shape.layers
    found = {}
    for key, spelled in plan.formats.items():
        layer, _, name = key.split("/")
        found[key] = packed_nbytes(shapes[int(layer)].matrix(name), packing(spelled))
    return found


def column_more(model: nn.Module, budget: Budget, seed: int) -> BitPlan:
    """Whole rows, matrices in 8 bits in random order until the bytes of adaptive groups are reached or passed."""
    wanted = sum(nbytes(plan_of("adaptive", model, budget), model).values())
    plan, wide = plan_of("column", model, budget), plan_of("column8", model, budget)
    narrow, large = nbytes(plan, model), nbytes(wide, model)
    total, bits, formats = sum(narrow.values()), dict(plan.bits), dict(plan.formats)
    keys = list(bits)
    for place in torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist():
        if total >= wanted:
            break
        key = keys[place]
        total += large[key] - narrow[key]
        bits[key], formats[key] = wide.bits[key], wide.formats[key]
    return plan.model_copy(update={"bits": bits, "formats": formats})


@torch.no_grad()
def fitted(model: nn.Module, budget: Budget) -> int:
    """Give every matrix, in place, the values that hqq's codes stand for. Returns the bytes they take."""
    total = 0
    for layer in mixture_layers(model).values():
        for expert in range(layer.bank.num_experts):
            for name in layer.bank.projections:
                values, taken = half_quadratic(layer.bank.weight(expert, name), 4, 2 * sizes(budget)[-1])
                layer.bank.weight(expert, name).copy_(values)
                total += taken
    return total


def run(arm: str, seed: int, budget: Budget) -> Mapping[str, float]:
    """Pack a copy of the trained mixture one way and measure its perplexity."""
    size = scale(budget)
    way, outliers = arm.removesuffix("_outliers"), arm.endswith("_outliers")
    rows = rows_of(corpus_of(size).heldout, size)
    source = _float(size, seed, outliers)
    if way == "float":
        found = {"moved": 0.0}
        if outliers:
            with torch.no_grad():
                gap = source(**rows[0]).logits - _float(size, seed, False)(**rows[0]).logits
            found["moved"] = float(gap.abs().max())
        return {"ppl": math.exp(row_losses(source, rows).mean()), **found}
    packed = copy.deepcopy(source)
    if way == "hqq":
        taken = fitted(packed, budget)
        weights = sum(part.numel() for layer in mixture_layers(packed).values() for part in layer.bank.parameters())
        ppl = math.exp(row_losses(packed, rows).mean())
        return {"ppl": ppl, "bytes": float(taken), "bits_per_weight": 8 * taken / weights}
    plan = column_more(source, budget, seed) if way == "column_more" else plan_of(way, source, budget)
    receipt = surgery.apply(packed, plan)
    return {
        "ppl": math.exp(row_losses(packed, rows).mean()),
        "bytes": float(receipt["bytes"]["experts"]["after"]),
        "bits_per_weight": receipt["bits_per_weight"]["after"],
    }


TELLS = (
    "as it is and with outliers: float {float} and {float_outliers}, whole rows {column} and {column_outliers}, whole "
    "rows with matrices of 8 bits at equal bytes {column_more} and {column_more_outliers}, finest groups {fixed} and "
    "{fixed_outliers}, hqq in as many bytes as these {hqq} and {hqq_outliers}, adaptive {adaptive} and "
    "{adaptive_outliers}; bits a weight of adaptive "
    "{adaptive.bits_per_weight} and {adaptive_outliers.bits_per_weight}, of finest groups {fixed.bits_per_weight}."
)

STUDY = Study(
    paper="finequant",
    title="Where scales stand in 4-bit experts",
    setting=(
        "A decoder of 3 layers, width 96, 8 experts of width 256 and 2 a token, trained for 600 steps of 768 tokens of "
        "the standard library's source files in float32; its experts are packed to the nearest codes with float16 "
        "scales. Adaptive groups are chosen among whole rows, 128, 64 and 32. The change scales 4 inner units of every "
        "expert by 50 and 4 by 1/50 without changing the function. The paper packs translation mixtures of 5B "
        "parameters and OPT-175B; its table of qualities could not be read, so none is quoted."
    ),
    claims=(
        Claim(
            key="lossless",
            text="Experts in 4 bits with adaptive groups stay within 0.5 % of the float mixture's perplexity.",
            where="abstract: minimal accuracy loss",
            claimed="minimal loss",
            metric="ppl",
            judge=NotWorse(method="adaptive", control="float", tolerance=0.005, relative=True),
            tells=TELLS,
        ),
        Claim(
            key="eight_bits",
            text="8 bits with one scale a row lose nothing: within 0.1 %.",
            where="section 4 (8 bits)",
            claimed="no loss",
            metric="ppl",
            judge=NotWorse(method="column8", control="float", tolerance=0.001, relative=True),
            tells="perplexity {column8} against {float}.",
        ),
        Claim(
            key="same_function",
            text="The change leaves the float mixture's perplexity alone.",
            where="not of the paper: a check of the test itself",
            claimed="none",
            metric="ppl",
            judge=Matches(method="float_outliers", other="float", tolerance=1e-4, relative=True),
            tells="perplexity {float_outliers} against {float}.",
        ),
        Claim(
            key="rows_fail",
            text="Outliers among the inputs ruin whole rows: a perplexity at least a fifth higher.",
            where="section 3: catastrophic failure of column-wise scales",
            claimed="can collapse",
            metric="ppl",
            judge=Beats(method="column", control="column_outliers", by=1 / 6, relative=True),
            tells=TELLS,
        ),
        Claim(
            key="adaptive_repairs",
            text="Adaptive groups are better there than whole rows at equal bytes.",
            where="section 3: adaptive granularity",
            claimed="better",
            metric="ppl",
            judge=Beats(method="adaptive_outliers", control="column_more_outliers", by=0.01, relative=True),
            tells=TELLS,
        ),
        Claim(
            key="as_good_as_finest",
            text="They are within 2 % of the finest groups everywhere.",
            where="section 3",
            claimed="as good as fine blocks",
            metric="ppl",
            judge=NotWorse(method="adaptive_outliers", control="fixed_outliers", tolerance=0.02, relative=True),
            tells=TELLS,
        ),
        Claim(
            key="fewer_bytes",
            text="They take fewer bytes than the finest groups.",
            where="section 3",
            claimed="fewer scales",
            metric="bytes",
            judge=Beats(method="adaptive_outliers", control="fixed_outliers"),
            tells="bytes of adaptive groups {adaptive_outliers}, of finest groups {fixed_outliers}.",
        ),
    ),
    arms=(
        Arm(name="float", text="the trained mixture", role="control"),
        Arm(name="column8", text="8 bits, one scale a row", role="reference"),
        Arm(name="column", text="4 bits, one scale a row", role="control"),
        Arm(name="column_more", text="the same, some matrices in 8 bits: bytes of adaptive", role="control"),
        Arm(name="fixed", text="4 bits, groups of 32 everywhere", role="control"),
        Arm(name="adaptive", text="4 bits, a group for each matrix"),
        Arm(name="hqq", text="4 bits by hqq, groups of 64: bytes of the finest groups", role="reference"),
        Arm(name="float_outliers", text="the mixture after the change", role="control"),
        Arm(name="column_outliers", text="after the change: one scale a row", role="control"),
        Arm(name="column_more_outliers", text="after the change: some matrices in 8 bits", role="control"),
        Arm(name="fixed_outliers", text="after the change: groups of 32", role="control"),
        Arm(name="adaptive_outliers", text="after the change: a group for each matrix"),
        Arm(name="hqq_outliers", text="after the change: hqq in groups of 64", role="reference"),
    ),
    run=run,
    methods=("compress.finequant", "compress.packed_experts"),
    units={"ppl": "perplexity", "bytes": "bytes of experts", "bits_per_weight": "bits"},
)
