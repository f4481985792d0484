"""Where the bytes of a packed model go, what its speed is predicted from, and a run that checks both."""

import json
import math
from pathlib import Path

import pytest

from moestro.core.errors import ConfigError
from moestro.engine import profile, room
from moestro.engine.open_native import Native
from moestro.engine.pack import pack_model
from moestro.engine.packed import EXPERTS, Packed
from moestro.engine.predict import Predictor, Work, layouts, verify
from moestro.engine.profile import ROWS, Profile, disk_rate, this_profile
from moestro.testing.tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("room") / "model"
    wide = {"moe_intermediate_size": 2048, "num_experts": 8, "max_position_embeddings": 256}
    tiny_folder("qwen3_moe", path, head_dim=16, **wide)
    pack_model(path, path.parent / "packed", bits=8)
    return path.parent / "packed"


def made_up(**rates: float) -> Profile:
    each = {"q8": dict.fromkeys(ROWS, 1e9), "f32": dict.fromkeys(ROWS, 1e9)}
    return Profile(signature="", measured="", weights_per_s=each, layer_s=1e-5, mixture_s=2e-5)


def test_the_sums_are_those_of_the_engine(folder: Path) -> None:
    packed = Packed.open(folder)
    found = room.room(packed, 1 << 30, 64, process=50 << 20)
    assert found.weights == sum(piece.nbytes for piece in packed.tensors.values())
    assert found.budget + found.needed == 1 << 30
    assert (found.slots, found.held, found.disk) == (16, found.experts, 0)
    largest = max(there.stride for there in packed.experts.values())
    few = room.room(packed, found.needed + 5 * largest + 7, 64, process=50 << 20)
    assert (few.slots, few.held, few.disk) == (5, 5 * largest, few.experts - 5 * largest)
    assert few.disk == (folder / EXPERTS).stat().st_size - 5 * largest
    native = Native(folder, 1 << 36, context=64)  # a limit that this process, full of PyTorch, is below
    assert native.forward.page_bytes * native.forward.pages == found.cache
    assert native.budget == native.room.budget == (1 << 36) - native.room.needed
    native.close()


def test_what_does_not_fit_is_refused_with_what_would(folder: Path) -> None:
    packed = Packed.open(folder)
    with pytest.raises(ConfigError, match=r"1,000 bytes are too few: .*give more memory \([\d,]+ at least\)") as error:
        room.room(packed, 1000, 64, process=0)
    least = int(str(error.value).split("give more memory (")[1].split(" ")[0].replace(",", ""))
    assert room.room(packed, least, 64, process=0).slots == 2
    with pytest.raises(ConfigError):
        room.room(packed, least - 1, 64, process=0)


def test_a_longer_context_leaves_room_for_fewer_experts(folder: Path) -> None:
    packed = Packed.open(folder)
    short, long = (room.room(packed, 1 << 30, context, process=0) for context in (64, 256))
    assert long.cache == 4 * short.cache
    assert long.budget == short.budget - 3 * short.cache


def test_rates_between_measured_rows(folder: Path) -> None:
    known = Profile(
        signature="", measured="", weights_per_s={"q8": {1: 1e9, 4: 4e9, 64: 1e9}}, layer_s=0.0, mixture_s=0.0
    )
    assert known.seconds(1e9, 1, "q8") == 1
    assert known.seconds(1e9, 0.5, "q8") == 1
    assert known.seconds(1e9, 2, "q8") == pytest.approx(1 / 2)
    assert known.seconds(1e9, 16, "q8") == pytest.approx(1 / 2)
    assert known.seconds(1e9, 128, "q8") == pytest.approx(2), "beyond the last, as many times longer as rows"


def test_a_decoded_token_by_hand(folder: Path) -> None:
    packed = Packed.open(folder)
    largest = max(there.stride for there in packed.experts.values())
    needed = room.room(packed, 1 << 30, 64, process=0).needed
    half = room.room(packed, needed + 8 * largest, 64, process=0)
    work = Predictor(packed, half, made_up(), disk=1e8).work(1)
    spec = packed.model
    dense = sum(math.prod(p.shape) for n, p in packed.tensors.items() if len(p.shape) == 2 and n != "embedding")
    dense += spec.vocab * spec.hidden if spec.tied else 0
    experts = sum(layer.router.top_k * 3 * layer.inner * spec.hidden for layer in spec.layers if layer.router)
    fixed = len(spec.layers) * 1e-5 + 2 * 2e-5
    assert work.computing == pytest.approx((dense + experts) / 1e9 + fixed)
    reads = sum(layer.router.top_k * largest for layer in spec.layers if layer.router) / 1e8
    assert work.whole == pytest.approx(reads)
    assert work.slow == pytest.approx(reads / 2)
    assert 0 < work.fast < work.slow
    speed = work.range()
    assert speed.low < speed.estimate < speed.high
    resident = Predictor(packed, room.room(packed, 1 << 30, 64, process=0), made_up(), disk=1e8).work(1)
    assert (resident.slow, resident.fast) == (0, 0)


def test_a_prompt_by_hand(folder: Path) -> None:
    """Of 3 rows that choose k of E: rates at 2 and 4 rows would differ, and one row's logits are wanted."""
    packed = Packed.open(folder)
    spec, tokens = packed.model, 3
    q8 = {1: 1e9, 4: 2.5e8, 16: 1e8, 64: 1e7, 512: 1e6}
    rates = Profile(signature="", measured="", weights_per_s={"q8": q8, "f32": q8}, layer_s=0.0, mixture_s=0.0)
    resident = room.room(packed, 1 << 30, 64, process=0)
    head = packed.tensors["embedding" if spec.tied else "head"]
    wanted, read = rates.seconds(math.prod(head.shape), 1, head.layout), 0.0
    for name, piece in packed.tensors.items():
        if len(piece.shape) == 2 and name not in ("embedding", "head"):
            wanted += rates.seconds(math.prod(piece.shape), tokens, piece.layout)
    for index, layer in enumerate(spec.layers):
        if layer.router:
            k, there = layer.router.top_k, packed.experts[index]
            met = there.num * (1 - (1 - k / there.num) ** tokens)
            wanted += rates.seconds(met * 3 * layer.inner * spec.hidden, tokens * k / met, "q8")
            read += met * there.stride / 1e8
    work = Predictor(packed, resident, rates, disk=1e8).work(tokens)
    assert work.computing == pytest.approx(wanted)
    assert work.whole == pytest.approx(read)


def test_a_measured_hit_ratio_takes_its_place() -> None:
    work = Work(tokens=10, computing=1.0, slow=3.0, fast=2.0, whole=4.0)
    assert work.with_hits(1.0) == 10
    assert work.with_hits(0.0) == pytest.approx(10 / (4 + 0.5))
    assert work.with_hits(0.5) == pytest.approx(10 / (2 + 0.5))


def test_the_profile_is_kept_and_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path))
    asked: list[str] = []

    def rates(layout: str, threads: int) -> dict[int, float]:
        asked.append(layout)
        return dict.fromkeys(ROWS, 1e9)

    monkeypatch.setattr(profile, "_rates", rates)
    monkeypatch.setattr(profile, "_layers", lambda threads: (asked.append("layers"), (1e-5, 1e-5))[1])
    assert this_profile({"q8"}, 1).layer_s == 1e-5
    assert asked == ["layers", "q8"]
    this_profile({"q8"}, 1)
    assert asked == ["layers", "q8"]
    this_profile({"q8", "q4"}, 1)
    assert asked == ["layers", "q8", "q4"]
    this_profile({"q8"}, 2)
    assert asked[3:] == ["layers", "q8"], "another number of threads"
    this_profile({"q8"}, 2, again=True)
    assert asked[5:] == ["layers", "q8"]
    profile.profile_file().write_text("{")
    this_profile({"q8"}, 2)
    assert asked[7:] == ["layers", "q8"], "a damaged file is made again"
    assert set(json.loads(profile.profile_file().read_text())["weights_per_s"]) == {"q8"}


def test_real_rates_are_finite_and_fall_with_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_BUDGET_S", 0.01)
    monkeypatch.setattr(profile, "_BYTES", 1 << 20)
    found = profile._rates("q8", 1)
    assert list(found) == list(ROWS)
    assert found[512] < found[1] < math.inf
    layer, mixture = profile._layers(1)
    assert 0 <= layer < 1
    assert 0 <= mixture < 1


def test_the_disk_is_read_as_the_store_reads(folder: Path) -> None:
    assert 1e4 < disk_rate(Packed.open(folder)) < 1e12


def test_a_run_tells_what_a_plan_foresaw(folder: Path) -> None:
    packed = Packed.open(folder)
    largest = max(there.stride for there in packed.experts.values())
    needed = room.room(packed, 1 << 40, 192).needed
    found = verify(folder, room.room(packed, needed + 6 * largest, 192), 100, {})
    assert found.prompt > 0
    assert found.decode > 0
    assert 0 <= found.prompt_hits <= 1
    assert 0 < found.decode_hits < 1
    assert found.peak > 0
    assert layouts(packed) == {"q8", "f32"}
