"""What a later gate says of a layer's input, and a store that reads by it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.core.forecast import Forecast, Ints, Peek, Wish
from moestro.engine.kernels import choose
from moestro.engine.store import ExpertStore
from tests.engine.models import Packed, build
from tests.engine.slab_files import policy
from tests.engine.test_forward import forward, prompt, rows
from tests.engine.test_forward_store import kernels_of, on_disk, session
from tests.engine.test_kernels import every_isa, same_bits


class Watching(Forecast):
    """Peeks at every later mixture, and wishes for nothing or for what is told.

    Attributes:
        seen: (layer, later) -> scores, of the last step. told: every call.
    """

    name = "watching"

    def __init__(self, wishes: dict[int, list[Wish]] | None = None) -> None:
        self.wishes = wishes or {}
        self.seen: dict[tuple[int, int], np.ndarray] = {}
        self.told: list[tuple[Any, ...]] = []

    def meet(self, experts: Any) -> None:
        self.experts = experts

    def begin(self, tokens: Ints, positions: Ints, sequences: Ints) -> list[Wish]:
        self.told.append((tokens.tolist(), positions.tolist(), sequences.tolist()))
        return self.wishes.get(-1, [])

    def routed(self, layer: int, ids: Ints, peek: Peek) -> list[Wish]:
        self.told.append((layer, ids.tolist()))
        for later, count in enumerate(self.experts):
            if later > layer and count:
                self.seen[layer, later] = peek(later)
        return self.wishes.get(layer, [])

    def forget(self, sequence: int) -> None:
        self.told.append(("end", sequence))


def gate(packed: Packed, layer: int, x: np.ndarray) -> np.ndarray:
    """Logits by the router's matrix, from a row in double precision."""
    router = packed.description.layers[layer].router
    assert router is not None
    from moestro.engine.kernels.twin import floats

    logits = x.astype(np.float64) @ floats(router.weight).astype(np.float64).T
    return logits if router.bias is None else logits + router.bias


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("kind", ["softmax_topk", "topk_softmax", "sigmoid_bias"])
def test_a_peek_is_the_later_gate_on_this_layers_input(kind: str, count: int) -> None:
    router = {"kind": kind, "bias": np.linspace(-1, 1, 8).astype(np.float32)}
    packed = build(layers=3, dense_layers=(1,), shared=32, router=router)
    twin = choose("twin").build(packed.description, pages=8, threads=1)
    steps = [kernels.build(packed.description, pages=8, threads=2) for kernels in every_isa()]
    batch = rows(prompt(count))
    found = []
    for one in (twin, *steps):
        one.begin(batch.tokens, batch.positions, batch.rows_of, batch.tables)
        one.attention(0)
        found.append(one.peek(0, 2))
        assert same_bits(one.peek(0, 0), one.scores(0)), "the layer's own gate says something else"
    assert found[0].shape == (count, 8)
    assert np.allclose(found[0], gate(packed, 2, twin.normed), atol=1e-4)  # type: ignore[attr-defined]
    assert np.allclose(found[0], found[1], atol=1e-4)
    for other in found[2:]:
        assert same_bits(found[1], other)


@pytest.mark.parametrize("kind", ["native", "twin"])
def test_a_peek_at_the_wrong_time_or_place_is_refused(kind: str) -> None:
    packed = build(layers=3, dense_layers=(1,), shared=32)
    one = kernels_of(kind).build(packed.description, pages=8, threads=1, slabs=packed.addresses)
    batch = rows(prompt(2))

    def begin() -> None:
        one.begin(batch.tokens, batch.positions, batch.rows_of, batch.tables)

    begin()
    with pytest.raises(ValueError, match="peek: "):
        one.peek(0, 2)
    one.attention(0)
    for layer, later in ((0, 1), (1, 2), (0, 3), (0, -1)):
        with pytest.raises((ValueError, IndexError)):
            one.peek(layer, later)
    one.peek(0, 2)
    begin()
    with pytest.raises(ValueError, match="peek: "):
        one.peek(0, 2)


@pytest.mark.parametrize("kind", ["native", "twin"])
def test_a_forecast_is_told_what_happens(kind: str, tmp_path: Path) -> None:
    packed = build(layers=3, dense_layers=(1,), shared=32)
    folder = on_disk(packed, tmp_path)
    watching = Watching()
    with ExpertStore(folder, 4 * folder.experts[0].stride, policy("lru")) as store:
        one = forward(packed, kernels=kernels_of(kind), store=store, forecast=watching)
        routed: list[Any] = []
        one.on_route = lambda layer, ids, weights: routed.append((layer, ids.tolist()))
        batch = rows(prompt(3), sequences=[17])
        one.step(batch)
        one.forget(17)
    assert watching.experts == (8, 0, 8)
    assert watching.told == [(batch.tokens.tolist(), [0, 1, 2], [17, 17, 17]), *routed, ("end", 17)]
    assert [layer for layer, _ in routed] == [0, 2]


def test_a_peek_ranks_as_the_router_does(tmp_path: Path) -> None:
    """Behind blocks that add nothing a later gate sees the same input, so a peek is what it will choose by."""
    packed = still(build(layers=2, router={"kind": "sigmoid_bias", "groups": 4, "top_groups": 2}))
    folder = on_disk(packed, tmp_path)
    watching = Watching()
    with ExpertStore(folder, 4 * folder.experts[0].stride, policy("lru")) as store:
        one = forward(packed, kernels=kernels_of("native"), store=store, forecast=watching)
        chosen: dict[int, np.ndarray] = {}
        one.on_route = lambda layer, ids, weights: chosen.__setitem__(layer, ids)
        one.step(rows(prompt(9)))
    seen = watching.seen[0, 1]
    assert np.isneginf(seen).sum(1).tolist() == [4] * 9, "two groups of four are open"
    assert np.array_equal(np.argsort(-seen, axis=1, kind="stable")[:, :3], chosen[1])


def still(packed: Packed) -> Packed:
    """The model with blocks that add nothing, and norms alike."""
    layers = [replace(layer, ffn_norm=packed.description.layers[0].ffn_norm) for layer in packed.description.layers]
    return replace(packed, description=replace(packed.description, layers=layers, residual_scale=0.0))


def test_what_is_wished_for_is_read_ahead_and_changes_no_bit(tmp_path: Path) -> None:
    packed, tokens = build(layers=3), prompt(36)
    folder, kernels = on_disk(packed, tmp_path), every_isa()[0]
    expected = session(forward(packed, kernels=kernels), tokens)
    wishes = {-1: [Wish(0, (0, 1)), Wish(2, (7,), 5)], 0: [Wish(1, (3, 2, 1))], 1: [Wish(2, tuple(range(8)), 2)]}
    for slots in (3, 9):
        with ExpertStore(folder, slots * folder.experts[0].stride, policy("lru")) as store:
            one = forward(packed, kernels=kernels, store=store, forecast=Watching(wishes), threads=2)
            assert same_bits(expected, session(one, tokens))
            assert store.counters.prefetched > 0
            assert store.cache.used <= store.cache.budget


@pytest.mark.parametrize("wish", [Wish(1, (8,)), Wish(1, (0, 0)), Wish(3, (0,))])
def test_wishes_for_what_is_not_there_are_an_error(wish: Wish, tmp_path: Path) -> None:
    from moestro.core.errors import ConfigError

    packed = build(layers=2)
    folder = on_disk(packed, tmp_path)
    with ExpertStore(folder, 4 * folder.experts[0].stride, policy("lru")) as store:
        one = forward(packed, kernels=kernels_of("twin"), store=store, forecast=Watching({0: [wish]}))
        with pytest.raises(ConfigError, match=r"no expert 8|name one twice|layer 3 has no experts"):
            one.step(rows(prompt(2)))
