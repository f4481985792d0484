"""Bits for each expert of a layer, chosen by an exact integer programme from what calibration shows of the experts.

For expert i let phi_i be its share of the choices, w_i its share of the gates, and eps_ij how far the layer's output
moves when i alone has j bits. With x_ij = 1 where expert i gets j bits, each layer solves

    min  sum_ij phi_i^alpha w_i^beta eps_ij^gamma x_ij
    s.t. sum_j x_ij = 1,   sum_ij j x_ij = floor(E k)  (or: stored bytes <= a budget),   least numbers at some widths

exactly, by dynamic programming; phi and w are counted by the shared calibration. Codes are chosen by GPTQ on every
expert's own inputs; 1 bit is sign times the mean |w| of a group. Attention, routers, norms and embeddings stay as they
are.

Source: MC-MoE (2410.06270, section 3.2: eq. 3 and 4; 3 bits and 2 bits for at least one expert each; gamma = 2 as in
the paper, while its code raises eps to alpha).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from moestro.core.card import MethodCard
from moestro.core.errors import ConfigError, PlanError
from moestro.core.inputs import LayerShape, PlanInputs
from moestro.core.plan import BitPlan, MethodUse
from moestro.methods.compress._parts.calibration import Counted
from moestro.methods.compress._parts.gptq import GPTQ
from moestro.methods.compress._parts.mixtures import float_mixtures
from moestro.methods.compress._parts.programme import Array, allocate
from moestro.methods.compress._parts.sensitivity import sensitivity
from moestro.observe.statistics import LayerStats
from moestro.ops.formats import Packing, packed_nbytes
from moestro.surgery.rounding import Nearest


class Config(Counted):
    """Settings.

    Attributes:
        avg_bits: k, mean bits of a layer's experts; a fraction of a bit that is left over is not used.
        layer_bytes: instead of k, the most that the experts of a layer may take, scales and zero points included.
        choices: widths to choose among: 1 to 4 or 8 bits. require: width -> experts that have it at least.
        alpha, beta, gamma: exponents of frequency, weight and sensitivity.
        allocation: pmq is the programme. frequency, weight and sensitivity let one measurement decide alone; random
            deals the programme's widths out at random; uniform gives every expert avg_bits.
        group_size: inputs that share a scale, whole rows where they are shorter. scale_type: of scales.
        rounding: gptq, or nearest. percdamp, blocksize: of GPTQ.
        policy, raise_to: whom a calibration token counts for, in the programme and in GPTQ: natural, raised (to
            raise_to experts) or all.
        least: tokens below which an expert is starved. allow_starved: go on with half or more of them starved.
    """

    avg_bits: float = Field(default=2.5, gt=0)
    layer_bytes: int | None = Field(default=None, ge=1)
    choices: tuple[Literal[1, 2, 3, 4, 8], ...] = (1, 2, 3)
    require: dict[int, int] = Field(default_factory=lambda: {3: 1, 2: 1})
    alpha: float = Field(default=1.0, ge=0)
    beta: float = Field(default=1.5, ge=0)
    gamma: float = Field(default=2.0, ge=0)
    allocation: Literal["pmq", "random", "frequency", "weight", "sensitivity", "uniform"] = "pmq"
    group_size: int = Field(default=128, ge=1)
    scale_type: Literal["f32", "f16", "bf16"] = "f16"
    rounding: Literal["gptq", "nearest"] = "gptq"
    percdamp: float = Field(default=0.01, gt=0)
    blocksize: int = Field(default=128, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if not self.choices or list(self.choices) != sorted(set(self.choices)):
            raise ConfigError(f"choices={list(self.choices)} must rise, each width once")
        odd = [width for width, count in self.require.items() if width not in self.choices or count < 0]
        if odd and self.allocation != "uniform":
            raise ConfigError(f"require names {odd[0]} bits; choices are {list(self.choices)}, numbers at least 0")
        if self.allocation == "uniform" and (self.avg_bits not in self.choices or self.layer_bytes is not None):
            raise ConfigError(f"uniform needs avg_bits among {list(self.choices)} and no layer_bytes")
        return self


def rounding(config: Config) -> GPTQ | Nearest:
    """How surgery rounds by a plan of this method."""
    if config.rounding == "nearest":
        return Nearest()
    return GPTQ(config.percdamp, config.blocksize, policy=config.policy, raise_to=config.raise_to)


def statistics(config: Config) -> dict[str, dict[str, object]]:
    """What is measured on data: frequencies and gates; sensitivities follow once the data has reached the experts."""
    return config.measured()


def packing_of(bits: int, config: Config) -> Packing:
    """The packing of a number of bits: one is a sign, more have a zero point."""
    return Packing(f"{'sign' if bits == 1 else 'uint'}{bits}", config.group_size, config.scale_type)


def costs(seen: LayerStats, eps_EJ: Tensor, config: Config) -> Array:
    """What the programme minimises, [E, J], scaled so that its largest entry is 1."""
    weight_E = weights_of(seen)
    phi = (seen.count_E.double() / max(1, int(seen.count_E.sum()))).numpy()
    weight = (weight_E / max(float(weight_E.sum()), 1e-300)).numpy()
    eps = eps_EJ.numpy()
    if config.allocation in ("frequency", "weight"):
        eps = np.broadcast_to(eps.mean(0), eps.shape)  # all experts alike: the one measurement decides
    alpha = config.alpha if config.allocation not in ("weight", "sensitivity") else 0.0
    beta = config.beta if config.allocation not in ("frequency", "sensitivity") else 0.0
    found: Array = (phi**alpha * weight**beta)[:, None] * eps**config.gamma
    top = found.max()
    return found / top if top > 0 and np.isfinite(top) else found


def weights_of(seen: LayerStats) -> Tensor:
    """Sum of each expert's gates before renormalisation, float64 [E]; of its weights, where a router has no scores."""
    return seen.weight.total if seen.logits is None else seen.gate.total


def widths_of(
    there: LayerShape, seen: LayerStats, eps_EJ: Tensor, config: Config, seed: int
) -> tuple[list[int], int, int]:
    """Bits of every expert of a layer; the budget, and the bytes they take."""
    size_J = [sum(matrix_bytes(there, bits, config)) for bits in config.choices]
    experts = there.num_experts or 0
    if config.allocation == "uniform":
        widths, budget = [int(config.avg_bits)] * experts, int(config.avg_bits) * experts
    else:
        widths, budget = allocated(there, costs(seen, eps_EJ, config), config)
        if config.allocation == "random":
            widths = [widths[i] for i in np.random.default_rng([seed, there.layer]).permutation(experts)]
    return widths, budget, sum(size_J[config.choices.index(bits)] for bits in widths)


def allocated(there: LayerShape, cost_EJ: Array, config: Config) -> tuple[list[int], int]:
    """The cheapest widths of a layer within the budget, and the budget.

    Raises:
        PlanError: a budget that cannot be kept; between which it can stands in the message.
    """
    least = [config.require.get(bits, 0) for bits in config.choices]
    exact = config.layer_bytes is None
    sizes = config.choices if exact else [sum(matrix_bytes(there, bits, config)) for bits in config.choices]
    budget = math.floor(len(cost_EJ) * config.avg_bits + 1e-9) if config.layer_bytes is None else config.layer_bytes
    try:
        places = allocate(cost_EJ, sizes, budget, exact=exact, least_J=least)
    except PlanError as error:
        raise PlanError(f"layer {there.layer}: {error}") from None
    return [config.choices[place] for place in places], budget


def check(inputs: PlanInputs, config: Config) -> None:
    """Refuse what needs no measurement to be refused.

    Raises:
        PlanError: no mixtures, packed ones, or a budget that cannot be kept.
    """
    for there in float_mixtures(inputs).values():
        if config.allocation != "uniform":
            allocated(there, np.zeros((there.num_experts or 0, len(config.choices))), config)


def matrix_bytes(there: LayerShape, bits: int, config: Config) -> list[int]:
    """Stored bytes of each matrix of one expert."""
    used = packing_of(bits, config)
    shapes = [there.matrix(name) for name in there.projections]
    return [packed_nbytes(shape, used.fitting(shape[1])) for shape in shapes]


def lines(notes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The allocation for people."""
    return [
        f"layer {note['layer']}: bits {' '.join(map(str, note['bits']))}; {note['bytes']:,} bytes, "
        f"{note['bytes_per_token']:,.0f} a token"
        for note in notes
    ]


def plan(inputs: PlanInputs, config: Config) -> BitPlan:
    """Bits for every expert of every mixture, and what they take on disk and for a token.

    Raises:
        PlanError: no mixtures, no model or data to measure on, a budget that cannot be kept.
    """
    mixtures = float_mixtures(inputs)
    if inputs.model is None or inputs.batches is None:
        raise PlanError("compress.mc_moe measures on data; give an open model and calibration data (--data)")
    use = {layer: inputs.statistic("experts", layer) for layer in mixtures}
    batches = [batch if isinstance(batch, Mapping) else {"input_ids": batch} for batch in inputs.batches]
    eps = sensitivity(
        inputs.model,
        batches,
        list(mixtures),
        [packing_of(bits, config) for bits in config.choices],
        policy=config.policy,
        raise_to=config.raise_to,
    )
    bits: dict[str, float] = {}
    formats: dict[str, str] = {}
    notes = []
    for layer, there in mixtures.items():
        seen = use[layer]
        widths, budget, taken = widths_of(there, seen, eps[layer], config, inputs.seed)
        for expert, width in enumerate(widths):
            for name in there.projections:
                bits[f"{layer}/{expert}/{name}"] = width
                formats[f"{layer}/{expert}/{name}"] = str(packing_of(width, config).fitting(there.matrix(name)[1]))
        share = seen.natural_E.double() / max(1, inputs.statistics["experts"].stats.num_tokens)
        each = [sum(matrix_bytes(there, width, config)) for width in widths]
        notes.append(
            {
                "layer": layer, "bits": widths, "budget": budget, "bytes": taken,
                "bytes_per_token": float(sum(s * b for s, b in zip(share.tolist(), each, strict=True))),
                "tokens": seen.count_E.tolist(), "weight": weights_of(seen).tolist(),
                "sensitivity": eps[layer].tolist(),
            }
        )  # fmt: skip
    settings = config.model_dump(mode="json")
    return BitPlan(
        method="compress.mc_moe",
        config=settings,
        seed=inputs.seed,
        model_hash=inputs.subject.fingerprint(),
        bits=bits,
        formats=formats,
        rounding=MethodUse(method="compress.mc_moe", config=settings),
        notes={"keeps": "nothing", "layers": notes, "lines": lines(notes)},
    )


CARD = MethodCard(
    title="MC-MoE: Mixture Compressor for Mixture-of-Experts LLMs Gains More",
    year=2024,
    arxiv="2410.06270",
    paper="mc-moe",
    summary="One to three bits an expert by an exact programme of use, weight and sensitivity; codes by GPTQ.",
    taxonomy="inference/model/compression/quantisation",
    needs=("model",),
    deviations=(
        "eps is raised to gamma as in the paper; its code raises it to alpha",
        "attention stays as it is; the paper packs it in 4 bits",
        "errors are made up for within a block at all widths; the paper's code does so above 3 bits only",
        "a budget may be one of stored bytes, scales and zero points included",
    ),
)
