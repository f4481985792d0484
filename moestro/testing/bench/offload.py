"""Reference model R, 8 bit, under a limit of memory that holds 38 % of its file: ours against llama.cpp's mapped file.

The limit is a memory cgroup, one for each arm, which the process joins before it loads anything; the files are dropped
from the page cache before every start, or a group would read pages that others paid for. What the kernel says a group
held at most is a row of its own. Where no group may be made, ours keeps to its own budget and has no peer.

Routings are recorded streams (``_streams``), replayed on our side; logits must be those of a run with everything in
memory, bit for bit, before and after timing. Routing cannot be overridden in llama.cpp: it follows its own, and its
speed under a limit hardly depends on it. Prompts are read with the trained routing.

Experts are read ahead as the server does it, by the next layer's gate: with trained routing, the gates say what those
of the trained mixture said. Drawn routings have no gates, and nothing is read ahead; that is an arm of the trained one
as well. Reads are hidden as far as nobody waits for them: against min(read, compute), which is the most that can be.
"""

import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from moestro.core.errors import ConfigError
from moestro.testing.bench import _reference as reference
from moestro.testing.bench import _streams as streams
from moestro.testing.bench._cgroup import drop, group
from moestro.testing.bench._children import ArmError, Child
from moestro.testing.bench._resident import BEFORE, LLAMA, missing, threads
from moestro.testing.bench._trained import trained_stream
from moestro.testing.bench.harness import Row, paired_ratio, take_turns


LIMIT: Final = 500 << 20
CONTEXT: Final = 640
DECODED, PEER_DECODED, SETTLE = 24, 3, 96
"""Tokens of a round, of a round of the peer, and decoded before anything is timed."""
PROMPTS: Final = (32, 512)
TRAINED: Final = "trained"
GATE: Final = "serve.next_gate"
ARMS: Final = {
    "near-uniform": ("near-uniform", None),
    "Zipf": ("Zipf", None),
    TRAINED: (TRAINED, GATE),
    "trained (nothing read ahead)": (TRAINED, None),
    "own": ("own", GATE),
}
"""Name -> routing and what is read ahead."""
NO_GROUP: Final = "no cgroup: own budget only"


@dataclass
class Limited:
    """One of our arms, and the digests its rounds must have."""

    child: Child
    name: str
    at: int = SETTLE + BEFORE
    digests: tuple[str, ...] = ()
    hits: float = 0.0
    needs: float = 0.0
    bytes: float = 0.0
    waited: float = 0.0
    read: float = 0.0
    taken: float = 0.0

    def decode(self) -> float:
        """Seconds a token of the next round."""
        found = self.child.feed(self.at, DECODED, BEFORE, single=True)
        self.at += DECODED
        self.digests += (found["digest"],)
        counted = found["counters"]
        self.hits += counted.get("hits", 0.0)
        self.needs += counted.get("hits", 0.0) + counted.get("misses", 0.0)
        self.bytes += counted.get("bytes", 0.0)
        self.waited += counted.get("waited_s", 0.0)
        self.read += counted.get("reading_s", 0.0)
        self.taken += found["seconds"]
        return float(found["seconds"]) / DECODED

    @property
    def decoded(self) -> int:
        """Tokens of all rounds, the first included."""
        return self.at - SETTLE - BEFORE

    def hidden(self) -> Row:
        """Of what can be hidden, what was; over all rounds, the first included."""
        tokens = self.decoded / 1e3  # so that seconds become milliseconds a token
        compute = self.taken - self.waited
        hidden, most = max(self.read - self.waited, 0.0) / tokens, min(self.read, compute) / tokens
        parts = {"read": self.read, "compute": compute, "waited": self.waited}
        note = ", ".join(f"{name} {seconds / tokens:.1f}" for name, seconds in parts.items()) + " ms a token"
        case = f"reads hidden, limit {LIMIT >> 20} MiB, {self.name} routing"
        return Row(case, "hidden", "ms/token", hidden, "min(read, compute)", most, hidden / max(most, 1e-9), 0.0, note)


def settle(child: Child) -> str:
    """Prompt and some tokens, as every arm begins; the digest of their logits."""
    first = child.feed(0, BEFORE, 0)
    return str(first["digest"]) + str(child.feed(BEFORE, SETTLE, BEFORE, single=True)["digest"])


def routings(folder: Path, place: Path, rounds: int) -> dict[str, str]:
    """Name of a routing -> file of its stream."""
    tokens = reference.text(folder)
    length = BEFORE + SETTLE + DECODED * (rounds + 1) + max(PROMPTS)
    found: dict[str, Any] = {"own": {"tokens": tokens}}
    for name, ids in (("near-uniform", streams.uniform(length)), ("Zipf", streams.zipf(length, 0.3))):
        found[name] = {"tokens": tokens[:length], "ids": ids, "weights": streams.even(ids)}
    found[TRAINED] = trained_stream(folder, length)
    names = ("near-uniform", "Zipf", TRAINED, "own")
    return {name: streams.store(place / f"{name}.npz", found[name]) for name in names}


def expected(options: dict[str, Any], rounds: int) -> tuple[str, ...]:
    """Digests of everything an arm will compute, from a run with all experts in memory."""
    with Child("engine", {**options, "memory": None}) as child:
        arm = Limited(child, "resident", digests=(settle(child),))
        for _ in range(rounds + 1):
            arm.decode()
        prompts = [str(child.feed(0, count, 0)["digest"]) for count in PROMPTS]
    return (*arm.digests, *prompts)


def run(rounds: int, model: Path | None = None) -> list[Row]:
    """Rows of all routings; ``model``: folder of the reference model, built when missing."""
    folder = reference.folder_of(model)
    packed = reference.packed(folder, 8)
    with tempfile.TemporaryDirectory(prefix="bench-") as place, ExitStack() as opened:
        common: dict[str, Any] = {"threads": threads(), "context": CONTEXT}
        files = routings(folder, Path(place), rounds)
        wanted: dict[str, tuple[str, ...]] = {}
        arms: dict[str, Limited] = {}
        for name, (routing, forecast) in ARMS.items():
            options = {**common, "folder": str(packed), "stream": files[routing]}
            wanted[name] = wanted[routing] if routing in wanted else expected(options, rounds)
            drop(packed)
            limit = group(f"moestro-{len(arms)}", LIMIT)
            child = opened.enter_context(Child("engine", {**options, "memory": LIMIT, "forecast": forecast}, limit))
            assert not child.about["torch"], "the engine's process must not import torch"
            arms[name] = Limited(child, name)
            arms[name].digests = (settle(child),)
            if arms[name].digests != wanted[name][:1]:
                raise ConfigError(f"{name}: logits under the limit are not those of the resident run")
        peer = _peer(folder, common, files[TRAINED], opened)
        rows = _decode(arms, peer, rounds)
        for name, arm in arms.items():
            if arm.digests != wanted[name][: len(arm.digests)]:
                raise ConfigError(f"{name}: logits under the limit are not those of the resident run")
        trained = {name: arm for name, arm in arms.items() if name.startswith(TRAINED)}
        rows += _prefill(trained, peer, rounds, wanted[TRAINED][-len(PROMPTS) :])
        return rows + [arm.hidden() for arm in arms.values() if arm.hits < arm.needs] + _memory(arms, peer)


def _peer(folder: Path, common: dict[str, Any], stream: str, opened: ExitStack) -> Child | str:
    """llama.cpp under the same limit, or why not."""
    if not reference.peer_is_here():
        return "peer missing: llama-cpp-python is not installed"
    limit = group("llama", LIMIT)
    if limit is None:
        return NO_GROUP
    file = reference.gguf_file(folder, 8)
    drop(file)
    try:
        child = opened.enter_context(Child(LLAMA, {**common, "file": str(file), "mmap": True, "stream": stream}, limit))
        child.feed(0, BEFORE, 0)
    except ArmError as error:
        return str(error)
    return child


def _rows(case: str, ours: list[float], peer: Child | str, theirs: list[float], note: str) -> Row:
    """From seconds a token."""
    speed = 1 / statistics.median(ours)
    if isinstance(peer, str):
        return missing(case, "speed", speed, "llama.cpp Q8_0, mapped", f"{peer}; {note}")
    ratio, spread = paired_ratio(theirs, ours)
    their_speed = 1 / statistics.median(theirs)
    return Row(case, "speed", "tokens/s", speed, "llama.cpp Q8_0, mapped", their_speed, ratio, spread, note)


def _decode(arms: dict[str, Limited], peer: Child | str, rounds: int) -> list[Row]:
    work: dict[str, Callable[[], float]] = {name: arm.decode for name, arm in arms.items()}
    if isinstance(peer, Child):
        child = peer
        work[LLAMA] = lambda: float(child.feed(BEFORE, PEER_DECODED, BEFORE, single=True)["seconds"]) / PEER_DECODED
    seconds = take_turns(work, rounds)
    rows = []
    for name, arm in arms.items():
        limited = "" if arm.child.group is not None else f"{NO_GROUP}; "
        note = (
            f"{limited}{arm.child.about.get('slots', 0)} of {reference.LAYERS * reference.EXPERTS} experts held, "
            f"hits {arm.hits / max(arm.needs, 1):.0%}, waiting {arm.waited / max(arm.taken, 1e-9):.0%} of the time; "
            "the peer follows its own routing"
        )
        case = f"decode, 8 bit, limit {LIMIT >> 20} MiB, {name} routing"
        rows.append(_rows(case, seconds[name], peer, seconds.get(LLAMA, []), note))
    return rows


def _read(child: Child, count: int, digest: str | None = None) -> float:
    """Seconds a token of a prompt."""
    found = child.feed(0, count, 0)
    if digest not in (None, found["digest"]):
        raise ConfigError(f"prompt of {count}: logits under the limit are not those of the resident run")
    return float(found["seconds"]) / count


def _prefill(arms: dict[str, Limited], peer: Child | str, rounds: int, wanted: tuple[str, ...]) -> list[Row]:
    rows = []
    for count, digest in zip(PROMPTS, wanted, strict=True):
        work: dict[str, Callable[[], float]] = {
            name: partial(_read, arm.child, count, digest) for name, arm in arms.items()
        }
        if isinstance(peer, Child):
            work[LLAMA] = partial(_read, peer, count)
        seconds = take_turns(work, rounds)
        for name in arms:
            case = f"prefill of {count} tokens, 8 bit, limit {LIMIT >> 20} MiB, {name} routing"
            note = "the peer follows its own routing"
            rows.append(_rows(case, seconds[name], peer, seconds.get(LLAMA, []), note))
    return rows


def _memory(arms: dict[str, Limited], peer: Child | str) -> list[Row]:
    """What the kernel says each group held at most."""

    def most(child: Child) -> tuple[float, str]:
        held = None if child.group is None else child.group.peak()
        if held is None:
            return child.peak / 2**20, f"highest resident set of the process ({NO_GROUP})"
        return held / 2**20, f"the group's maximum by the kernel; resident set at most {child.peak / 2**20:.0f} MiB"

    theirs = most(peer)[0] if isinstance(peer, Child) else None
    rows = []
    for name, arm in arms.items():
        found, note = most(arm.child)
        case = f"memory under a limit of {LIMIT >> 20} MiB, {name} routing"
        if theirs is None:
            rows.append(
                Row(case, "peak memory", "MiB", found, "the limit", LIMIT / 2**20, LIMIT / 2**20 / found, 0.0, note)
            )
        else:
            rows.append(
                Row(case, "peak memory", "MiB", found, "llama.cpp Q8_0, mapped", theirs, theirs / found, 0.0, note)
            )
    return rows
