"""The benchmarks of the engine: recorded streams, arms in their own processes, limits that the kernel keeps, rows."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moestro.cli import main
from moestro.core.bank import StackedFFN
from moestro.core.errors import ConfigError
from moestro.core.trace import RoutingTrace, trace
from moestro.engine.pack import pack_model
from moestro.models.load import load
from moestro.testing.bench import _low_packs, _reference, _streams, _trained, cache, harness, offload, offload_bits
from moestro.testing.bench._cgroup import Group, drop, group
from moestro.testing.bench._children import ArmError, Child
from moestro.testing.bench._trained import recipe
from moestro.testing.bench.harness import Row
from moestro.testing.tiny import VOCAB, tiny_folder
from moestro.training.recipe import Recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture, packed in 8 bits, and a stream for it with routing."""
    folder = tmp_path_factory.mktemp("arms")
    wide = {"moe_intermediate_size": 4096, "num_experts": 16}  # experts of some size: processes differ by less
    config = tiny_folder("qwen3_moe", folder / "model", head_dim=16, max_position_embeddings=128, **wide).config
    pack_model(folder / "model", folder / "packed", bits=8)
    draw = np.random.default_rng(0)
    shape = (64, config.num_hidden_layers, config.num_experts)
    ids = np.argsort(draw.random(shape))[..., :2].astype(np.int32)
    tokens = draw.integers(0, config.vocab_size, 64).astype(np.int32)
    _streams.store(folder / "routed.npz", {"tokens": tokens, "ids": ids, "weights": _streams.even(ids)})
    _streams.store(folder / "plain.npz", {"tokens": tokens})
    return folder


def options(made: Path, stream: str, memory: int | None = None) -> dict[str, Any]:
    return {"folder": str(made / "packed"), "memory": memory, "context": 64, "threads": 1, "stream": str(made / stream)}


def test_streams_are_what_they_are_called() -> None:
    shape = (400, _reference.LAYERS, _reference.TOP_K)
    uniform, zipf, calm = _streams.uniform(400), _streams.zipf(400, 0.0), _streams.zipf(400, 0.3)
    for ids in (uniform, zipf, calm):
        assert ids.shape == shape
        assert all(len(set(row)) == shape[2] for row in ids.reshape(-1, shape[2]).tolist())
        assert ids.min() == 0
        assert ids.max() == _reference.EXPERTS - 1
    assert _streams.repeats(uniform) == pytest.approx(shape[2] / _reference.EXPERTS, abs=0.01)
    assert _streams.repeats(calm) > _streams.repeats(zipf) + 0.1
    loads = np.sort(np.bincount(zipf[:, 0].ravel(), minlength=_reference.EXPERTS))[::-1]
    assert 3 < loads[0] / loads[20] < 20, "the most popular against the 21st, without replacement"
    popular = [np.bincount(zipf[:, layer].ravel(), minlength=_reference.EXPERTS).argmax() for layer in range(12)]
    assert len(set(popular)) > 1, "layers have orders of their own"
    assert _streams.even(calm).sum(-1) == pytest.approx(np.ones(shape[:2]))


def test_a_trace_becomes_a_stream_token_by_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny_folder("mixtral", tmp_path / "model")
    model = load(tmp_path / "model")
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), trace(model, tmp_path / "run.trace"):
        model(input_ids=ids)
    found = RoutingTrace.open(tmp_path / "run.trace")
    with pytest.raises(
        ConfigError, match=r"2 layers of \(experts, choices\) \[\(5, 2\)\]; a replay needs 12 of \(64, 8\)"
    ):
        _streams.recorded(found)
    for name, value in (("LAYERS", 2), ("EXPERTS", 5), ("TOP_K", 2)):
        monkeypatch.setattr(_streams, name, value)
    stream = _streams.recorded(found)
    assert stream["tokens"].tolist() == ids.flatten().tolist()
    for block in found.scan():
        for row in zip(*(block[n].tolist() for n in ("sequence", "position", "layer", "rank", "expert")), strict=True):
            sequence, position, layer, rank, expert = row
            assert stream["ids"][9 * sequence + position, layer, rank] == expert
    assert stream["weights"].sum(-1) == pytest.approx(np.ones((18, 2)), abs=1e-5)


def test_arms_take_turns_and_time_themselves() -> None:
    order: list[str] = []

    def arm(name: str, seconds: float) -> Any:
        def run() -> float:
            order.append(name)
            return seconds

        return run

    found = harness.take_turns({"a": arm("a", 1.0), "b": arm("b", 2.0)}, rounds=2, warmup=1)
    assert "".join(order) == "ba" + "ab" + "ba"
    assert found == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    with pytest.raises(ConfigError, match="0 rounds"):
        harness.take_turns({"a": arm("a", 1.0)}, 0)


def test_the_same_bits_under_a_limit_and_without_torch(made: Path) -> None:
    digests = {}
    for name, memory in (("resident", None), ("limited", _just_enough(made))):
        with Child("engine", options(made, "routed.npz", memory)) as child:
            assert child.about["torch"] is False
            assert ("slots" in child.about) == (memory is not None)
            whole = child.feed(0, 16, 0)
            single = child.feed(16, 8, 16, single=True)
            digests[name] = (whole["digest"], single["digest"])
            if memory is not None:
                assert single["counters"]["misses"] > 0
                assert single["counters"]["hits"] + single["counters"]["misses"] >= 8 * 2
    assert digests["resident"] == digests["limited"]
    with Child("engine", options(made, "plain.npz")) as child:
        assert child.feed(0, 16, 0)["digest"] != digests["resident"][0], "the recorded routing was not followed"


def test_gates_say_what_was_recorded_and_are_read_ahead(made: Path) -> None:
    with np.load(made / "routed.npz") as stream:
        arrays = dict(stream)
    ids = arrays["ids"]
    for layer in range(ids.shape[1] - 1):  # each sees what the next one will choose
        arrays[f"peek.{layer}.{layer + 1}"] = peeks = np.zeros((len(ids), 16), np.float32)
        np.put_along_axis(peeks, ids[:, layer + 1], 5, axis=1)
    _streams.store(made / "told.npz", arrays)
    found = {}
    for name, forecast in (("demand", None), ("ahead", "serve.next_gate")):
        given = {**options(made, "told.npz", _just_enough(made)), "forecast": forecast}
        with Child("engine", given) as child:
            child.feed(0, 8, 0)
            found[name] = child.feed(8, 40, 8, single=True)
    assert found["demand"]["digest"] == found["ahead"]["digest"]
    assert found["demand"]["counters"]["prefetched"] == 0
    assert found["ahead"]["counters"]["prefetched"] > 10
    assert found["ahead"]["counters"]["wasted"] == 0, "every expert that was named is needed"


def test_gates_belong_to_the_trained_mixture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny_folder("mixtral", tmp_path / "model", head_dim=16)
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), trace(model := load(tmp_path / "model"), tmp_path / "run.trace"):
        model(input_ids=ids)
    for module in (_streams, _trained):
        monkeypatch.setattr(module, "LAYERS", 2)
    for name, value in (("EXPERTS", 5), ("TOP_K", 2)):
        monkeypatch.setattr(_streams, name, value)
    monkeypatch.setattr(_trained, "trained_model", lambda folder, steps: tmp_path / "model")
    whole = _streams.recorded(RoutingTrace.open(tmp_path / "run.trace"))
    stream = {name: values[:22] for name, values in whole.items()}  # two sequences and a part of the third
    told = _trained.trained_gates(tmp_path, stream)
    assert told.peeks.keys() == {(0, 1)}
    assert told.peeks[0, 1].shape == (22, 5)
    assert (told.tokens == stream["tokens"]).all()
    assert (told.positions == stream["positions"]).all()
    with pytest.raises(ConfigError, match=r"chooses \d+% of the experts that its trace names"):
        _trained.trained_gates(tmp_path, {**stream, "ids": (stream["ids"] + 1) % 5})


def _just_enough(made: Path) -> int:
    """Memory for a process and a few experts; the process says how large it is."""
    with pytest.raises(ArmError, match=r"bytes are too few") as error, Child("engine", options(made, "plain.npz", 1)):
        pass
    return int(str(error.value).split("give more memory (")[1].split(" at least")[0].replace(",", "")) + (2 << 20)


def test_an_arm_that_cannot_start_says_why(made: Path) -> None:
    with pytest.raises(ArmError, match=r"engine: .*nothing-here"):
        Child("engine", {**options(made, "plain.npz"), "folder": str(made / "nothing-here")})


@pytest.fixture
def limit() -> Any:
    found = group("moestro-test", 64 << 20)
    if found is None:
        pytest.skip("no memory cgroup may be made here")
    yield found
    found.close()


def test_the_kernel_keeps_the_limit(made: Path, limit: Group) -> None:
    assert limit.path.is_dir()
    with Child("engine", options(made, "plain.npz"), limit) as child:
        child.feed(0, 4, 0)
        held = limit.peak()
        assert held is None or 1 << 20 < held <= 64 << 20
    assert not limit.path.exists(), "the child removes its group"


def test_more_than_the_limit_is_killed(made: Path, limit: Group) -> None:
    big = made / "big.npz"
    _streams.store(big, {"tokens": np.zeros(64 << 20, np.int32)})
    with pytest.raises(ArmError, match="engine: killed, as under a limit of memory"):
        Child("engine", {**options(made, "plain.npz"), "stream": str(big)}, limit)


def test_files_leave_the_page_cache(tmp_path: Path) -> None:
    (tmp_path / "some").write_bytes(bytes(1 << 16))
    drop(tmp_path)
    assert (tmp_path / "some").read_bytes() == bytes(1 << 16)


def test_rows_without_a_peer_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_reference, "peer_is_here", lambda: False)
    why = offload._peer(Path("nowhere"), {}, "", SimpleNamespace())  # type: ignore[arg-type]
    assert why == "peer missing: llama-cpp-python is not installed"
    row = offload._rows("decode", [0.5, 0.25, 0.25], why, [], "a note")
    assert row == Row("decode", "speed", "tokens/s", 4.0, row.peer_name, None, None, 0.0, f"{why}; a note")
    monkeypatch.setattr(harness, "run", lambda *given: {"name": "x", "date": "", "machine": "", "rows": [vars(row)]})
    assert main(["bench", "offload"]) == 0
    told = capsys.readouterr().out
    assert "peer missing" in told
    assert "ours          4 tokens/s" in told
    assert main(["bench", "offload", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["ratio"] is None


def test_a_row_with_a_peer_compares_within_rounds() -> None:
    peer = Child.__new__(Child)
    row = offload._rows("decode", [0.1, 0.2, 0.4], peer, [1.0, 2.0, 4.0], "")
    assert (row.ours, row.peer, row.ratio, row.spread) == (5.0, 0.5, 10.0, 0.0)


def test_only_benchmarks_of_the_engine_take_a_model(tmp_path: Path) -> None:
    assert {"decode", "prefill", "offload", "cache"} <= set(harness.names())
    assert not [name for name in harness.names() if name.startswith("_")]
    with pytest.raises(ConfigError, match="'train-layer' runs no reference model"):
        harness.run("train-layer", 1, tmp_path)


def test_the_folder_is_given_or_set_or_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESTRO_CACHE", str(tmp_path))
    monkeypatch.delenv(_reference.SETTING, raising=False)
    assert _reference.folder_of(None) == tmp_path / "reference-model"
    monkeypatch.setenv(_reference.SETTING, str(tmp_path / "set"))
    assert _reference.folder_of(None) == tmp_path / "set"
    assert _reference.folder_of(tmp_path / "given") == tmp_path / "given"


def test_the_trained_mixture_has_the_shape_of_the_reference() -> None:
    parsed = Recipe.parse(recipe())
    assert parsed.model.config is not None
    assert parsed.model.config["num_hidden_layers"] == _reference.LAYERS
    (swap,) = parsed.model.swaps
    assert swap.config["num_experts"] == _reference.EXPERTS
    assert swap.config["router"]["config"]["top_k"] == _reference.TOP_K


def test_every_policy_is_held_against_the_bound(tmp_path: Path) -> None:
    tiny_folder("mixtral", tmp_path / "model", num_local_experts=8)
    model = load(tmp_path / "model")
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), trace(model, tmp_path / "run.trace"):
        model(input_ids=ids)
    rows = cache.compare(RoutingTrace.open(tmp_path / "run.trace"), budgets=(0.5,))
    bound = {row.case.rsplit(", ", 1)[1]: row for row in rows if row.peer_name == "Belady's bound"}
    assert {"lru", "lfu", "lfru", "static_hot"} <= set(bound)
    assert all(0 < row.ratio <= 1 for row in bound.values() if row.ratio is not None)
    against = {row.case.rsplit(", ", 1)[1]: row for row in rows if row.peer_name == "LRU"}
    assert against["belady"].ratio is not None
    assert against["belady"].ratio >= 1
    assert "told the future" in against["belady"].note
    assert "told the future" not in bound["lfu"].note
    assert bound["lru"].ratio == pytest.approx(1 / against["belady"].ratio)


def test_pruned_routing_keeps_what_weighs_much_and_half_of_the_rest() -> None:
    draw = np.random.default_rng(0)
    weights = -np.sort(-draw.random((400, 2, 4)).astype(np.float32) + 0.01)
    weights /= weights.sum(-1, keepdims=True)
    ids = np.argsort(draw.random((400, 2, 16)), axis=-1)[..., :4].astype(np.int32)
    weights = -np.sort(-weights, axis=-1)
    found = offload_bits.pruned({"ids": ids, "weights": weights, "tokens": np.arange(400)}, weights)
    kept = found["ids"] >= 0
    assert kept[..., 0].all()
    assert np.allclose(kept[..., 1:].mean((0, 1)), 0.5, atol=0.01)
    assert (found["ids"] == ids)[kept].all()
    assert np.allclose(found["weights"].sum(-1), 1, atol=1e-6)
    assert (found["weights"][~kept] == 0).all()
    ratio = weights[..., 1:] / weights[..., :1]
    for layer in range(2):
        for rank in range(3):
            there = kept[:, layer, rank + 1]
            assert ratio[there, layer, rank].min() >= ratio[~there, layer, rank].max()


def test_ternary_experts_have_three_values_a_row_and_mostly_zeros(tmp_path: Path) -> None:
    tiny_folder("qwen3_moe", tmp_path / "model")
    model = load(tmp_path / "model")
    _low_packs._make_ternary(model)
    banks = [module for module in model.modules() if isinstance(module, StackedFFN)]
    assert banks
    for bank in banks:
        for weight in (*bank.gate_up_proj.detach(), *bank.down_proj.detach()):
            assert (weight == 0).float().mean() == pytest.approx(0.885, abs=0.01)
            for row in weight:
                values = row.unique()
                assert len(values) <= 3
                assert set(values.abs().tolist()) <= {0.0, float(row.abs().max())}
