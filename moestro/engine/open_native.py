"""A packed model under a memory limit: what every token needs, keys and values, the rest for experts."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from moestro.core.errors import ConfigError, LoadError
from moestro.core.expert_cache import Oracle
from moestro.core.forecast import Forecast
from moestro.core.plan import MethodUse
from moestro.engine.acting import POLICY, as_use, cache_and_forecast, check_ready
from moestro.engine.ahead import Foresight
from moestro.engine.describe import describe
from moestro.engine.kernels.interface import Addresses
from moestro.engine.native_forward import NativeForward
from moestro.engine.packed import Packed
from moestro.engine.room import POSITIONS, room
from moestro.engine.slabs import load_all
from moestro.engine.store import ExpertStore


PASSES = 16
"""Passes of the queue that a policy is told of which does not say how many."""

LEAST_RIGHT = 0.5
"""Of what a forecast names and memory lacks, the share that must turn out needed; else it is not read ahead."""


class Native:
    """A packed model, ready to run.

    Args:
        path: the packed folder. memory: bytes the whole process may take, this interpreter included.
        context: positions of keys and values over all requests; None: ``POSITIONS``, or the model's own. policy: method
            of who leaves when experts do not all fit. forecast: method of what says which experts to read ahead; where
            it is the policy too, one object is both. threads: None takes the processors this process may use.

    Attributes:
        forward: the forward. store: None where all experts are in memory. context: positions the model was made for.
        room: where all bytes go. budget: those for experts.

    Raises:
        LoadError: the folder is damaged, or no native model. ConfigError: the memory does not suffice; says how much.
            A forecast that was not taught, or on another model.
    """

    def __init__(
        self,
        path: Path,
        memory: int,
        *,
        context: int | None = None,
        policy: str | MethodUse = POLICY,
        forecast: str | MethodUse | None = None,
        threads: int | None = None,
    ) -> None:
        packed = Packed.open(path)
        model = packed.model
        if model.dialect != "native":
            raise LoadError(f"{path}: no native forward for this model: {model.why}")
        leaves, foresees = cache_and_forecast(as_use(policy), None if forecast is None else as_use(forecast))
        if foresees is not None:  # used or not: its name in a plan shall not be wrong by luck
            check_ready(foresees, model)
        self.context = model.positions or POSITIONS
        self.room = room(packed, memory, context)
        self.budget, pages = self.room.budget, self.room.pages
        description = describe(packed, packed.resident())
        self.store: ExpertStore | None = None
        self._kept: list[Any] = []
        slabs: dict[int, Addresses] | None = None
        passes = PASSES
        if self.room.experts <= self.budget:
            self._kept, slabs = load_all(packed)
        else:
            passes = getattr(leaves, "lookahead", PASSES)
            if model.token_router is None:
                _check_told(path, policy, leaves, forecast, foresees)
            self.store = ExpertStore(packed, self.budget, leaves, least_right=LEAST_RIGHT)
        self.forward = NativeForward(
            description, pages=pages, store=self.store, slabs=slabs, forecast=foresees, threads=threads
        )
        if self.store is not None and isinstance(self.store.cache.policy, Oracle):
            foresight = Foresight(self.store, sorted(packed.experts), frozenset(model.decoupled), passes)
            self.forward.foresight, self.forward.on_gate = foresight, foresight.begin

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


def _check_told(
    path: Path, policy: str | MethodUse, leaves: Any, forecast: str | MethodUse | None, foresees: Forecast | None
) -> None:
    """Raise ConfigError for methods that must know the future, of a model whose routers decide layer by layer."""
    if isinstance(leaves, Oracle):
        raise ConfigError(
            f"{path}: {as_use(policy).method} must be told the future, which only routers of token ids know "
            f"(train.read_me); this model's decide layer by layer: use {POLICY.method} or another policy"
        )
    if forecast is not None and getattr(foresees, "needs_token_router", False):
        raise ConfigError(
            f"{path}: {as_use(forecast).method} expects a token's expert to be the same in all layers, as routers of "
            "token ids have it (train.read_me); this model's decide layer by layer: use serve.next_gate or another "
            "forecast"
        )
