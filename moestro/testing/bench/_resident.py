"""Decode and prefill of reference model R with everything in memory: what the two benchmarks share.

Every arm is a process of its own that times itself; arms take turns and their order rotates. Before anything is timed
they must agree on the logits of a prompt (each rounds the weights in its own way: correlation at least 0.99 with 8
bits, 0.95 with 4). Token ids are real text, not what random weights would say: loops flatter caches. Both sides compute
the logits of every decoded token and of the last prompt token.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from moestro.core.errors import ConfigError
from moestro.testing.bench import _reference as reference
from moestro.testing.bench._children import Child
from moestro.testing.bench._streams import store
from moestro.testing.bench.harness import Row, paired_ratio, take_turns


PROMPT, DECODED, BEFORE, CONTEXT = 512, 32, 64, 1024
AGREE: Final = {8: 0.99, 4: 0.95}
OURS, LLAMA, TRANSFORMERS = "moestro", "llama.cpp", "transformers"


def threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


def check_agreement(children: Mapping[str, Child], bits: int, place: Path) -> None:
    """Stop unless all arms compute the same model.

    Raises:
        ConfigError: they do not.
    """
    logits = {}
    for name, child in children.items():
        file = place / f"{name}.npy"
        child.feed(0, BEFORE, 0, save=str(file))
        logits[name] = np.load(file, allow_pickle=False)
    for name, found in logits.items():
        close = float(np.corrcoef(logits[OURS], found)[0, 1])
        if not close >= AGREE[bits]:
            raise ConfigError(
                f"{bits} bits: logits of ours and {name} correlate by {close:.4f}; they do not compute the same model"
            )


def missing(case: str, metric: str, speed: float, peer: str, why: str) -> Row:
    """A row without its peer."""
    return Row(case, metric, "tokens/s", speed, peer, None, None, 0.0, why)


def compare(what: Literal["decode", "prefill"], rounds: int, model: Path | None) -> list[Row]:
    """Rows of one of the two benchmarks."""
    folder = reference.folder_of(model)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as place, ExitStack() as kept:
        stream = store(Path(place) / "text.npz", {"tokens": reference.text(folder)})
        common: dict[str, Any] = {"threads": threads(), "context": CONTEXT, "stream": stream}
        dense = _transformers(folder, common)
        if isinstance(dense, Child):
            kept.enter_context(dense)
        for bits in (4, 8):
            with ExitStack() as opened:
                options = {**common, "folder": str(reference.packed(folder, bits)), "memory": None}
                children = {OURS: opened.enter_context(Child("engine", options))}
                if reference.peer_is_here():
                    options = {**common, "file": str(reference.gguf_file(folder, bits)), "mmap": False}
                    children[LLAMA] = opened.enter_context(Child(LLAMA, options))
                if isinstance(dense, Child):
                    children[TRANSFORMERS] = dense
                check_agreement(children, bits, Path(place))
                rows += _measure(what, bits, rounds, children, dense if isinstance(dense, str) else "")
    return rows


def _transformers(folder: Path, common: dict[str, Any]) -> Child | str:
    """The arm in float32, or why there is none."""
    source = reference.checkpoint(folder)
    need = 4 * sum(
        file.stat().st_size for file in source.glob("*.safetensors")
    )  # twice the bytes, twice while it loads
    free = _available()
    if free < need:
        return f"float32 needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
    return Child(TRANSFORMERS, {**common, "folder": str(source)})


def _available() -> int:
    """Bytes of memory that a new process could have."""
    info = Path("/proc/meminfo")
    for line in info.read_text(encoding="ascii").splitlines() if info.is_file() else ():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _measure(what: str, bits: int, rounds: int, children: Mapping[str, Child], no_dense: str) -> list[Row]:
    count = PROMPT if what == "prefill" else DECODED

    def work(child: Child) -> Callable[[], float]:
        if what == "prefill":
            return lambda: float(child.feed(0, PROMPT, 0)["seconds"])
        return lambda: float(child.feed(BEFORE, DECODED, BEFORE, single=True)["seconds"])

    seconds = take_turns({name: work(child) for name, child in children.items()}, rounds)
    speed = {name: count / statistics.median(taken) for name, taken in seconds.items()}
    case = f"{what} of {count} tokens, {bits} bit, all resident"
    ours = children[OURS]
    note = f"{ours.about['isa']}, {threads()} threads"
    assert not ours.about["torch"], "the engine's process must not import torch"
    rows = []
    for name, label in ((LLAMA, f"llama.cpp Q{bits}_0"), (TRANSFORMERS, "Transformers float32")):
        if name in children:
            ratio, spread = paired_ratio(seconds[name], seconds[OURS])
            rows.append(Row(case, "speed", "tokens/s", speed[OURS], label, speed[name], ratio, spread, note))
        else:
            why = no_dense if name == TRANSFORMERS else "peer missing: llama-cpp-python is not installed"
            rows.append(missing(case, "speed", speed[OURS], label, f"{why}; {note}"))
    return rows
