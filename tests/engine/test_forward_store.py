"""Experts from the store: the same bits as all resident, whatever fits, whoever leaves, and after a failed read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.core.errors import StoreError
from moestro.engine.kernels import choose
from moestro.engine.kernels.interface import Kernels
from moestro.engine.packed import EXPERTS, LayerSlabs
from moestro.engine.packed import Packed as Folder
from moestro.engine.store import ExpertStore
from tests.engine.models import Packed, build
from tests.engine.slab_files import policy
from tests.engine.test_forward import forward, prompt, rows
from tests.engine.test_kernels import every_isa, same_bits


LAYERS, EXPERTS_EACH = 3, 8


def on_disk(packed: Packed, folder: Path) -> Folder:
    """The slabs of a model as a packed folder's experts, each padded to whole pages."""
    there, offset = {}, 0
    with (folder / EXPERTS).open("wb") as file:
        for layer, data in packed.slabs.items():
            size = data.size // EXPERTS_EACH
            stride = -(-size // 4096) * 4096
            there[layer] = LayerSlabs(EXPERTS_EACH, offset, stride, size, {})
            for expert in range(EXPERTS_EACH):
                file.write(data[expert * size : (expert + 1) * size].tobytes() + bytes(stride - size))
            offset += EXPERTS_EACH * stride
    return Folder(folder, None, {}, there, {EXPERTS: (offset, "")})  # type: ignore[arg-type]


def kernels_of(kind: str) -> Kernels:
    return every_isa()[0] if kind == "native" else choose("twin")


def session(one: Any, tokens: np.ndarray) -> np.ndarray:
    """A prompt in two chunks, then token by token."""
    parts = [one.step(rows(tokens[:17])), one.step(rows(tokens[17:30], 17))]
    parts += [one.step(rows(tokens[i : i + 1], i)) for i in range(30, len(tokens))]
    return np.concatenate(parts)


@pytest.fixture
def packed() -> Packed:
    return build(layout="q4", layers=LAYERS, experts=EXPERTS_EACH, shared=32)


@pytest.mark.parametrize("kind", ["native", "twin"])
@pytest.mark.parametrize("name", ["lru", "lfu", "lfru"])
def test_every_budget_and_policy_gives_the_bits_of_the_resident_run(
    kind: str, name: str, packed: Packed, tmp_path: Path
) -> None:
    folder, kernels, tokens = on_disk(packed, tmp_path), kernels_of(kind), prompt(36)
    expected = session(forward(packed, kernels=kernels), tokens)
    stride = folder.experts[0].stride
    for slots in (1, 2, 3, 5, 12, LAYERS * EXPERTS_EACH):
        with ExpertStore(folder, slots * stride, policy(name)) as store:
            got = session(forward(packed, kernels=kernels, store=store), tokens)
            assert same_bits(expected, got), f"{slots} slots"
            assert store.counters.misses >= LAYERS * EXPERTS_EACH - 1


def test_reading_ahead_does_not_change_a_bit(packed: Packed, tmp_path: Path) -> None:
    folder, kernels, tokens = on_disk(packed, tmp_path), every_isa()[0], prompt(36)
    expected = session(forward(packed, kernels=kernels), tokens)
    with ExpertStore(folder, 9 * folder.experts[0].stride, policy("lru")) as store:
        one = forward(packed, kernels=kernels, store=store, threads=2)
        one.on_route = lambda layer, ids, weights: store.prefetch((layer + 1) % LAYERS, np.unique(ids[ids >= 0])[:3])
        assert same_bits(expected, session(one, tokens))


@pytest.mark.parametrize("kind", ["native", "twin"])
def test_a_failed_read_ends_its_step_and_no_other(kind: str, packed: Packed, tmp_path: Path) -> None:
    import errno
    import os

    folder, kernels, tokens = on_disk(packed, tmp_path), kernels_of(kind), prompt(24)
    expected = forward(packed, kernels=kernels).step(rows(tokens))
    broken = [False]

    def read(descriptor: int, buffers: Any, offset: int) -> int:
        if broken[0] and offset >= folder.experts[1].offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    with ExpertStore(folder, 4 * folder.experts[0].stride, policy("lru"), read=read) as store:
        one = forward(packed, kernels=kernels, store=store)
        assert same_bits(one.step(rows(tokens)), expected)
        broken[0] = True
        with pytest.raises(StoreError):
            one.step(rows(tokens))
        broken[0] = False
        assert same_bits(one.step(rows(tokens)), expected)
