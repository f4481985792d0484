"""The HTTP side that knows nothing of models: connections with deadlines, bodies with limits, answers."""

import asyncio
import contextlib
import json
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from moestro.engine.access import Headers, values
from moestro.engine.fields import BadRequest


Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

CONNECTIONS = 512
HEADER_SECONDS = 15.0
BODY_SECONDS = 30.0
WRITE_SECONDS = 30.0
HEADER_BYTES = 16 << 10
BODY_BYTES = 4 << 20
GRACE_SECONDS = 8

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-type: application/json\r\ncontent-length: 60\r\n\r\n"
    b'{"error": {"message": "too many connections", "code": null}}'
)
# What every answer carries: nothing is guessed, framed, cached or loaded from elsewhere.
_ALWAYS: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


class Guarded(H11Protocol):
    """HTTP/1.1 by h11, with a limit on connections and a deadline for the head of a request."""

    most = CONNECTIONS
    seconds = HEADER_SECONDS
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Count, and start the clock."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(_FULL)
            transport.close()
            return
        self._arm()

    def handle_events(self) -> None:
        """The head has come when a request runs."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._disarm()

    def on_response_complete(self) -> None:
        """The next request of this connection has its own deadline."""
        super().on_response_complete()
        if self._deadline is None and not self.transport.is_closing():
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._disarm()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Rubbish in the middle of an answer cannot be answered; the connection ends."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            return
        super().send_400_response(msg)

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(self.seconds, self.transport.abort)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """uvicorn, which on SIGTERM or SIGINT calls ``on_exit``, finishes what runs, and returns.

    Args:
        app: an ASGI application. on_exit: called when the first signal comes.
    """

    def __init__(self, app: Any, host: str, port: int, on_exit: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=Guarded,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_level="critical",
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_keep_alive=10,
                timeout_graceful_shutdown=GRACE_SECONDS,
                backlog=256,
            )
        )
        self.on_exit = on_exit

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the two signals inside the event loop; nothing is raised again when the server has ended."""
        loop = asyncio.get_running_loop()

        def leave() -> None:
            self.force_exit = self.should_exit
            self.should_exit = True
            self.on_exit()

        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread
                loop.add_signal_handler(number, leave)
        try:
            yield
        finally:
            for number in signals:
                with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                    loop.remove_signal_handler(number)


async def read_body(headers: Headers, receive: Receive, most: int = BODY_BYTES, seconds: float = BODY_SECONDS) -> bytes:
    """The body of a JSON request.

    Raises:
        BadRequest: another type (415), too large (413), too slow (408), or the client left (499).
    """
    kinds = values(headers, b"content-type")
    if len(kinds) != 1 or kinds[0].split(b";")[0].strip().lower() != b"application/json":
        raise BadRequest("the content type must be application/json", status=415)
    if any(value.strip().lower() != b"identity" for value in values(headers, b"content-encoding")):
        raise BadRequest("compressed bodies are not read", status=415)
    too_large = BadRequest(f"the body is larger than {most} bytes", status=413)
    for length in values(headers, b"content-length"):
        if not length.isdigit() or int(length[:20]) > most:
            raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise BadRequest("the client left", status=499)
                body += message.get("body", b"")
                if len(body) > most:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise BadRequest(f"the body took more than {seconds:g} s", status=408) from None


async def answer(
    send: Send, status: int, body: bytes, kind: bytes = b"application/json", extra: Headers | None = None
) -> None:
    """A whole answer."""
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *_ALWAYS, *(extra or [])]
    await write(send, {"type": "http.response.start", "status": status, "headers": headers})
    await write(send, {"type": "http.response.body", "body": body})


async def start_stream(send: Send) -> None:
    """The head of a stream of server-sent events."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no"), *_ALWAYS]
    await write(send, {"type": "http.response.start", "status": 200, "headers": headers})


async def write(send: Send, message: dict[str, Any]) -> None:
    """Send, within a time: who does not read is let go.

    Raises:
        TimeoutError: the client reads too slowly.
    """
    async with asyncio.timeout(WRITE_SECONDS):
        await send(message)


def as_json(value: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def error_body(error: BadRequest) -> dict[str, Any]:
    """An error in the shape that clients of this protocol read."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
