"""A packed model under a memory limit: what every token needs, keys and values, the rest for experts."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError, LoadError
from moestro.core.expert_cache import CachePolicy
from moestro.core.forecast import Forecast
from moestro.core.registry import method
from moestro.engine.describe import describe
from moestro.engine.kernels.interface import LANES, Addresses
from moestro.engine.native_forward import NativeForward
from moestro.engine.packed import EXPERTS, Packed
from moestro.engine.slabs import load_all
from moestro.engine.store import ExpertStore


RESERVE = 64 << 20
"""Bytes for what a step computes with, threads, requests and the interpreter's own growth."""

POSITIONS = 4096
"""Positions of keys and values that are kept unless asked otherwise, or the model's own if it has fewer."""


class Native:
    """A packed model, ready to run.

    Args:
        path: the packed folder. memory: bytes the whole process may take, this interpreter included.
        context: positions of keys and values over all requests; None: ``POSITIONS``, or the model's own. policy: method
            id of who leaves when experts do not all fit. forecast: method id of what says which experts to read ahead;
            where it names the policy too, one object is both. threads: None takes the processors this process may use.

    Attributes:
        forward: the forward. store: None where all experts are in memory. context: positions the model was made for.
        budget: bytes for experts.

    Raises:
        LoadError: the folder is damaged, or no native model. ConfigError: the memory does not suffice; says how much.
    """

    def __init__(
        self,
        path: Path,
        memory: int,
        *,
        context: int | None = None,
        policy: str = "serve.lru",
        forecast: str | None = None,
        threads: int | None = None,
    ) -> None:
        packed = Packed.open(path)
        model = packed.model
        if model.dialect != "native":
            raise LoadError(f"{path}: no native forward for this model: {model.why}")
        self.context = model.positions or POSITIONS
        pages = -(-(context or min(POSITIONS, self.context)) // LANES)
        page_bytes = len(model.layers) * 2 * LANES * model.kv_heads * model.head_dim * 4
        taken = {
            "the process": _resident_set(),
            "what every token needs": sum(piece.nbytes for piece in packed.tensors.values()),
            f"keys and values of {pages * LANES} positions": pages * page_bytes,
            "working space": RESERVE,
        }
        experts = packed.files[EXPERTS][0]
        largest = max((there.stride for there in packed.experts.values()), default=0)
        self.budget = memory - sum(taken.values())
        if self.budget < min(experts, 2 * largest):
            parts = ", ".join(f"{name} {size:,}" for name, size in taken.items())
            raise ConfigError(
                f"{path}: {memory:,} bytes are too few: {parts}, and two experts {2 * largest:,}; give more memory, or "
                "keep fewer positions with --context"
            )
        description = describe(packed, packed.resident())
        self.store: ExpertStore | None = None
        self._kept: list[Any] = []
        slabs: dict[int, Addresses] | None = None
        foresees: Forecast | None = None
        if experts <= self.budget:
            self._kept, slabs = load_all(packed)
        else:
            leaves, foresees = acting(policy, forecast)
            self.store = ExpertStore(packed, self.budget, leaves)
        self.forward = NativeForward(
            description, pages=pages, store=self.store, slabs=slabs, forecast=foresees, threads=threads
        )

    def counters(self) -> dict[str, float]:
        """Counts of the store since it was opened; none where all experts are in memory."""
        return {} if self.store is None else {name: float(value) for name, value in asdict(self.store.counters).items()}

    def gauges(self) -> dict[str, float]:
        """Bytes for experts: the limit and what is held, and their number; none where all are in memory."""
        if self.store is None:
            return {}
        cache = self.store.cache
        return {
            "expert_budget_bytes": float(self.budget),
            "expert_bytes": float(cache.used),
            "resident_experts": float(len(cache.resident)),
        }

    def close(self) -> None:
        """Give the experts' memory back."""
        if self.store is not None:
            self.store.close()
        for slot in self._kept:
            slot.free()
        self._kept = []


def acting(policy: str, forecast: str | None = None) -> tuple[CachePolicy, Forecast | None]:
    """A policy and a forecast by method id; one object where both name the same method.

    Raises:
        RegistryError: no such method, or it is not of that kind.
    """
    foresees: Forecast | None = None
    if forecast is not None:
        use = method(forecast)
        foresees = use.entry("forecast")(use.configure({}))
        both = getattr(foresees, "policy", None)
        if policy == forecast and both is not None:
            return both, foresees
    use = method(policy)
    return use.entry("policy")(use.configure({})), foresees


def _resident_set() -> int:
    """Bytes of this process that are in memory now; where the system does not say, what an interpreter takes."""
    import os

    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 64 << 20
    return pages * os.sysconf("SC_PAGE_SIZE")
