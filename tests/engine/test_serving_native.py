"""The native forward under the scheduler: one text whatever runs beside it, however few experts memory holds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moestro.core.decoding import PLAIN, Decoder
from moestro.engine import room
from moestro.engine.open_native import Native
from moestro.engine.pack import pack_model
from moestro.engine.packed import Packed
from moestro.engine.reference import ReferenceForward
from moestro.engine.requests import Limits
from moestro.engine.scheduler import Scheduler
from moestro.methods.serve.scmoe import Config, policy
from moestro.models.load import load
from moestro.testing.tiny import tiny_folder
from tests.engine.running import Answer, run


CONTEXT = 1024
PROMPTS = [[(7 * n + at * (n % 3 + 1)) % 97 for at in range(1 + 5 * n % 37)] for n in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "model"
    tiny_folder("qwen3_moe", path, head_dim=16, max_position_embeddings=128)
    for bits in (8, 32):
        pack_model(path, path.parent / f"packed-{bits}", bits=bits)
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process holds PyTorch; a serving one does not, and tiny models need no working space."""
    monkeypatch.setattr(room, "resident_set", lambda: 0)
    monkeypatch.setattr(room, "working_bytes", lambda model: 0)
    return


def small(out: Path, experts: float) -> int:
    """Memory for all that is no expert, the context, and this many of the largest experts."""
    opened = Packed.open(out)
    model = opened.model
    kept = len(model.layers) * CONTEXT * 2 * model.kv_heads * model.head_dim * 4
    largest = max(there.stride for there in opened.experts.values())
    return kept + sum(piece.nbytes for piece in opened.tensors.values()) + int(experts * largest)


def texts(forward: Any, limits: Limits | None = None, decoder: Decoder = PLAIN, share: bool = True) -> list[list[int]]:
    answers = [
        Answer(prompt, 6, temperature=n % 2, seed=n, decoder=decoder if n % 4 == 3 else PLAIN)
        for n, prompt in enumerate(PROMPTS)
    ]
    return run(Scheduler(forward, limits, share=share), *answers)


@pytest.mark.parametrize("bits", [8, 32])
def test_every_arrangement_writes_the_same(folder: Path, bits: int) -> None:
    contrast = policy(Config(beta=1.5, weak="rank:4"))
    packed = folder.parent / f"packed-{bits}"
    whole = Native(packed, 1 << 30, context=CONTEXT)
    assert whole.store is None
    wanted = texts(whole.forward, Limits(running=2), contrast, share=False)
    for limits in (Limits(), Limits(chunk=5, mixed=3), Limits(running=3, chunk=64)):
        assert texts(whole.forward, limits, contrast) == wanted
    whole.close()
    for experts in (2.5, 4.5):
        few = Native(packed, small(packed, experts), context=CONTEXT)
        assert few.store is not None
        assert texts(few.forward, Limits(chunk=32), contrast) == wanted
        assert few.counters()["misses"] > 0
        few.close()


@pytest.mark.parametrize("weak", ["rank:1", "rank:3", "topk:4", "random", "threshold:0.5"])
@pytest.mark.parametrize("weight", ["model", "one"])
def test_self_contrast_is_that_of_the_reference(folder: Path, weak: str, weight: str) -> None:
    decoder = policy(Config.parse({"weak": weak, "weak_weight": weight, "beta": 2.0, "alpha": 0.01}))
    native = Native(folder.parent / "packed-32", 1 << 30, context=CONTEXT)
    reference = ReferenceForward(load(folder), pages=128)
    asked = [[5, 9, 11, 3], list(range(20, 40))]
    found = [run(Scheduler(f), *(Answer(p, 8, decoder=decoder) for p in asked)) for f in (native.forward, reference)]
    native.close()
    assert found[0] == found[1]
    assert found[0] != run(Scheduler(reference), *(Answer(p, 8) for p in asked))
