"""A packed model whose router reads token ids only: choices and logits are PyTorch's, however a text is cut."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moestro.core.errors import ConfigError, LoadError
from moestro.core.registry import method
from moestro.engine import room
from moestro.engine.describe import describe
from moestro.engine.dialect import ModelSpec
from moestro.engine.kernels import choose
from moestro.engine.open_native import Native
from moestro.engine.packed import EXPERTS, Packed
from moestro.engine.token_router import TokenRouter, best
from moestro.testing.tiny import VOCAB
from tests.engine.read_me_models import cut, saved


IDS = torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process holds PyTorch; a serving one does not, and tiny models need no working space."""
    monkeypatch.setattr(room, "resident_set", lambda: 0)
    monkeypatch.setattr(room, "working_bytes", lambda model: 0)


def rows(ids: list[int], start: int = 0, pages: tuple[int, ...] = (0, 1, 2)) -> Any:
    class Batch:
        tokens = np.array(ids, np.int32)
        positions = np.arange(start, start + len(ids), dtype=np.int32)
        rows_of = np.zeros(len(ids), np.int32)
        sequences = (0,)
        tables = np.array([pages], np.int32)
        want = np.arange(len(ids), dtype=np.int32)
        routes = None

    return Batch


@torch.no_grad()
def answers(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits [S, V] of IDS, and the expert of each token [S]."""
    found = method("train.read_me").module.route_ahead(model, {"input_ids": IDS})
    return model(IDS).logits[0].numpy(), next(iter(found.values())).expert_N.numpy()


def gate_of(packed: Path, kernels: str = "twin", pages: int = 8) -> TokenRouter:
    opened = Packed.open(packed)
    return TokenRouter(describe(opened, opened.resident()).gate, choose(kernels), pages)


@pytest.mark.parametrize("kernels", ["twin", "native"])
def test_the_router_is_torch_s(kernels: str, tmp_path: Path) -> None:
    model = cut()
    packed = saved(model, tmp_path)
    with torch.no_grad():
        wanted = method("train.read_me").module.gate_of(model)(IDS)[0].numpy()
    found = gate_of(packed, kernels).route(IDS[0].numpy().astype(np.int32))
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert set(best(found).tolist()) == {0, 1, 2}
    assert np.array_equal(best(found), wanted.argmax(-1))


def test_equal_logits_go_to_the_lower_id_as_in_torch() -> None:
    logits = np.array([[1, 3, 3, 0], [2, 2, 2, 2], [0, 0, 1, 1]], np.float32)
    assert best(logits).tolist() == torch.from_numpy(logits).argmax(-1).tolist() == [1, 0, 2]


@pytest.mark.parametrize("kernels", ["twin", "native"])
def test_a_row_is_decided_alike_however_the_text_is_cut(kernels: str, tmp_path: Path) -> None:
    gate, ids = gate_of(saved(cut(), tmp_path), kernels), IDS[0].numpy().astype(np.int32)
    whole = gate.route(ids)
    for cuts in ([40], [1] * 40, [7, 16, 1, 13, 3], [15, 1, 24]):
        start, table = 0, np.array([[5, 0, 3]], np.int32)
        for count in cuts:
            part = ids[start : start + count]
            place = np.arange(start, start + count, dtype=np.int32)
            where = (part, place, np.zeros_like(place), table)
            assert np.array_equal(gate.look(*where), whole[start : start + count])
            assert np.array_equal(gate.step(*where), whole[start : start + count])
            start += count


def test_sequences_share_pages_and_rows(tmp_path: Path) -> None:
    gate, ids = gate_of(saved(cut(), tmp_path)), IDS[0].numpy().astype(np.int32)
    place = np.arange(16, dtype=np.int32)
    gate.step(ids[:16], place, np.zeros(16, np.int32), np.array([[2]], np.int32))
    other = np.concatenate([ids[:16], ids[30:33]])
    tables = np.array([[2, 6], [4, -1], [2, 7]], np.int32)  # two go on behind the same page, one begins
    mixed = gate.step(
        np.concatenate([ids[16:18], ids[3:7], other[16:]]),
        np.array([16, 17, 0, 1, 2, 3, 16, 17, 18], np.int32),
        np.array([0, 0, 1, 1, 1, 1, 2, 2, 2], np.int32),
        tables,
    )
    parts = (gate.route(ids[:18])[16:], gate.route(ids[3:7]), gate.route(other)[16:])
    assert np.array_equal(mixed, np.concatenate(parts))
    gate.copy_page(4, 1)
    one = (ids[7:8], np.array([4], np.int32), np.zeros(1, np.int32))
    assert np.array_equal(gate.look(*one, np.array([[1]], np.int32)), gate.route(ids[3:8])[4:])


def test_later_tokens_change_nothing(tmp_path: Path) -> None:
    gate, ids = gate_of(saved(cut(), tmp_path)), IDS[0].numpy().astype(np.int32)
    changed = ids.copy()
    changed[20] = (changed[20] + 1) % VOCAB
    assert np.array_equal(gate.route(ids)[:20], gate.route(changed)[:20])
    assert not np.array_equal(gate.route(ids)[20:], gate.route(changed)[20:])
    with pytest.raises(ValueError, match="the router knows 0 to"):
        gate.route(np.array([VOCAB], np.int32))


@pytest.mark.parametrize(
    ("storage", "keep", "layers"),
    [("shared_pool", 0.5, (0, 1)), ("copied", 0.5, (0, 1)), ("shared_pool", 1.0, (0, 1)), ("shared_pool", 0.4, (1,))],
)
def test_the_packed_model_answers_as_pytorch_does(
    storage: str, keep: float, layers: tuple[int, ...], tmp_path: Path
) -> None:
    model = cut(storage, keep, layers)
    wanted, experts = answers(model)
    native = Native(saved(model, tmp_path), 1 << 30, context=48)
    seen: dict[int, list[int]] = {}
    native.forward.on_route = lambda layer, ids, weights: seen.setdefault(layer, []).extend(ids[:, 0].tolist())
    native.forward.on_gate = lambda ids: seen.setdefault(-1, []).extend(ids.tolist())
    ids = IDS[0].tolist()
    found = np.concatenate([native.forward.step(rows(ids[a:b], a)) for a, b in ((0, 13), (13, 14), (14, 40))])
    assert np.abs(found - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())
    assert seen == {layer: experts.tolist() for layer in (-1, *layers)}
    native.close()


def test_units_of_all_experts_are_held_once(tmp_path: Path) -> None:
    model = cut()
    packed = Packed.open(saved(model, tmp_path))
    for index, layer in enumerate(packed.model.layers):
        bank = model.model.layers[index].mlp.bank
        common = set(bank.rows_EW[0].tolist()).intersection(*map(set, bank.rows_EW.tolist()))
        assert layer.shared == len(common) > 0
        assert layer.inner == bank.width - len(common)


@pytest.mark.parametrize("bits", [8, 32])
def test_few_slots_and_cuts_change_no_bit(bits: int, tmp_path: Path) -> None:
    packed = saved(cut(), tmp_path, bits)
    opened = Packed.open(packed)
    largest = max(there.stride for there in opened.experts.values())
    model = opened.model
    kept = 3 * 16 * 2 * 4 * (len(model.layers) * model.kv_heads * model.head_dim + 16)
    resident = sum(piece.nbytes for piece in opened.tensors.values())
    whole, few = Native(packed, 1 << 30, context=48), Native(packed, kept + resident + 2 * largest, context=48)
    assert whole.forward.page_bytes * 3 == kept
    assert whole.store is None
    assert few.store is not None
    ids = IDS[0].tolist()
    once = whole.forward.step(rows(ids))
    cuts = np.concatenate([few.forward.step(rows(ids[a:b], a)) for a, b in ((0, 7), (7, 8), (8, 33), (33, 40))])
    assert np.array_equal(once, cuts)
    assert few.counters()["misses"] > 2
    few.close()
    whole.close()


def test_another_route_ranks_what_the_router_said(tmp_path: Path) -> None:
    from moestro.core.decoding import Route
    from moestro.engine.decoding import route_index

    native = Native(saved(cut(), tmp_path), 1 << 30, context=48)
    seen: dict[str, Any] = {}
    native.forward.on_route = lambda layer, ids, weights: seen.update(ids=ids, weights=weights)
    batch, logits = rows(IDS[0].tolist()), native.forward.gate.route(IDS[0].numpy().astype(np.int32))
    batch.routes = np.full(40, route_index(native.forward, Route(kind="rank", k=2)), np.int32)
    native.forward.step(batch)
    assert np.array_equal(seen["ids"][:, 0], np.argsort(-logits, axis=-1)[:, 1])
    assert np.allclose(seen["weights"], 1)


def test_it_runs_without_torch(tmp_path: Path) -> None:
    packed = saved(cut(), tmp_path)
    code = (
        "import sys; from pathlib import Path; from moestro.engine.open_native import Native; import numpy as np;"
        f"native = Native(Path({str(packed)!r}), 1 << 30, context=48);"
        "native.forward.gate.route(np.arange(9, dtype=np.int32));"
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
    assert (packed / EXPERTS).stat().st_size > 0


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    opened = Packed.open(saved(cut(), tmp_path))
    for change, told in (
        ({"token_router": None}, "2 decoupled layers and no router of token ids"),
        (
            {"token_router": {"vocab": VOCAB, "dim": 16, "heads": 2, "experts": 4}},
            "token ids that names 1 of 4",
        ),
        (
            {"token_router": {"vocab": 5, "dim": 16, "heads": 2, "experts": 3}},
            "a router of 5 token ids for a voc",
        ),
        ({"token_router": {"vocab": VOCAB, "dim": 16, "heads": 3, "experts": 3}}, "3 heads over 16 dimensions"),
    ):
        with pytest.raises(ConfigError, match=told):
            ModelSpec.parse({**opened.model.model_dump(mode="json"), **change}, where="test")
    resident = opened.resident()
    piece = opened.tensors["token_router.qkv"]
    opened.tensors["token_router.qkv"] = type(piece)(piece.offset, piece.nbytes, "f16", piece.shape)  # type: ignore[index]
    with pytest.raises(LoadError, match=r"token_router.qkv is f16; it must be f32"):
        describe(opened, resident)
