"""Experts read ahead because they are decided ahead: what is wished for, read, waited for, and that no bit changes."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.core.registry import method
from moestro.engine.store import ExpertStore
from tests.engine.models import build
from tests.engine.slab_files import Disk, policy
from tests.engine.test_forward import forward, prompt, rows
from tests.engine.test_forward_store import kernels_of, on_disk, session
from tests.engine.test_kernels import every_isa, same_bits
from tests.engine.test_pre_gated import ahead, model


def told() -> Any:
    return method("serve.pre_gated").entry("forecast")(method("serve.pre_gated").configure({}))


def test_wishes_by_hand() -> None:
    (wish,) = told().settled(3, np.array([[4, 1], [1, 0], [-1, 4]], np.int32))
    assert (wish.layer, wish.experts, wish.priority) == (3, (1, 4, 0), 1)
    assert told().settled(3, np.full((2, 2), -1, np.int32)) == []
    assert told().routed(0, np.zeros((1, 1), np.int32), lambda later: np.zeros((1, 4), np.float32)) == []


@pytest.mark.parametrize("distance", [1, 2])
@pytest.mark.parametrize("kind", ["native", "twin"])
def test_all_that_is_read_ahead_is_needed_and_only_the_first_mixtures_wait(
    kind: str, distance: int, tmp_path: Path
) -> None:
    """Room for the experts of d + 1 layers and no more: nothing is left from an earlier token but by chance."""
    packed = ahead(build(layout="q4", layers=3, top_k=2), distance)
    folder, tokens = on_disk(packed, tmp_path), prompt(20)
    expected = session_of_tokens(forward(packed, kernels=kernels_of(kind)), tokens)
    stride = folder.experts[0].stride
    with ExpertStore(folder, (distance + 1) * 2 * stride, policy("lru"), readers=1) as store:
        one = forward(packed, kernels=kernels_of(kind), store=store, forecast=told())
        needed: list[tuple[int, set[int]]] = []
        one.on_route = lambda layer, ids, weights: needed.append((layer, set(ids.ravel().tolist())))
        assert same_bits(session_of_tokens(one, tokens), expected)
        seen = dataclasses.asdict(store.counters)
    assert seen["wasted"] == 0
    assert seen["cancelled"] == 0 or seen["joined"] > 0  # dropped requests were needed before a thread came to them
    demanded = seen["misses"] - seen["joined"]
    assert seen["prefetched"] + demanded == seen["bytes"] // stride
    assert seen["hits"] + seen["misses"] == sum(len(experts) for _, experts in needed)


def session_of_tokens(one: Any, tokens: np.ndarray) -> np.ndarray:
    return np.concatenate([one.step(rows(tokens[i : i + 1], i)) for i in range(len(tokens))])


def test_with_time_to_read_only_the_first_mixture_is_waited_for(tmp_path: Path) -> None:
    """When every read ahead is over before it is needed, later mixtures find all their experts."""
    packed = ahead(build(layout="q4", layers=4, top_k=2), 1)
    folder, tokens = on_disk(packed, tmp_path), prompt(12)
    stride = folder.experts[0].stride
    with ExpertStore(folder, 4 * stride, policy("lru"), readers=1, read=Disk()) as store:
        one = forward(packed, kernels=kernels_of("twin"), store=store, forecast=told())
        misses: dict[int, int] = dict.fromkeys(range(4), 0)
        last = [0]

        def routed(layer: int, ids: Any, weights: Any) -> None:
            while store._reads.of(None) or store._running:  # the time that other layers take
                time.sleep(0.001)
            misses[(layer - 1) % 4] += store.counters.misses - last[0]
            last[0] = store.counters.misses

        one.on_route = routed
        session_of_tokens(one, tokens)
    assert misses[0] > 0
    assert [misses[layer] for layer in (1, 2, 3)] == [0, 0, 0]


def test_requests_that_override_their_routing_get_their_own_experts(tmp_path: Path) -> None:
    """What was decided ahead is wrong for such rows; they wait, and get the same bits as without a store."""
    packed = model("softmax", 1)
    folder, tokens = on_disk(packed, tmp_path), prompt(10)

    def other(layer: int, scores: Any, ids: Any, weights: Any) -> Any:
        return (ids + 1) % 8, weights

    asked = rows(tokens, routes=np.arange(10, dtype=np.int32) % 2)
    plain = forward(packed, kernels=every_isa()[0])
    plain.overrides.append(other)
    with ExpertStore(folder, 9 * folder.experts[0].stride, policy("lru")) as store:
        one = forward(packed, kernels=every_isa()[0], store=store, forecast=told())
        one.overrides.append(other)
        assert same_bits(one.step(asked), plain.step(asked))


def test_a_prompt_in_chunks_then_tokens_keeps_its_bits(tmp_path: Path) -> None:
    packed = model("chosen", 2)
    folder, tokens = on_disk(packed, tmp_path), prompt(36)
    expected = session(forward(packed, kernels=every_isa()[0]), tokens)
    for slots in (3, 9, 20):
        with ExpertStore(folder, slots * folder.experts[0].stride, policy("lru")) as store:
            one = forward(packed, kernels=every_isa()[0], store=store, forecast=told(), threads=2)
            assert same_bits(session(one, tokens), expected), f"{slots} slots"
