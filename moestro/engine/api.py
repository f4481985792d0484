"""The HTTP interface: an ASGI application over an engine.

Paths are matched exactly as they were sent, by one table, after the key was checked: there is no second reading of a
path that could disagree with the first.
"""

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from moestro.core.decoding import PLAIN
from moestro.core.errors import ConfigError, MoestroError
from moestro.engine import protocol
from moestro.engine.access import check_key, check_origin
from moestro.engine.answers import Answers, usage
from moestro.engine.chat import Templates
from moestro.engine.fields import BadRequest, parse
from moestro.engine.http import (
    Bodies,
    Receive,
    Scope,
    Send,
    answer,
    as_json,
    error_body,
    read_body,
    start_stream,
    write,
)
from moestro.engine.metrics import prometheus
from moestro.engine.protocol import Asked
from moestro.engine.requests import BusyError, Piece, Request
from moestro.engine.service import Engine
from moestro.engine.text import TextStream
from moestro.engine.vocabulary import chat_values


PAGE = Path(__file__).with_name("page")
_ASSETS = {
    "/": ("index.html", b"text/html; charset=utf-8"),
    "/page.css": ("page.css", b"text/css; charset=utf-8"),
    "/page.js": ("page.js", b"text/javascript; charset=utf-8"),
}
_ANSWER_TOKENS = 1024
_PREPARING = 64

News = tuple[int, Piece]


class Api:
    """The application.

    Args:
        engine: what writes the texts. key: who may ask; None: anybody on this machine.
    """

    def __init__(self, engine: Engine, key: bytes | None = None) -> None:
        self.engine = engine
        self.key = key
        self.templates = Templates()
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="moestro-text")
        self.bodies = Bodies()
        self.preparing = 0
        self.paths: dict[str, tuple[str, Callable[[Scope, Receive, Send], Awaitable[None]]]] = {
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
            "/state": ("GET", self._state),
            "/v1/models": ("GET", self._models),
            "/v1/completions": ("POST", functools.partial(self._complete, protocol.completion)),
            "/v1/chat/completions": ("POST", functools.partial(self._complete, protocol.chat_completion)),
            **dict.fromkeys(_ASSETS, ("GET", self._asset)),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        path, method = scope["path"], scope["method"]
        try:
            if path != "/health":
                check_key(scope["headers"], self.key)
                check_origin(scope["headers"], self.key, method)
            if path not in self.paths:
                raise BadRequest(f"there is nothing at {path[:80]!r}", status=404)
            wanted, handler = self.paths[path]
            if method != wanted and not (method == "HEAD" and wanted == "GET"):
                raise BadRequest(f"{method[:20]} is not answered here, {wanted} is", status=405)
            await handler(scope, receive, send)
        except BadRequest as error:
            with contextlib.suppress(TimeoutError, OSError):
                await self._refuse(path, error, send)
        except (TimeoutError, OSError):
            return  # the client does not read, or is gone

    async def _refuse(self, path: str, error: BadRequest, send: Send) -> None:
        # The body may not have been read: the connection cannot go on.
        extra = [(b"connection", b"close")]
        if error.retry_after is not None:
            extra.append((b"retry-after", str(error.retry_after).encode()))
        if error.status == 401:
            # Browsers ask for a key where the page is opened, and send it along from then on.
            extra.append((b"www-authenticate", b'Basic realm="moestro"' if path in _ASSETS else b"Bearer"))
        await answer(send, error.status, as_json(error_body(error)), extra=extra)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    def close(self) -> None:
        """Stop the engine and the process of the templates."""
        self.engine.close()
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.templates.close()

    # -- small answers -------------------------------------------------------------------------------------------

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        going = self.engine.draining
        await answer(send, 503 if going else 200, as_json({"status": "draining" if going else "ok"}))

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        engine = self.engine
        text = prometheus(engine.scheduler.stats, engine.gauges(), engine.opened.counters(), engine.heat)
        await answer(send, 200, text.encode(), b"text/plain; version=0.0.4; charset=utf-8")

    async def _state(self, scope: Scope, receive: Receive, send: Send) -> None:
        engine = self.engine
        body = {
            "model": engine.opened.name,
            "forward": engine.opened.kind,
            "context": engine.context,
            "chat": engine.opened.vocabulary.template is not None,
            "gauges": engine.gauges(),
            "cached_tokens": engine.scheduler.pages.hit_tokens,
            "counters": engine.opened.counters(),
            "heat": engine.heat.lately(),
        }
        await answer(send, 200, as_json(body))

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        engine = self.engine
        model = {"id": engine.opened.name, "object": "model", "created": int(engine.started), "owned_by": "moestro",
                 "max_model_len": engine.context}  # fmt: skip
        await answer(send, 200, as_json({"object": "list", "data": [model]}))

    async def _asset(self, scope: Scope, receive: Receive, send: Send) -> None:
        name, kind = _ASSETS[scope["path"]]
        await answer(send, 200, (PAGE / name).read_bytes(), kind)

    # -- completions ---------------------------------------------------------------------------------------------

    async def _complete(self, read: Callable[..., Asked], scope: Scope, receive: Receive, send: Send) -> None:
        busy = self.engine.busy()
        if busy is not None:
            raise _busy(busy)
        raw = await read_body(scope["headers"], receive, self.bodies)
        if self.preparing >= _PREPARING:
            raise _busy(BusyError("too many prompts are being read", 1))
        self.preparing += 1
        try:
            body = parse(raw)
            opened = self.engine.opened
            asked = read(body, opened.name, opened.forward.vocab, self.engine.context)
            if asked.decoder is PLAIN:
                asked = replace(asked, decoder=self.engine.decoder)
            prompts = await asyncio.get_running_loop().run_in_executor(self.threads, self._tokens, asked)
        except MoestroError as error:
            raise BadRequest(str(error)) from None
        finally:
            self.preparing -= 1
        news: asyncio.Queue[News] = asyncio.Queue()
        requests = self._requests(asked, prompts, news)
        try:
            self.engine.submit(*requests)
        except BusyError as error:
            raise _busy(error) from None
        except ConfigError as error:
            raise BadRequest(str(error), code="context_length_exceeded") from None
        answers = Answers(asked, opened.name, opened.vocabulary)
        work = asyncio.ensure_future((_stream if asked.stream else _whole)(send, answers, requests, news))
        left = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self.engine.cancel(*requests)
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)

    def _tokens(self, asked: Asked) -> list[list[int]]:
        """Token ids of every prompt; runs in a thread."""
        vocabulary = self.engine.opened.vocabulary
        if asked.chat:
            text = self.templates.render(vocabulary.template or "", chat_values(vocabulary, asked.messages))
            return [vocabulary.encode(text, special=False)]
        found = []
        for prompt in asked.prompts:
            ids = vocabulary.encode(prompt) if isinstance(prompt, str) else prompt
            found.append(ids or ([] if vocabulary.start is None else [vocabulary.start]))
        return found

    def _requests(self, asked: Asked, prompts: list[list[int]], news: "asyncio.Queue[News]") -> list[Request]:
        loop = asyncio.get_running_loop()
        vocabulary = self.engine.opened.vocabulary

        def tell(index: int, piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended: nobody listens any more
                loop.call_soon_threadsafe(news.put_nowait, (index, piece))

        requests: list[Request] = []
        for number, prompt in enumerate(prompts):
            room = self.engine.context - len(prompt)
            if room < (asked.max_tokens or 1):
                raise BadRequest(
                    f"{len(prompt)} tokens of prompt and {asked.max_tokens or 1} to write are more than the "
                    f"{self.engine.context} positions of a request",
                    code="context_length_exceeded",
                )
            for choice in range(asked.n):
                sampling = asked.sampling
                if sampling.seed is not None and choice:
                    sampling = protocol.reseeded(sampling, choice)
                requests.append(
                    Request(
                        prompt,
                        asked.max_tokens or min(_ANSWER_TOKENS, room),
                        sampling,
                        TextStream(vocabulary.decode, asked.stops),
                        functools.partial(tell, len(requests)),
                        vocabulary.ends,
                        asked.decoder,
                        after=requests[number * asked.n] if choice else None,
                    )
                )
        return requests


async def _gone(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _whole(send: Send, answers: Answers, requests: list[Request], news: "asyncio.Queue[News]") -> None:
    pieces: list[list[Piece]] = [[] for _ in requests]
    open_ones = len(requests)
    while open_ones:
        index, piece = await news.get()
        if piece.error is not None:
            raise _failed(piece.error)
        pieces[index].append(piece)
        open_ones -= piece.finish is not None
    await answer(send, 200, as_json(answers.whole(pieces, usage(requests, answers.asked.n))))


async def _stream(send: Send, answers: Answers, requests: list[Request], news: "asyncio.Queue[News]") -> None:
    """Server-sent events; what came while the client was reading goes out together."""
    told = [0] * len(requests)
    begun: set[int] = set()
    open_ones = len(requests)
    started = False
    while open_ones:
        batch: dict[int, list[Piece]] = {}
        index, piece = await news.get()
        batch[index] = [piece]
        while not news.empty():
            index, piece = news.get_nowait()
            batch.setdefault(index, []).append(piece)
        failed = next((part.error for parts in batch.values() for part in parts if part.error is not None), None)
        if failed is not None and not started:
            raise _failed(failed)
        if not started:
            await start_stream(send)
            started = True
        out = b""
        for index, parts in batch.items():
            if failed is None and (parts[-1].finish or any(part.text or part.choice for part in parts)):
                out += b"data: " + as_json(answers.chunk(index, parts, told[index], index not in begun)) + b"\n\n"
                begun.add(index)
                told[index] += sum(len(part.text) for part in parts)
            open_ones -= parts[-1].finish is not None
        if failed is not None:
            out += b"data: " + as_json(error_body(_failed(failed))) + b"\n\n"
            open_ones = 0
        await write(send, {"type": "http.response.body", "body": out, "more_body": True})
    tail = b""
    if answers.asked.usage:
        tail += b"data: " + as_json(answers.last(usage(requests, answers.asked.n))) + b"\n\n"
    await write(send, {"type": "http.response.body", "body": tail + b"data: [DONE]\n\n"})


def _busy(error: BusyError) -> BadRequest:
    status = 503 if "going down" in str(error) else 429
    return BadRequest(str(error), status=status, code="busy", retry_after=error.retry_after)


def _failed(error: Exception) -> BadRequest:
    """Why a request that ran has no answer."""
    if isinstance(error, BusyError):
        return _busy(error)
    if isinstance(error, ConfigError):
        return BadRequest(str(error))
    return BadRequest(
        f"the model failed on this request ({type(error).__name__}: {str(error)[:200]})",
        status=503,
        code="engine_fault",
        retry_after=1,
    )
