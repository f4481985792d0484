"""One forward of one stack (an encoder, a decoder, a tower): its tokens, what crosses layers, its losses.

A pair of hooks on the stack opens and closes it. Modules ask for it with ``current_context()``; nothing about a forward
is ever kept on a module. A layer that activation checkpointing runs again sees the context of its first run, reads the
same slots and writes nothing.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moestro.core.errors import ContextError
from moestro.core.routing import Routing
from moestro.core.session import Session, current_session, entered
from moestro.core.tokens import Tokens, tokens_of_call, tokens_of_shape


Unit = Literal["token", "sequence", "batch"]


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A loss summed over its units; the training loop divides by the units of the whole optimiser step."""

    total: Tensor
    unit: Unit


@dataclass(eq=False)
class RoutingContext:
    """State of one forward of one stack.

    Attributes:
        stack: name of the stack, for example ``model`` or ``encoder``.
        session: the session in force when the forward began.
        tokens: who the T tokens are; None until the first layer when the stack's call did not tell.
        cache: the Transformers cache object of this call, if any; state that crosses decode steps lives there.
        training: whether the stack ran in training mode.
        losses: (site, name) -> LossTerm.
        module: the stack itself. parent: the context of the stack around this one.
        routings: site -> routing, kept while the session collects (else None: the site was visited).
        kept: (site, name) -> intermediate tensors that the session asked for with ``keeps``.
    """

    stack: str
    session: Session
    tokens: Tokens | None = None
    cache: Any = None
    training: bool = False
    losses: dict[tuple[str, str], LossTerm] = field(default_factory=dict)
    module: nn.Module | None = None
    parent: "RoutingContext | None" = None
    routings: dict[str, Routing | None] = field(default_factory=dict)
    kept: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _sites: tuple[str, ...] | None = None
    _made_in_replay: bool = False  # a layer used alone has no context of its first run; its slots start anew
    _slots: dict[tuple[str, str], Any] = field(default_factory=dict)
    _latest: dict[str, tuple[str, str]] = field(default_factory=dict)
    _links: dict[tuple[str, str], tuple[str, str] | None] = field(default_factory=dict)

    @property
    def replaying(self) -> bool:
        """True while activation checkpointing runs a layer again: whoever keeps counts must not count now."""
        return _REPLAY.get()

    # -- what crosses layers ------------------------------------------------------------------------------------

    def put(self, site: str, name: str, value: Any) -> None:
        """Write a slot. Each (site, name) is written once a forward; a replay's write is dropped.

        Raises:
            ContextError: the slot was written before in this forward.
        """
        if self.replaying and not self._made_in_replay:
            return
        key = (site, name)
        if key in self._slots:
            raise ContextError(
                f"slot {name!r} of site {site!r} was written twice in one forward; give the second a name of its own"
            )
        self._slots[key] = value
        self._latest[name] = key

    def get(self, site: str, name: str, default: Any = None) -> Any:
        """Read the slot that ``site`` wrote, or ``default``."""
        return self._slots.get((site, name), default)

    def previous(self, reader: str, name: str, default: Any = None) -> Any:
        """Read what the last site before ``reader`` wrote under ``name``; a replay reads the same value again.

        Args:
            reader: the site that asks; its own write of this forward is never returned.
        """
        link = (reader, name)
        if self.replaying and not self._made_in_replay:
            source = self._links.get(link)
        else:
            source = self._latest.get(name)
            self._links[link] = source
        return default if source is None else self._slots[source]

    def adopt(self, earlier: "RoutingContext") -> None:
        """Take over the slots of ``earlier``, a context of the same forward that was run in pieces."""
        self._slots = {**earlier._slots, **self._slots}
        self._latest = {**earlier._latest, **self._latest}

    def add_loss(self, site: str, name: str, total: Tensor, unit: Unit) -> None:
        """Add to the loss ``name`` of ``site``: a sum over units, not a mean. Dropped in a replay.

        Args:
            total: scalar with gradient.
            unit: what was summed over; decides the divisor in the training loop.
        """
        if self.replaying:
            return
        before = self.losses.get((site, name))
        if before is not None:
            total = before.total + total
        self.losses[(site, name)] = LossTerm(total, unit)

    def keep(self, site: str, name: str, value: Tensor) -> None:
        """Leave an intermediate tensor, with its gradient, to whoever opened the session with ``keeps=[name]``."""
        if name in self.session.keeps and not self.replaying:
            self.kept[(site, name)] = value

    def value(self, name: str, default: float) -> float:
        """A number that a schedule moves, such as a temperature; ``default`` when no session sets it."""
        return self.session.values.get(name, default)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the mixture layers of this stack in the order they are defined: for look-ahead routers."""
        if self._sites is None:
            modules = () if self.module is None else self.module.modules()
            self._sites = tuple(str(m.site) for m in modules if getattr(m, "is_mixture", False))
        return self._sites

    def close(self) -> None:
        """Hand the context to the session that wants it."""
        self.session.close(self)

    # -- who the tokens are -------------------------------------------------------------------------------------

    def tokens_for(self, hidden: Tensor) -> Tokens:
        """The tokens behind ``hidden`` [..., D]; made from its shape when the call did not tell.

        Raises:
            ContextError: the number of tokens differs from the context's; a layer that works on fewer tokens must open
                ``ctx.subset``.
        """
        count = hidden.numel() // max(hidden.shape[-1], 1)
        if self.tokens is None:
            self.tokens = tokens_of_shape(hidden)
        if self.tokens.count != count:
            raise ContextError(
                f"stack {self.stack!r} has {self.tokens.count} tokens but a layer got {count}; "
                "open ctx.subset(index_T) around layers that see some tokens only"
            )
        return self.tokens

    @contextmanager
    def subset(self, index_T: Tensor) -> Iterator[None]:
        """Inside, the context's tokens are those at ``index_T`` (int64): for depth routing."""
        if self.tokens is None:
            raise ContextError("ctx.subset needs the tokens of the stack; call ctx.tokens_for(hidden) first")
        whole = self.tokens
        self.tokens = whole.take(index_T)
        try:
            yield
        finally:
            self.tokens = whole

    def tag_T(self, name: str, vocabulary: Sequence[Any] | None = None) -> Tensor:
        """The tag ``name`` of each token, int64 [T].

        Args:
            vocabulary: for tags that are not integers: the id of a value is its place here.

        Raises:
            ContextError: no such tag in the session, a value outside the vocabulary, or a shape that fits no row.
        """
        if name not in self.session.tags:
            known = ", ".join(sorted(self.session.tags)) or "none"
            raise ContextError(
                f"no tag {name!r} in this session (set: {known}); run under moestro.session(tags={{{name!r}: ...}})"
            )
        if self.tokens is None:
            raise ContextError(f"tag {name!r} was asked for before the tokens of the stack are known")
        value = self.session.tags[name]
        if callable(value):
            if self.tokens.ids_T is None:
                raise ContextError(f"tag {name!r} is a function of token ids, but the model was given embeddings")
            found = _tag_ids(name, value(self.tokens.ids_T), vocabulary)
            if found.shape != self.tokens.ids_T.shape:
                raise ContextError(
                    f"tag {name!r}: its function was given {self.tokens.count} token ids and must return as many "
                    f"values, not a shape of {list(found.shape)}"
                )
            return found.to(self.tokens.ids_T.device)
        return self.tokens.spread(_tag_ids(name, value, vocabulary))


def _tag_ids(name: str, value: Any, vocabulary: Sequence[Any] | None) -> Tensor:
    """A tag's value as an int64 tensor: [], [B] or [B, S]."""
    if isinstance(value, Tensor):
        return value.long()
    values = [value] if isinstance(value, (str, int)) else list(value)
    if vocabulary is not None:
        place = {item: index for index, item in enumerate(vocabulary)}
        unknown = [item for item in values if item not in place]
        if unknown:
            raise ContextError(f"tag {name!r} has the value {unknown[0]!r}; known: {', '.join(map(str, vocabulary))}")
        values = [place[item] for item in values]
    if any(isinstance(item, str) for item in values):
        raise ContextError(f"tag {name!r} holds text; whoever reads it must give a vocabulary")
    ids = torch.tensor(values, dtype=torch.int64)
    return ids[0] if isinstance(value, (str, int)) else ids


_CURRENT: ContextVar[RoutingContext | None] = ContextVar("moestro_context", default=None)
_REPLAY: ContextVar[bool] = ContextVar("moestro_replay", default=False)


def current_context() -> RoutingContext | None:
    """The context of the innermost stack that is running, or None."""
    return _CURRENT.get()


@contextmanager
def layer_context(hidden: Tensor, training: bool) -> Iterator[RoutingContext]:
    """The running stack's context, or one for this layer alone when no stack is open (a layer used by itself).

    Raises:
        ContextError: the layer runs inside a backward pass, but not in a replay that carries the context.
    """
    if torch._C._current_graph_task_id() != -1 and not _REPLAY.get():
        raise ContextError(
            "a mixture layer was run again in the backward pass without its context; turn checkpointing on with "
            "moestro.checkpoint(model) (use_reentrant=False, context_fn=moestro.core.context.checkpoint_contexts)"
        )
    ctx = _CURRENT.get()
    if ctx is not None:
        ctx.tokens_for(hidden)
        yield ctx
        return
    ctx = RoutingContext("", current_session(), tokens_of_shape(hidden), training=training)
    ctx._made_in_replay = _REPLAY.get()
    _CURRENT.set(ctx)
    try:
        yield ctx
        if not ctx.replaying:
            ctx.close()
    finally:
        _CURRENT.set(None)


# -- hooks on the stack -----------------------------------------------------------------------------------------


def open_stack(module: nn.Module, name: str) -> Callable[[], None]:
    """Make every forward of ``module`` open a RoutingContext and close it, on exceptions too.

    Modules in the stack's ModuleDict ``routing_entries`` are called with ``(ctx, call)`` right after it opened: for
    routers that decide before the first layer.

    Args:
        module: the stack, for example a Transformers base model. name: what its contexts are called.

    Returns:
        A function that takes the hooks off again.
    """
    parameters = tuple(inspect.signature(module.forward).parameters)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parent = _CURRENT.get()
        if parent is not None and parent.module is stack:
            parent = parent.parent  # an interrupt left the last forward of this stack open
        call: Mapping[str, Any] = dict(zip(parameters, args, strict=False)) | kwargs
        ctx = RoutingContext(
            name,
            current_session(),
            tokens_of_call(call),
            call.get("past_key_values"),
            stack.training,
            module=stack,
            parent=parent,
        )
        _CURRENT.set(ctx)
        for entry in getattr(stack, "routing_entries", {}).values():
            entry(ctx, call)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ctx = _CURRENT.get()
        while ctx is not None and ctx.module is not stack:
            ctx = ctx.parent  # an exception inside left a nested stack open
        if ctx is None:
            return
        _CURRENT.set(ctx.parent)
        if output is not None:  # None only after an exception
            ctx.close()

    first = module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    last = module.register_forward_hook(after, always_call=True)

    def remove() -> None:
        first.remove()
        last.remove()

    return remove


# -- activation checkpointing -----------------------------------------------------------------------------------


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """A ``context_fn`` for ``torch.utils.checkpoint``: the replay runs in the context of the first run."""
    ctx = _CURRENT.get()
    return nullcontext(), _replay(ctx, None if ctx is None else ctx.tokens, current_session())


@contextmanager
def _replay(ctx: RoutingContext | None, tokens: Tokens | None, session: Session) -> Iterator[None]:
    running, flag = _CURRENT.get(), _REPLAY.get()
    now = None if ctx is None else ctx.tokens
    _CURRENT.set(ctx)
    _REPLAY.set(True)
    if ctx is not None:
        ctx.tokens = tokens
    try:
        with entered(session):
            yield
    finally:
        if ctx is not None:
            ctx.tokens = now
        _CURRENT.set(running)
        _REPLAY.set(flag)


def checkpoint(model: nn.Module) -> None:
    """Turn on activation checkpointing of a Transformers model the way routed models need it: non-reentrant, with the
    routing context carried into the replay.

    Raises:
        ContextError: the model has no ``activation_checkpointing_enable``; wrap its layers in
            ``torch.utils.checkpoint.checkpoint`` with ``use_reentrant=False, context_fn=checkpoint_contexts``.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        raise ContextError(
            f"{type(model).__name__} has no activation_checkpointing_enable; wrap its layers in torch.utils.checkpoint "
            "with use_reentrant=False and context_fn=checkpoint_contexts"
        )
    enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
