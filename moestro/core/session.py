"""What a user sets around forwards: tags, edits, a recorder, an architecture encoding.

    with moestro.session(edits=[...], recorder=trace):
        model.generate(...)

Every forward inside inherits it, each step of ``generate`` too. Sessions nest: an inner one adds its edits after the
outer one's, merges its tags over them, and takes the outer's recorder, arch and adapters where it names none. A session
belongs to the thread (or task) that opened it, like ``torch.no_grad``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from moestro.core.routing import Routing, Scores


if TYPE_CHECKING:
    from moestro.core.context import RoutingContext
    from moestro.core.router import Router


class Edit:
    """The only way to override a router's decision from outside. Override one method or both."""

    def on_scores(self, site: str, scores: Scores, ctx: "RoutingContext") -> Scores:
        """Change scores before the router chooses."""
        return scores

    def on_routing(self, site: str, routing: Routing, router: "Router", ctx: "RoutingContext") -> Routing:
        """Change the routing after the router chose."""
        return routing


class Recorder(Protocol):
    """Whoever wants to see every routing decision; called once per layer and forward, never in a replay."""

    def record(self, site: str, routing: Routing, ctx: "RoutingContext") -> None:
        """Take one layer's routing."""


@dataclass(slots=True)
class Session:
    """Settings in force; see ``session`` for what each is."""

    tags: Mapping[str, Any] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    recorders: tuple[Recorder, ...] = ()
    arch: Any = None
    adapters: bool | str | Sequence[str] = True
    values: Mapping[str, float] = field(default_factory=dict)
    global_load: Mapping[str, Tensor] = field(default_factory=dict)
    keeps: frozenset[str] = frozenset()
    collect: bool = False
    _closed: list["RoutingContext"] = field(default_factory=list)

    def close(self, ctx: "RoutingContext") -> None:
        """Called when a forward's context closes without an exception."""
        if self.collect:
            self._closed.append(ctx)

    def take(self) -> list["RoutingContext"]:
        """The contexts of the forwards since the last call, oldest first (only with ``collect=True``)."""
        taken = list(self._closed)
        self._closed.clear()
        return taken


_NONE = Session()
_CURRENT: ContextVar[Session] = ContextVar("moestro_session", default=_NONE)


def current_session() -> Session:
    """The innermost open session, or an empty one."""
    return _CURRENT.get()


@contextmanager
def session(
    *,
    tags: Mapping[str, Any] | None = None,
    edits: Sequence[Edit] = (),
    recorder: Recorder | None = None,
    arch: Any = None,
    adapters: bool | str | Sequence[str] | None = None,
    values: Mapping[str, float] | None = None,
    global_load: Mapping[str, Tensor] | None = None,
    keeps: Sequence[str] = (),
    collect: bool | None = None,
) -> Iterator[Session]:
    """Open a session.

    Args:
        tags: name -> scalar, sequence of B values, tensor [B] or [B, S], or a function of the token ids (int64 [T] to
            int64 [T]), which also tags the tokens that ``generate`` adds; read by routers through ``ctx.tag_T``.
        edits: applied in order at every mixture layer.
        recorder: sees each routing decision, besides the outer session's recorders.
        arch: an architecture encoding for supernets.
        adapters: False switches adapters off; a name or names select some.
        values: numbers that a schedule moves (temperatures, keep ratios); read through ``ctx.value``.
        global_load: site -> counts [C] over the whole optimiser step, for balance losses of scope "global".
        keeps: names of intermediate tensors (``input``, ``output``, ...) that each site leaves in ``ctx.kept``.
        collect: keep the contexts of finished forwards, with their losses, for ``take()``. None: an inner session's
            forwards go to the outer collector, if there is one; False: they are not kept (a teacher's forwards).
    """
    outer = current_session()
    shares = collect is None and outer.collect
    opened = Session(
        tags={**outer.tags, **(tags or {})},
        edits=(*outer.edits, *edits),
        recorders=(*outer.recorders, recorder) if recorder is not None else outer.recorders,
        arch=outer.arch if arch is None else arch,
        adapters=outer.adapters if adapters is None else adapters,
        values={**outer.values, **(values or {})},
        global_load=outer.global_load if global_load is None else global_load,
        keeps=outer.keeps | frozenset(keeps),
        collect=shares or bool(collect),
        _closed=outer._closed if shares else [],
    )
    with entered(opened):
        yield opened


@contextmanager
def entered(opened: Session) -> Iterator[None]:
    """Put an existing session in force: a replayed layer runs under the session of its first run."""
    outer = current_session()
    _CURRENT.set(opened)
    try:
        yield
    finally:
        _CURRENT.set(outer)
