"""What a packed model's speed is predicted from, by hand, and runs of models of very different size that check it."""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.engine import measure, profile, room
from moestro.engine.kernels.interface import LAYOUTS
from moestro.engine.pack import pack_model
from moestro.engine.packed import Packed
from moestro.engine.predict import DECODED, Mixture, Predictor, Work, layouts, verify
from moestro.engine.profile import ROWS, Attend, Cost, Disk, Profile, pairs, this_profile
from moestro.testing.tiny import tiny_folder
from tests.engine.test_pack_lowbits import compressed


DISK = Disk(latency_s=0.25, bytes_per_s=100.0)
NOTHING = Cost(once=0.0, row=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predict") / "model"
    wide = {"moe_intermediate_size": 2048, "num_experts": 8, "max_position_embeddings": 256}
    tiny_folder("qwen3_moe", path, head_dim=16, **wide)
    pack_model(path, path.parent / "packed", bits=8)
    return path.parent / "packed"


def made_up(**given: Any) -> Profile:
    each = {"q8": dict.fromkeys(ROWS, 1e9), "f32": dict.fromkeys(ROWS, 1e9)}
    facts = {
        "signature": "", "measured": "", "busy": 0.0, "weights_per_s": each,
        "attention": dict.fromkeys(("one", "many"), Attend(look_s=0.0, product_s=0.0)),
        **dict.fromkeys(("step", "layer", "resident", "stored"), NOTHING),
    }  # fmt: skip
    return Profile(**{**facts, **given})


def padded(shape: tuple[int, ...], layout: str = "q8") -> int:
    return -(-shape[0] // 16) * 16 * (shape[1] if layout == "f32" else -(-shape[1] // 64) * 64)


def test_rates_between_measured_rows() -> None:
    known = made_up(weights_per_s={"q8": {1: 1e9, 4: 4e9, 64: 1e9}})
    assert known.seconds(1e9, 1, "q8") == 1
    assert known.seconds(1e9, 0.5, "q8") == 1
    assert known.seconds(1e9, 2, "q8") == pytest.approx(1 / 2)
    assert known.seconds(1e9, 16, "q8") == pytest.approx(1 / 2)
    assert known.seconds(1e9, 128, "q8") == pytest.approx(2), "beyond the last, as many times longer as rows"


def test_looks_of_rows() -> None:
    assert pairs(1, 0) == 1
    assert pairs(3, 4) == 5 + 6 + 7
    assert pairs(3, 0, window=2) == 1 + 2 + 2


def test_a_decoded_token_by_hand(folder: Path) -> None:
    packed = Packed.open(folder)
    largest = max(there.stride for there in packed.experts.values())
    needed = room.room(packed, 1 << 30, 64, process=0).needed
    half = room.room(packed, needed + 8 * largest, 64, process=0)
    costs = {
        "step": Cost(once=1e-3, row=1e-5),
        "layer": Cost(once=1e-4, row=1e-6),
        "resident": Cost(once=7.0, row=7.0, expert=7.0),
        "stored": Cost(once=1e-2, row=2e-3, expert=3e-3),
        "attention": {"one": Attend(look_s=1e-6, product_s=1e-7), "many": Attend(look_s=9.0, product_s=9.0)},
    }
    work = Predictor(packed, half, made_up(**costs), Disk(latency_s=0.0, bytes_per_s=1e8)).work(1, 9)
    spec = packed.model
    dense = [p for n, p in packed.tensors.items() if len(p.shape) == 2 and n != "embedding"]
    weights = sum(padded(p.shape, p.layout) for p in dense)
    weights += padded((spec.vocab, spec.hidden)) if spec.tied else 0
    looks = 10 * spec.heads * (1e-6 + 2 * spec.head_dim * 1e-7)
    mixtures = [layer for layer in spec.layers if layer.router]
    beside = sum(1e-2 + layer.router.top_k * 2e-3 for layer in mixtures if layer.router)
    assert work.computing == pytest.approx(
        1e-3 + 1e-5 + len(spec.layers) * (1e-4 + 1e-6 + looks) + weights / 1e9 + beside
    )
    each = (2 * padded((2048, spec.hidden)) + padded((spec.hidden, 2048))) / 1e9 + 3e-3
    assert [m.needed for m in work.mixtures] == [layer.router.top_k for layer in mixtures if layer.router]
    for mixture in work.mixtures:
        assert mixture.each == pytest.approx(each)
        assert mixture.nbytes == largest
    speed = work.range()
    assert speed.low < speed.estimate < speed.high
    resident = Predictor(packed, room.room(packed, 1 << 30, 64, process=0), made_up(), None).work(1)
    assert resident.range().low == pytest.approx(resident.with_hits(1.0) / 1.25)


def test_a_prompt_by_hand(folder: Path) -> None:
    """Of 3 rows that choose k of E: rates at 2 and 4 rows would differ, and one row's logits are wanted."""
    packed = Packed.open(folder)
    spec, tokens = packed.model, 3
    q8 = {1: 1e9, 4: 2.5e8, 16: 1e8, 64: 1e7, 512: 1e6}
    rates = made_up(weights_per_s={"q8": q8, "f32": q8})
    resident = room.room(packed, 1 << 30, 64, process=0)
    head = packed.tensors["embedding" if spec.tied else "head"]
    wanted = rates.seconds(padded(head.shape, head.layout), 1, head.layout)
    for name, piece in packed.tensors.items():
        if len(piece.shape) == 2 and name not in ("embedding", "head"):
            wanted += rates.seconds(padded(piece.shape, piece.layout), tokens, piece.layout)
    predictor = Predictor(packed, resident, rates, None)
    work, counted = predictor.work(tokens), predictor.work(tokens, met=dict.fromkeys(packed.experts, 2.0))
    assert work.computing == pytest.approx(wanted)
    size = 2 * padded((2048, spec.hidden)) + padded((spec.hidden, 2048))
    found = zip([layer for layer in spec.layers if layer.router], work.mixtures, counted.mixtures, strict=True)
    for layer, mixture, told in found:
        assert layer.router
        k, num = layer.router.top_k, layer.experts
        met = num * (1 - (1 - k / num) ** tokens)
        assert mixture.needed == round(met)
        assert mixture.each * mixture.needed == pytest.approx(rates.seconds(met * size, tokens * k / met, "q8"))
        assert (told.needed, told.each) == (2, pytest.approx(rates.seconds(size, tokens * k / 2, "q8")))


def test_experts_of_several_layouts_cost_their_mean(tmp_path: Path) -> None:
    compressed(tmp_path, lambda expert: "ternary:row:bf16" if expert % 2 else "uint2:g64:f16")
    pack_model(tmp_path / "model", tmp_path / "packed", bits=8)
    packed = Packed.open(tmp_path / "packed")
    assert layouts(packed) == {"q8", "f32", "q2", "t1"}
    rates = {"q8": 1e9, "f32": 1e9, "q2": 1e6, "t1": 1e5}
    known = made_up(weights_per_s={layout: dict.fromkeys(ROWS, rate) for layout, rate in rates.items()})
    work = Predictor(packed, room.room(packed, 1 << 40, 64), known, None).work(1)
    for mixture in work.mixtures:
        odd = mixture.num // 2
        share = (odd / 1e5 + (mixture.num - odd) / 1e6) / mixture.num
        assert mixture.each == pytest.approx(3 * 64 * 128 * share)


def test_every_layout_can_be_measured() -> None:
    for layout in LAYOUTS:
        step = measure._step(measure._forward(measure._dense(layout, 64, 128, 1), 16, 1), 3)
        assert np.isfinite(step()).all(), layout


@pytest.mark.parametrize(
    ("misses", "slots", "seconds"),
    [
        (0, 4, 4 * 2.0),
        (1, 4, 4 * 2.0),  # 0.25 + 1 of reading, then the last one: hidden
        (4, 4, 8.0),
        (4, 2, 2 * (0.25 + 2 + 2)),  # two waves, each waits
        (1, 3, 3 * 2.0 + 0.25 + 1 + 2),  # residents fill the first wave, the second waits
    ],
)
def test_reads_hide_behind_what_is_there(misses: int, slots: int, seconds: float) -> None:
    mixture = Mixture(num=8, needed=4, each=2.0, nbytes=100.0)
    assert mixture.seconds(misses, slots, DISK) == pytest.approx(seconds)


def test_long_reads_are_waited_for() -> None:
    mixture = Mixture(num=8, needed=4, each=0.5, nbytes=100.0)
    assert mixture.seconds(3, 4, DISK) == pytest.approx(0.25 + 3 + 0.5)


def test_a_measured_hit_ratio_takes_its_place() -> None:
    mixture = Mixture(num=8, needed=2, each=0.5, nbytes=100.0)
    work = Work(tokens=10, computing=1.0, mixtures=(mixture,), slots=4, count=8, disk=DISK)
    assert work.with_hits(1.0) == pytest.approx(10 / 2)
    assert work.with_hits(0.0) == pytest.approx(10 / (1 + 0.25 + 2 + 0.5))
    assert work.with_hits(0.75) == pytest.approx(10 / (1 + 9 / 16 * 1 + 6 / 16 * 1.75 + 1 / 16 * 2.75))
    assert work.range().low == pytest.approx(work.with_hits(0.5) / 1.25)


def test_disks_by_two_points() -> None:
    assert Disk.of(100, 1.25, 5, 5.25) == Disk(latency_s=0.25, bytes_per_s=100.0)
    assert Disk.of(100, 1.0, 1, 1.0) == Disk(latency_s=0.0, bytes_per_s=100.0)
    assert DISK.seconds(50) == pytest.approx(0.75)


def test_costs_by_three_points() -> None:
    """One row with 2 and with 8 choices, 512 rows with 2 that meet all 16 experts."""
    once, choice, expert = 5.0, 2.0, 3.0
    found = measure._by_choices(once + 2 * 5, once + 8 * 5, once + 1024 * choice + 16 * expert)
    assert (found.once, found.row, found.expert) == pytest.approx((once, choice, expert))
    rows = measure._by_rows(7.0 + 1.5, 7.0 + 512 * 1.5)
    assert (rows.once, rows.row) == pytest.approx((7.0, 1.5))


def test_typical_is_the_median_pass_and_arms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ran = [0.0], []

    def arm(name: str, seconds: Iterator[float]) -> Any:
        def step() -> None:
            ran.append(name)
            now[0] += next(seconds)

        return step

    monkeypatch.setattr(measure, "_CLOCK", lambda: now[0])
    slow = iter([9.0, 1.0, *(2.0, 4.0), *(50.0, 50.0), *(1.0, 1.0)])
    fast = iter([9.0, 0.5, *(0.1, 0.3), *(0.4, 0.4), *(0.5, 0.5)])
    assert measure.typical([arm("a", slow), arm("b", fast)], 2, passes=3) == pytest.approx([3.0, 0.4])
    assert "".join(ran[4:]) == "aabb" * 3


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A machine that takes no time to measure; what was."""
    asked: list[str] = []
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "attention", lambda threads: (asked.append("attention"), made_up().attention)[1])
    monkeypatch.setattr(measure, "rates", lambda layout, *given: (asked.append(layout), dict.fromkeys(ROWS, 1e9))[1])
    names = ("step", "layer", "resident", "stored")
    monkeypatch.setattr(
        measure, "costs", lambda *given: (asked.append("costs"), dict.fromkeys(names, Cost(once=1e-5, row=0.0)))[1]
    )
    return asked


def test_the_profile_is_kept_and_added_to(quick: list[str]) -> None:
    whole = ["attention", "q8", "costs"]
    assert this_profile({"q8"}, 1).layer.once == 1e-5
    assert quick == whole
    this_profile({"q8"}, 1)
    assert quick == whole
    this_profile({"q8", "q4"}, 1)
    assert quick == [*whole, "q4"]
    this_profile({"q8"}, 2)
    assert quick[4:] == whole, "another number of threads"
    this_profile({"q8"}, 2, again=True)
    assert quick[7:] == whole
    profile.profile_file().write_text("{")
    this_profile({"q4"}, 2)
    assert quick[10:] == ["attention", "q4", "q8", "costs"], "a damaged file is made again; costs take the rates of q8"
    assert set(json.loads(profile.profile_file().read_text())["weights_per_s"]) == {"q4", "q8"}


def test_another_build_of_the_kernels_is_measured_anew(
    quick: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Kernels:
        name = "native"

        class module:
            class _native:
                __file__ = str(tmp_path / "kernels.so")

        def features(self) -> dict[str, str]:
            return {"isa": "avx2"}

    monkeypatch.setattr(profile, "choose", Kernels)
    (tmp_path / "kernels.so").write_bytes(b"one")
    first = this_profile({"q8"}, 1).signature
    this_profile({"q8"}, 1)
    assert quick.count("costs") == 1
    (tmp_path / "kernels.so").write_bytes(b"two")
    second = this_profile({"q8"}, 1).signature
    assert quick.count("costs") == 2
    assert first != second
    monkeypatch.setattr(profile, "VERSION", "9.9")
    assert "moestro 9.9" in this_profile({"q8"}, 1).signature
    assert quick.count("costs") == 3


def test_the_disk_is_read_as_the_store_reads(folder: Path) -> None:
    found = measure.disk(Packed.open(folder), 4, seconds=0.05)
    assert 1e4 < found.bytes_per_s < 1e12
    assert 0 <= found.latency_s < 10


def test_a_run_tells_what_a_plan_foresaw(folder: Path) -> None:
    packed = Packed.open(folder)
    largest = max(there.stride for there in packed.experts.values())
    needed = room.room(packed, 1 << 40, 192).needed
    found = verify(folder, room.room(packed, needed + 6 * largest, 192), 100, {})
    assert found.prompt > 0
    assert found.decode > 0
    assert 0 <= found.prompt_hits <= 1
    assert 0 < found.decode_hits < 1
    assert found.met.keys() == packed.experts.keys()
    assert all(2 <= met <= 8 for met in found.met.values())
    assert found.peak > 0
    assert layouts(packed) == {"q8", "f32"}


SIZES = {
    "tiny": {"hidden_size": 64, "head_dim": 16},
    "middle": {
        "hidden_size": 384, "intermediate_size": 768, "moe_intermediate_size": 256, "num_experts": 16,
        "num_experts_per_tok": 4, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 64, "vocab_size": 2048,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def one_processor() -> Iterator[pytest.MonkeyPatch]:
    """Time as this process's own on one processor: what else the machine does is not in it."""
    with pytest.MonkeyPatch.context() as patch:
        before = os.sched_getaffinity(0)
        patch.setattr(measure, "_CLOCK", time.process_time)
        patch.setattr(measure, "_BUDGET_S", 0.05)
        patch.setattr(measure, "_PASS_S", 0.005)
        patch.setattr(measure, "_BYTES", 32 << 20)
        os.sched_setaffinity(0, {min(before)})
        yield patch
        os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def measured(one_processor: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    one_processor.setenv("MOESTRO_CACHE", str(tmp_path_factory.mktemp("cache")))
    return this_profile({"q8", "f32"}, 1)


def test_real_rates_are_finite_and_fall_with_rows(measured: Profile) -> None:
    rates = measured.weights_per_s["q8"]
    assert list(rates) == list(ROWS)
    assert rates[512] < rates[1] < math.inf
    assert 0 < measured.attention["many"].product_s < measured.attention["one"].product_s < 1
    assert 0 < measured.step.seconds(1) + measured.layer.seconds(512) < 1
    assert 0 < measured.stored.once < 1


@pytest.mark.parametrize("size", [*SIZES, "large"])
def test_predictions_hold_from_tiny_models_to_large_ones(size: str, measured: Profile, tmp_path: Path) -> None:
    """All in memory: what a step costs, from some microseconds to most of a second."""
    if size == "large":
        given = os.environ.get("MOESTRO_BENCH_MODEL")
        if given is None:
            pytest.skip("MOESTRO_BENCH_MODEL names no folder with a large model")
        path = Path(given) / "packed-8"
    else:
        path = tmp_path / "packed"
        tiny_folder("qwen3_moe", tmp_path / "model", **SIZES[size], max_position_embeddings=512)
        pack_model(tmp_path / "model", path, bits=8)
    packed = Packed.open(path)
    place = room.room(packed, 1 << 40, 512)
    ran = verify(path, place, 512 - 2 * DECODED, {})
    predictor = Predictor(packed, place, measured, None)
    works = {"prompt": predictor.work(512 - 2 * DECODED, met=ran.met), "decode": predictor.work(1, 512 - DECODED)}
    for name, work in works.items():
        ratio = work.with_hits(1.0) / getattr(ran, name)
        assert 0.5 < ratio < 2, f"{name}: {ratio:.2f} times what was measured"


def test_a_store_costs_what_was_measured(measured: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but one expert in memory, and a disk that takes no time, as it takes none of this process's."""
    monkeypatch.setattr(room, "resident_set", lambda: 0)
    tiny_folder("qwen3_moe", tmp_path / "model", **SIZES["tiny"], num_experts=16, max_position_embeddings=512)
    pack_model(tmp_path / "model", tmp_path / "packed", bits=8)
    packed = Packed.open(tmp_path / "packed")
    largest = max(there.stride for there in packed.experts.values())
    place = room.room(packed, room.room(packed, 1 << 40, 512).needed + 31 * largest, 512)
    assert (place.slots, place.count) == (31, 32)
    ran = verify(packed.path, place, 512 - 2 * DECODED, {})
    assert ran.decode_hits > 0.9
    work = Predictor(packed, place, measured, Disk(latency_s=0.0, bytes_per_s=1e15)).work(1, 512 - DECODED)
    ratio = work.with_hits(ran.decode_hits) / ran.decode
    assert 0.5 < ratio < 2, f"{ratio:.2f} times what was measured"
    resident = Predictor(packed, room.room(packed, 1 << 40, 512), measured, None).work(1, 512 - DECODED)
    assert resident.with_hits(1.0) > 2 * work.with_hits(1.0), "a store costs a model as small as this most of a step"
