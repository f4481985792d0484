"""What a scheduler is asked for, its limits, and what it tells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moestro.core.decoding import PLAIN, Decoder
from moestro.core.errors import ConfigError, MoestroError
from moestro.engine.sampler import Choice, Sampler, Sampling
from moestro.engine.sequences import Floats, Ints, Table
from moestro.engine.text import TextStream


class BusyError(MoestroError):
    """The queue is full.

    Attributes:
        retry_after: seconds after which it may have room.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much at once.

    Attributes:
        running: sequences that are read or written at once (a decoder with two passes counts twice).
        chunk: rows of a step at most. mixed: rows of prompts in a step in which others are written.
        waiting, waiting_tokens: requests in the queue, and their prompts and answers together.
        width: sequences written in one step; the others are passed over. max_wait: seconds for which at most.
    """

    running: int = 16
    chunk: int = 256
    mixed: int = 64
    waiting: int = 64
    waiting_tokens: int = 1 << 18
    width: int | None = None
    max_wait: float = 0.5

    def __post_init__(self) -> None:
        for name in ("running", "chunk", "mixed", "waiting", "waiting_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be at least 1")
        if self.width is not None and self.width < 1:
            raise ConfigError(f"width={self.width}; it must be at least 1")


@dataclass(frozen=True)
class Piece:
    """News of a request, in order; the last one has ``finish`` or ``error``.

    Attributes:
        text: what may be shown now. choice: the token behind it, None where only held text is let go.
        finish: stop, length or cancelled. error: why the request failed.
    """

    text: str = ""
    choice: Choice | None = None
    finish: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Lane:
    """One pass over a request's tokens: its pages, its routing, and its logits until all passes have theirs."""

    table: Table
    route: int
    logits: Floats | None = None


@dataclass(eq=False)
class Request:
    """One text to write.

    Attributes:
        prompt: token ids, at least one. max_tokens: how many to write at most. ends: tokens that end a text.
        sink: called from the engine's thread with every Piece; it must not block.
        after: a request with the same prompt, whose pages are worth waiting for.
        ahead: experts of its first tokens, int32 [n], as far as a router of token ids was asked. ran: when some of it
            last ran, or when it came.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    text: TextStream
    sink: Callable[[Piece], None]
    ends: frozenset[int] = frozenset()
    decoder: Decoder = PLAIN
    after: "Request | None" = None
    tokens: list[int] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)
    cancelled: bool = False
    done: bool = False
    arrived: float = 0.0
    served: float = 0.0
    ran: float = 0.0
    ahead: Ints | None = None
    routes: tuple[int, ...] = ()
    cached: int = 0
    _sampler: Sampler | None = None

    @property
    def sampler(self) -> Sampler:
        """Its draws."""
        if self._sampler is None:
            self._sampler = Sampler(self.sampling, self.ends)
        return self._sampler

    @property
    def positions(self) -> int:
        """Keys and values it may need in one pass; the last token's are never used."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def size(self) -> int:
        """Tokens of prompt and answer over all passes."""
        return (len(self.prompt) + self.max_tokens) * len(self.decoder.routes)

    @property
    def writing(self) -> bool:
        """Its prompt is read."""
        return len(self.tokens) > len(self.prompt)


@dataclass(frozen=True)
class Work:
    """Rows ``lane.table.length`` .. ``stop - 1`` of a lane."""

    request: Request
    lane: Lane
    stop: int

    @property
    def rows(self) -> int:
        """Their number."""
        return self.stop - self.lane.table.length
