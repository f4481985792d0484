"""Tiers and predicted speeds against hand-worked cases; budgets that just fit and just do not."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.core.errors import PlanError
from moestro.core.plan import Plan, ServingPlan
from moestro.models.sizing import Amount, Attention, LayerSize, MixtureSize, ModelSize
from moestro.models.sizing_machine import Machine
from moestro.models.sizing_plan import (
    Range,
    Request,
    decode_speed,
    needs,
    place,
    prompt_speed,
    serving_plan,
    smallest,
)
from moestro.models.sizing_units import harmonic, parse_size


MACHINE = Machine(
    signature="by hand",
    measured="never",
    read_bytes_per_s=1000.0,
    disk_bytes_per_s=50.0,
    row_weights_per_s={32: 250.0, 16: 200.0, 8: 400.0, 4: 500.0},
    gemm_flops_per_s={1: 500.0, 8: 1000.0, 32: 4000.0, 128: 4000.0, 512: 4000.0},
    step_s=0.5,
    layer_s=0.25,
    mixture_s=0.125,
    choice_s=0.0625,
    process_bytes=300,
)


def moe(num_layers: int = 3, experts: int = 4, top_k: int = 2, slab: int = 100, **fields: Any) -> ModelSize:
    """A model of layers with 40 common matrix weights and ``experts`` slabs each, all in float32; D 0, head 60."""
    attention = Attention(heads=2, qk_dim=3, v_dim=3, cached=5)
    mixture = MixtureSize(
        path="mlp",
        num_experts=experts,
        top_k=top_k,
        experts=Amount(experts * slab, experts * slab, 4 * experts * slab),
    )
    layers = tuple(
        LayerSize(
            stack="decoder",
            index=index,
            parts={"attention": Amount(40, 40, 160)},
            mixtures=(mixture,) if experts else (),
            attentions=(attention,),
        )
        for index in range(num_layers)
    )
    outside = {"head": Amount(60, 60, 240)}
    return ModelSize(name="m", family="x", layers=layers, outside=outside, head_matrix=60, **fields)


def test_the_tiers_by_hand() -> None:
    size = moe()
    request = Request(memory=5000, context=10)
    # Common weights 3 * 160 + 240, cache 3 * 5 * 10 * 4, process 300; slabs of 400 bytes, 12 of them.
    tiers = place(size, request, 300)
    assert (tiers.weights, tiers.cache, tiers.process, tiers.working) == (720, 600, 300, 0)
    assert (tiers.slots, tiers.experts, tiers.disk) == (8, 3200, 1600)
    assert tiers.memory == 4820
    assert needs(size, request, 300)["experts"] == 800
    assert place(size, Request(memory=6420, context=10), 300).disk == 0
    assert place(size, Request(memory=6419, context=10), 300).slots == 11


@given(
    budget=st.integers(1, 20_000),
    context=st.one_of(st.integers(1, 40), st.just(600)),
    bits=st.sampled_from([None, 4, 8, 16, 32]),
    experts=st.sampled_from([0, 1, 5]),
    process=st.integers(0, 1000),
)
def test_any_budget_is_kept_or_refused_with_one_that_works(
    budget: int, context: int, bits: int | None, experts: int, process: int
) -> None:
    size = moe(experts=experts, top_k=min(2, max(experts, 1)), width=2, vocabulary=7)
    request = Request(memory=budget, context=context, bits=bits)
    least = smallest(size, request, process)
    if budget < least:
        with pytest.raises(PlanError) as caught:
            place(size, request, process)
        said = str(caught.value)
        assert "\n" not in said
        offered = re.search(r"--memory (\S+)", said)
        assert offered is not None
        bigger = parse_size(offered[1])
        assert least <= bigger <= least * 1.02 + 1
        place(size, Request(memory=bigger, context=context, bits=bits), process)
        narrower = re.search(r"--bits (\d+)", said)
        if narrower is not None:
            place(size, Request(memory=budget, context=context, bits=int(narrower[1])), process)
        shorter = re.search(r"--context (\d+)", said)
        if shorter is not None:
            place(size, Request(memory=budget, context=int(shorter[1]), bits=bits), process)
    else:
        tiers = place(size, request, process)
        assert tiers.memory <= budget
        everything = sum(m.num_experts * m.slab.bytes_at(bits) for m in size.mixtures)
        assert tiers.experts + tiers.disk == everything
        assert 0 <= tiers.slots <= tiers.num_experts
        assert (tiers.disk == 0) == (tiers.slots == tiers.num_experts)


def test_the_numbers_are_in_the_refusal() -> None:
    with pytest.raises(PlanError) as caught:
        place(moe(), Request(memory=1000, context=10), 300)
    assert str(caught.value) == (
        "m does not fit into 1000 B: it needs 2.36 KiB (weights that every token needs 720 B, "
        "cache of 10 positions 600 B, the process 300 B, experts of one token in one layer 800 B); "
        "what works: --memory 2.37KiB"
    )
    with pytest.raises(PlanError, match=r"2\.37KiB or --bits 16"):
        place(moe(), Request(memory=2000, context=10), 300)


def test_a_context_beyond_the_models_is_refused() -> None:
    size = moe(positions=64)
    place(size, Request(memory=10**6, context=64), 0)
    with pytest.raises(PlanError, match="--context 64 or less"):
        place(size, Request(memory=10**6, context=65), 0)


def test_decoding_by_hand() -> None:
    size = moe()
    fixed = 0.5 + 3 * 0.25 + 3 * (0.125 + 2 * 0.0625)
    products = (3 * 40 + 60) / 250 + 3 * 200 / 250
    seconds = fixed + products + 600 / 1000
    request = Request(memory=10_000, context=10)
    speed = decode_speed(size, request, place(size, request, 300), MACHINE)
    assert speed is not None
    assert speed.low == pytest.approx(1 / seconds / 1.25)
    assert speed.estimate == pytest.approx(1 / seconds)
    assert speed.high == pytest.approx(1 / seconds * 1.25)
    # 8 of 12 slabs in memory: a third of the 2 * 400 bytes a layer is read at 50 bytes a second.
    request = Request(memory=5000, context=10)
    speed = decode_speed(size, request, place(size, request, 300), MACHINE)
    assert speed is not None
    assert speed.low == pytest.approx(1 / (seconds + 3 * 800 / 3 / 50) / 1.25)
    share = harmonic(4 * 2 / 3) / harmonic(4)
    assert speed.high == pytest.approx(1 / max(seconds, 3 * 800 * (1 - share) / 50) * 1.25)
    assert speed.estimate == pytest.approx((speed.low * speed.high) ** 0.5)


def test_a_busy_measurement_lowers_the_slow_end_only() -> None:
    size, request = moe(), Request(memory=10_000, context=10)
    tiers = place(size, request, 300)
    for speed in (decode_speed, prompt_speed):
        calm, light, busy = (
            speed(size, request, tiers, MACHINE.model_copy(update={"busy": value})) for value in (0.0, 0.9, 4.0)
        )
        assert calm is not None
        assert busy is not None
        assert light == calm
        assert busy.low == pytest.approx(calm.low / 4)
        assert busy.high == calm.high
        assert busy.estimate == pytest.approx(calm.estimate / 2)


def test_packed_weights_by_hand() -> None:
    size = moe(experts=0)
    request = Request(memory=10_000, context=10, bits=4)
    speed = decode_speed(size, request, place(size, request, 0), MACHINE)
    assert speed is not None
    assert speed.estimate == pytest.approx(1 / (0.5 + 0.75 + 180 / 500 + 600 / 1000))


def test_a_prompt_by_hand() -> None:
    size = moe()
    request = Request(memory=10_000, context=32)
    speed = prompt_speed(size, request, place(size, request, 300), MACHINE)
    distinct = 4 * (1 - 0.5**32)
    rows = 64 / distinct
    assert 15.9 < rows < 16.1
    rate = (1000.0 * 4000.0) ** 0.5  # 16 rows lie halfway between 8 and 32 in logarithms
    seconds = 0.5 + 0.75 + 120 * 2 * 32 / 4000 + 60 / 250 + 3 * 24 * 32 * 32 / 4000
    seconds += 3 * (0.125 + distinct * 0.0625 + distinct * 100 * 2 * rows / rate)
    assert speed.estimate == pytest.approx(32 / seconds, rel=1e-6)


def test_more_memory_is_never_slower() -> None:
    size = moe(num_layers=2, experts=16, top_k=3)
    speeds = []
    for memory in range(smallest(size, Request(memory=1, context=4), 0), 15_000, 100):
        request = Request(memory=memory, context=4)
        tiers = place(size, request, 0)
        speeds.append((decode_speed(size, request, tiers, MACHINE), prompt_speed(size, request, tiers, MACHINE)))
    for slower, faster in pairwise(speeds):
        for a, b in zip(slower, faster, strict=True):
            assert a is not None
            assert b is not None
            assert a.low <= b.low
            assert a.estimate <= b.estimate
            assert a.low <= a.estimate <= a.high
    assert speeds[0][0] != speeds[-1][0]


def test_an_encoder_does_not_decode() -> None:
    attention = Attention(heads=1, qk_dim=2, v_dim=2, causal=False)
    layer = LayerSize(stack="encoder", index=0, parts={"dense": Amount(8, 8, 32)}, attentions=(attention,))
    size = ModelSize(name="e", family="x", layers=(layer,), outside={})
    request = Request(memory=1000, context=4)
    tiers = place(size, request, 0)
    assert decode_speed(size, request, tiers, MACHINE) is None
    assert prompt_speed(size, request, tiers, MACHINE).estimate > 0


@pytest.mark.parametrize("number", [1, 2, 5, 40])
def test_harmonic_numbers(number: int) -> None:
    assert harmonic(number) == pytest.approx(sum(1 / i for i in range(1, number + 1)), rel=0.01)
    assert harmonic(0) == 0


def test_the_plan_is_a_file(tmp_path: Path) -> None:
    size = moe()
    request = Request(memory=5000, context=10, bits=32)
    tiers = place(size, request, 300)
    plan = serving_plan(size, request, tiers, {"decode": Range(1.0, 2.0, 4.0), "prompt": None})
    read = Plan.load(plan.save(tmp_path / "plan.json"))
    assert isinstance(read, ServingPlan)
    assert read == plan
    assert read.budget_bytes == 5000
    assert sum(n for name, n in read.tiers.items() if name.startswith("memory.")) == tiers.memory
    assert read.tiers["disk.experts"] == 1600
    assert read.notes["tokens_per_second"]["decode"] == {"low": 1.0, "estimate": 2.0, "high": 4.0}
