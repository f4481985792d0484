"""Will a model fit into a memory budget, what lies where, and how fast will it be: from sizes and measured rates.

Tiers
    In memory stay the process, all weights but the routed experts, the cache for the whole context and some working
    space. What is left holds experts; those that do not fit are read from disk when a token chooses them. At least the
    experts one token needs in the largest layer must fit.

Speed of a decoded token

    seconds = step + L * layer + sum over mixtures (mixture + k * choice)          fixed costs
            + weights met * seconds per weight(1 row, bits)                        products
            + cache bytes / memory rate                                            attention
            + k * slab bytes * (1 - hits) / disk rate                              experts that are not in memory

    A prompt of T tokens is the same with T rows for common weights, T k / d rows for each of the
    d = E (1 - (1 - k/E)^T) distinct experts a layer needs, products of attention at the rate of T rows, and
    (1 - hits) d slabs to read.

What routing will do is not in a header, so a speed is a range. Its slow end: choices are uniform (hits = the share of
experts in memory), and no read is hidden behind computing. Its fast end: choices follow Zipf's law and the popular
experts are in memory (hits = H(share * E) / H(E), H the harmonic numbers), and reads and computing overlap in full.
Both ends are widened by a quarter, which is what rates vary by from run to run on a shared machine. Rates are the best
of several short runs, which slip in between what else runs, and a token does not: where ``busy`` processes wanted every
core during the measurement, the slow end is divided by that number. The estimate is the geometric mean of the ends.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from moestro.core.errors import PlanError
from moestro.core.plan import ServingPlan
from moestro.models.sizing import Amount, LayerSize, ModelSize, total
from moestro.models.sizing_machine import Machine
from moestro.models.sizing_units import Range, expected_hits, flag_size, show_size


BITS = (4, 8, 16, 32)
PROMPT = 512
_ROWS_KEPT = 8
_NOISE = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """Bytes by place.

    Attributes:
        weights: all but the routed experts. cache: for the whole context. process: without a model. working: for
            activations. experts: those in memory. disk: the experts that are not.
        slots: experts in memory. num_experts: all of them.
    """

    weights: int
    cache: int
    process: int
    working: int
    experts: int
    disk: int
    slots: int
    num_experts: int

    @property
    def memory(self) -> int:
        """Bytes in memory."""
        return self.weights + self.cache + self.process + self.working + self.experts

    @property
    def share(self) -> float:
        """Share of the routed experts that is in memory; 1 without any."""
        return self.slots / self.num_experts if self.num_experts else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asks for; every field is a constraint. ``bits`` None keeps the stored types."""

    memory: int
    context: int = 4096
    bits: int | None = None

    def itemsize(self, size: ModelSize) -> int:
        """Bytes of a number of the cache."""
        return size.itemsize if self.bits is None else 2 if self.bits == 16 else 4


def needs(size: ModelSize, request: Request, process: int) -> dict[str, int]:
    """Bytes that must be in memory, by what they are for."""
    working = 4 * (min(PROMPT, request.context) * _ROWS_KEPT * size.width + size.vocabulary)
    return {
        "weights": size.resident.bytes_at(request.bits),
        "cache": size.cache_bytes(request.context, request.itemsize(size)),
        "process": process,
        "working": working,
        "experts": max((_least(layer, request.bits) for layer in size.layers), default=0),
    }


def _least(layer: LayerSize, bits: int | None) -> int:
    """Bytes of the experts that one token runs through in a layer."""
    return sum(math.ceil(mixture.top_k) * mixture.slab.bytes_at(bits) for mixture in layer.mixtures)


def smallest(size: ModelSize, request: Request, process: int) -> int:
    """The smallest budget that works."""
    return sum(needs(size, request, process).values())


def place(size: ModelSize, request: Request, process: int) -> Tiers:
    """What lies where.

    Raises:
        PlanError: the budget is too small, or the context longer than the model was made for; with the numbers, and
            what would work.
    """
    if size.positions is not None and request.context > size.positions:
        raise PlanError(
            f"{size.name}: a context of {request.context} is more than the {size.positions} positions the model was "
            f"made for; use --context {size.positions} or less"
        )
    needed = needs(size, request, process)
    least = sum(needed.values())
    if least > request.memory:
        raise PlanError(_too_small(size, request, process, needed))
    free = request.memory - (least - needed["experts"])
    slabs = [(mixture.slab.bytes_at(request.bits), mixture.num_experts) for mixture in size.mixtures]
    everything = sum(slab * count for slab, count in slabs)
    count = sum(count for _, count in slabs)
    largest = max((slab for slab, _ in slabs), default=0)
    fits = everything <= free
    slots = count if fits else min(free // largest, count)
    held = everything if fits else slots * everything // count
    return Tiers(
        weights=needed["weights"],
        cache=needed["cache"],
        process=needed["process"],
        working=needed["working"],
        experts=held,
        disk=everything - held,
        slots=slots,
        num_experts=count,
    )


def _too_small(size: ModelSize, request: Request, process: int, needed: dict[str, int]) -> str:
    words = {
        "weights": "weights that every token needs" if size.mixtures else "weights",
        "cache": f"cache of {request.context} positions",
        "process": "the process",
        "working": "working space",
        "experts": "experts of one token in one layer",
    }
    parts = ", ".join(f"{words[name]} {show_size(value)}" for name, value in needed.items() if value)
    ways = [f"--memory {flag_size(sum(needed.values()))}"]
    width = _width(size.whole, request.bits)
    narrower = (replace(request, bits=bits) for bits in reversed(BITS) if bits < width)
    shorter = (replace(request, context=context) for context in _halves(request.context))
    for other in (_first_fit(size, narrower, process), _first_fit(size, shorter, process)):
        if other is not None:
            flag = f"--context {other.context}" if other.bits == request.bits else f"--bits {other.bits}"
            ways.append(f"{flag} (needs {show_size(smallest(size, other, process))})")
    return (
        f"{size.name} does not fit into {show_size(request.memory)}: it needs {show_size(sum(needed.values()))} "
        f"({parts}); what works: {' or '.join(ways)}"
    )


def _halves(context: int) -> list[int]:
    """Shorter contexts worth offering."""
    return [context >> shift for shift in range(1, 5) if context >> shift >= 256]


def _first_fit(size: ModelSize, requests: Iterable[Request], process: int) -> Request | None:
    return next((other for other in requests if smallest(size, other, process) <= other.memory), None)


def decode_speed(size: ModelSize, request: Request, tiers: Tiers, machine: Machine) -> Range | None:
    """Tokens a second of one sequence whose cache is full; None for a model that does not decode."""
    layers = size.decoder
    if not layers:
        return None
    mixtures = [mixture for layer in layers for mixture in layer.mixtures]
    routed = total(mixture.active for mixture in mixtures)
    common = size.decode_weights() - routed.matrix
    seconds = machine.step_s + len(layers) * machine.layer_s
    seconds += sum(machine.mixture_s + mixture.top_k * machine.choice_s for mixture in mixtures)
    seconds += common * machine.seconds_per_weight(1, _width(size.resident, request.bits))
    seconds += routed.matrix * machine.seconds_per_weight(1, _width(routed, request.bits))
    seconds += size.cache_bytes(request.context, request.itemsize(size)) / machine.read_bytes_per_s
    expand = sum(2 * a.expand * (a.visible(request.context) - 1) for layer in layers for a in layer.attentions)
    seconds += expand / machine.gemm_flops_per_s[PROMPT]

    def reading(popular: bool) -> float:
        missing = (
            mixture.active.bytes_at(request.bits)
            * (1 - expected_hits(mixture.num_experts, tiers.share, popular=popular))
            for mixture in mixtures
        )
        return sum(missing) / machine.disk_bytes_per_s

    return _range(1, seconds, reading(popular=False), reading(popular=True), machine.busy)


def prompt_speed(size: ModelSize, request: Request, tiers: Tiers, machine: Machine) -> Range:
    """Tokens a second of reading a prompt of 512 tokens (the context, if that is shorter)."""
    tokens, layers = min(PROMPT, request.context), size.prompt
    resident = total(layer.resident for layer in layers).matrix + size.trunk
    width = _width(size.resident, request.bits)
    seconds = machine.step_s + len(layers) * machine.layer_s
    seconds += resident * machine.seconds_per_weight(tokens, width)
    seconds += size.head_matrix * machine.seconds_per_weight(1, width)
    pairs = sum(a.flops_per_pair * a.pairs(tokens, masked=True) for layer in layers for a in layer.attentions)
    seconds += pairs / machine.gemm_flops_per_s[PROMPT]
    reading = 0.0
    for mixture in (mixture for layer in layers for mixture in layer.mixtures):
        distinct, slab = mixture.distinct(tokens), mixture.slab
        rows = tokens * mixture.top_k / distinct
        seconds += machine.mixture_s + distinct * machine.choice_s
        seconds += distinct * slab.matrix * machine.seconds_per_weight(rows, _width(slab, request.bits))
        reading += distinct * slab.bytes_at(request.bits) * (1 - tiers.share) / machine.disk_bytes_per_s
    return _range(tokens, seconds, reading, reading, machine.busy)


def _width(amount: Amount, bits: int | None) -> float:
    """Bits of a weight: as asked, else as stored on average."""
    return bits or 8 * amount.nbytes / max(amount.parameters, 1)


def _range(tokens: int, computing: float, reading: float, fewest: float, busy: float) -> Range:
    low = tokens / (computing + reading) / _NOISE / max(busy, 1.0)
    high = tokens / max(computing, fewest) * _NOISE
    return Range(low, math.sqrt(low * high), high)


def serving_plan(size: ModelSize, request: Request, tiers: Tiers, speeds: dict[str, Range | None]) -> ServingPlan:
    """The plan as a file that serving can follow."""
    return ServingPlan(
        method="plan",
        config={"context": request.context, "bits": request.bits},
        budget_bytes=request.memory,
        context=request.context,
        tiers={
            "memory.weights": tiers.weights,
            "memory.cache": tiers.cache,
            "memory.process": tiers.process,
            "memory.working": tiers.working,
            "memory.experts": tiers.experts,
            "disk.experts": tiers.disk,
        },
        notes=notes(size, tiers, speeds),
    )


def notes(size: ModelSize, tiers: Tiers, speeds: dict[str, Range | None]) -> dict[str, Any]:
    """What a reader of a plan wants to know besides the bytes."""
    return {
        "model": size.name,
        "family": size.family,
        "parameters": size.whole.parameters,
        "active_parameters": size.active_parameters,
        "experts": tiers.num_experts,
        "experts_in_memory": tiers.slots,
        "tokens_per_second": {name: None if speed is None else asdict(speed) for name, speed in speeds.items()},
    }
