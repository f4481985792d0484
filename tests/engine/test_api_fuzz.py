"""Generated bodies: never a crash, never a 500, always an answer in the shape of the protocol."""

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from moestro.engine.fields import BadRequest, parse
from moestro.engine.protocol import chat_completion, completion
from tests.engine.serving import Running, serving


FIELDS = [
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "ignore_eos",
    "echo",
    "suffix",
    "best_of",
    "user",
    "tools",
    "tool_choice",
    "response_format",
    "decoding",
    "metadata",
    "modalities",
]
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, 10**25, 2**63, -(2**63), "", "x", "\u0000", "stub", "é😀",
    "\ud800", [], [[]], [1, 2], [1, "a"], ["a", "b"], {}, {"a": 1}, {"5": 1}, {"type": "text"}, [{"role": "user"}],
    [{"role": "user", "content": "hi"}], {"method": "serve.lru"}, {"method": "serve."}, {"include_usage": True},
)  # fmt: skip
BROKEN = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b'{"prompt": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "\xc3\x28"}',
    b'{"n": ' + b"9" * 5000 + b"}",
    b'{"a": ' + b"[" * 10000 + b"]" * 10000 + b"}",
    b'{"a":' * 10000 + b"1" + b"}" * 10000,
    b"[" * 200000,
    json.dumps({"prompt": "a", **{f"k{i}": i for i in range(5000)}}).encode(),
)


def generated(draw: random.Random) -> dict[str, Any]:
    body = {draw.choice(FIELDS): draw.choice(ODD) for _ in range(draw.randrange(1, 6))}
    if draw.random() < 0.7:
        body.setdefault("prompt", "hello")
        body.setdefault("messages", [{"role": "user", "content": "hi"}])
    if draw.random() < 0.5:
        body.pop(draw.choice(("prompt", "messages")), None)
    return body


def test_twenty_thousand_bodies_are_read_or_refused() -> None:
    draw = random.Random(5)
    accepted, refused = 0, []
    for _ in range(20_000):
        body = generated(draw)
        read = draw.choice((completion, chat_completion))
        try:
            asked = read(parse(json.dumps(body).encode()), "stub", 257, 1024)
        except BadRequest as error:
            refused.append(error)
        else:
            accepted += 1
            assert 1 <= asked.n <= 8
            assert asked.max_tokens is None or 1 <= asked.max_tokens <= 1024
    assert 100 < accepted < 19_000
    assert {error.status for error in refused} <= {400, 404}
    assert max(len(str(error)) for error in refused) < 600


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_broken_bodies_are_400_and_quick(server: Running, path: str) -> None:
    with httpx.Client(base_url=server.url, headers={"content-type": "application/json"}) as client:
        times = []
        for body in BROKEN:
            began = time.monotonic()
            reply = client.post(path, content=body)
            times.append(time.monotonic() - began)
            assert reply.status_code == 400, body[:60]
            assert reply.json()["error"]["type"] == "invalid_request_error"
        assert sorted(times)[len(times) // 2] < 0.2


def test_generated_requests_over_http(server: Running) -> None:
    draw = random.Random(9)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for number in range(300):
            body = {**generated(draw), "max_tokens": 2}
            if number % 50 == 0:
                assert client.get("/health").json() == {"status": "ok"}
            content = json.dumps(body).encode()
            path = draw.choice(("/v1/completions", "/v1/chat/completions"))
            reply = client.post(path, content=content, headers={"content-type": "application/json"})
            assert reply.status_code in (200, 400, 404), reply.text
