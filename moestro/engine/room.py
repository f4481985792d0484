"""Where the bytes of a packed model go under a limit of memory; none of its weights is read."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moestro.core.errors import ConfigError
from moestro.core.memory import resident_bytes
from moestro.engine.dialect import ModelSpec
from moestro.engine.kernels.interface import LANES
from moestro.engine.packed import EXPERTS, Packed
from moestro.engine.token_router import page_bytes as gate_bytes


POSITIONS: Final = 4096
"""Positions of keys and values that are kept unless asked otherwise, or the model's own if it has fewer."""

ROWS: Final = 512
"""Rows of a step that working space is kept for."""


@dataclass(frozen=True)
class Room:
    """Bytes by place.

    Attributes:
        memory: the limit. process: the interpreter as it is. weights: what every token needs. cache: keys and values of
            ``pages`` pages. working: for what a step computes with. budget: what is left for experts.
        experts: bytes of all of them, largest: of the largest one. count: how many there are, slots: how many fit.
    """

    memory: int
    process: int
    weights: int
    pages: int
    cache: int
    working: int
    budget: int
    experts: int
    largest: int
    count: int

    @property
    def slots(self) -> int:
        """Experts that fit; all of them where their bytes do."""
        if self.experts <= self.budget:
            return self.count
        return max(0, self.budget) // self.largest

    @property
    def held(self) -> int:
        """Bytes of experts in memory once the cache is full."""
        return self.experts if self.slots == self.count else self.slots * self.largest

    @property
    def disk(self) -> int:
        """Bytes of experts that are not in memory then."""
        return self.experts - min(self.held, self.experts)

    @property
    def needed(self) -> int:
        """Bytes beside experts."""
        return self.process + self.weights + self.cache + self.working


def resident_set() -> int:
    """Bytes of this process that are in memory now; where the system does not say, what an interpreter takes."""
    return resident_bytes(64 << 20)


_SERVER: Final = """
import sys
from pathlib import Path
import moestro.cli
from moestro.core.errors import MoestroError
from moestro.engine import api, http, open_native, room, service, vocabulary
try:
    kept = vocabulary.open_vocabulary(Path(sys.argv[1]))
except MoestroError:
    pass  # none: the server will say so
print(room.resident_set())
"""


def server_bytes(path: Path) -> int:
    """Bytes of a process that is about to open this model to serve it: interpreter, server, vocabulary. It is asked.

    Raises:
        ConfigError: no such process can be started; its last words.
    """
    run = subprocess.run(
        [sys.executable, "-c", _SERVER, str(path)], capture_output=True, text=True, check=False, timeout=120
    )
    if run.returncode:
        said = run.stderr.strip().splitlines()
        raise ConfigError(f"{path}: a serving process cannot be started here: {said[-1] if said else run.returncode}")
    return int(run.stdout)


def working_bytes(model: ModelSpec) -> int:
    """Space for a step of ``ROWS`` rows, for threads and requests, and for the interpreter's own growth.

    Rows that wait for the outputs of experts with lower ids are the largest part: one for each choice. About four more,
    as wide as the hidden width or all heads, hold what a layer passes on.
    """
    choices = max((layer.router.top_k for layer in model.layers if layer.router is not None), default=0)
    widest = max(model.hidden, model.heads * model.head_dim)
    return (12 << 20) + 4 * ROWS * (choices * model.hidden + 4 * widest) + 8 * model.vocab


def page_bytes(model: ModelSpec) -> int:
    """Bytes of keys and values of 16 positions, all layers, those of a decoupled router included."""
    own = len(model.layers) * 2 * LANES * model.kv_heads * model.head_dim * 4
    return own + (0 if model.token_router is None else gate_bytes(model.token_router))


def room(packed: Packed, memory: int, context: int | None = None, process: int | None = None) -> Room:
    """Where everything goes.

    Args:
        memory: bytes the whole process may take. context: positions of keys and values over all requests; None:
            ``POSITIONS``, or the model's own. process: bytes of the process without the model; None: of this one now.

    Raises:
        ConfigError: the memory does not suffice; says for what.
    """
    model = packed.model
    pages = -(-(context or min(POSITIONS, model.positions or POSITIONS)) // LANES)
    weights = sum(piece.nbytes for piece in packed.tensors.values())
    taken = {
        "the process": resident_set() if process is None else process,
        "what every token needs": weights,
        f"keys and values of {pages * LANES} positions": pages * page_bytes(model),
        "working space": working_bytes(model),
    }
    experts = packed.files[EXPERTS][0]
    largest = max((there.stride for there in packed.experts.values()), default=0)
    budget = memory - sum(taken.values())
    if budget < min(experts, 2 * largest):
        parts = ", ".join(f"{name} {size:,}" for name, size in taken.items())
        raise ConfigError(
            f"{packed.path}: {memory:,} bytes are too few: {parts}, and two experts {2 * largest:,}; give more memory "
            f"({sum(taken.values()) + min(experts, 2 * largest):,} at least), or keep fewer positions with --context"
        )
    count = sum(there.num for there in packed.experts.values())
    process_bytes, _, cache, working = taken.values()
    return Room(memory, process_bytes, weights, pages, cache, working, budget, experts, largest, count)
