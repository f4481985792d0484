"""Who gets in: keys, names, origins, addresses, odd paths, rubbish."""

import base64
import contextlib
import itertools
import json
import random
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from moestro.core.errors import ConfigError
from moestro.engine import http as http_module
from moestro.engine.access import check_bind, read_key
from tests.engine.serving import Running, raw, serving, status


KEY = b"0123456789abcdef"
BEARER = b"authorization: Bearer " + KEY
ROUTES = ("/", "/page.css", "/page.js", "/metrics", "/state", "/v1/models", "/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def opened() -> Iterator[Running]:
    with serving() as running:
        yield running


def ask(port: int, method: str, path: str, *headers: bytes, body: bytes = b"", version: str = "1.1") -> int:
    head = f"{method} {path} HTTP/{version}\r\n".encode() + b"".join(h + b"\r\n" for h in headers)
    if not any(h.lower().startswith(b"host:") for h in headers):
        head += b"host: 127.0.0.1\r\n"
    length = b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    return status(raw(port, head + length + body))


BASIC = b"authorization: Basic "
WRONG = {
    "none": (),
    "empty": (b"authorization: ",),
    "empty bearer": (b"authorization: Bearer ",),
    "wrong": (b"authorization: Bearer 0123456789abcdeg",),
    "prefix": (b"authorization: Bearer 0123456789abcde",),
    "longer": (b"authorization: Bearer " + KEY + b"0",),
    "no scheme": (b"authorization: " + KEY,),
    "digest": (b"authorization: Digest " + KEY,),
    "wrong x-api-key": (b"x-api-key: nonsense",),
    "right and wrong": (BEARER, b"x-api-key: nonsense"),
    "wrong and right": (b"authorization: Bearer nonsense", b"x-api-key: " + KEY),
    "twice, one wrong": (BEARER, b"authorization: Bearer nonsense"),
    "basic wrong": (BASIC + base64.b64encode(b"user:nonsense"),),
    "basic user": (BASIC + base64.b64encode(KEY + b":"),),
    "basic rubbish": (BASIC + b"!!!",),
    "other host": (b"host: evil.example",),
    "bytes": (b"authorization: Bearer \xff\xfe",),
}
PATHS = ("{}", "/{}", "{}/", "/.{}", "/x/..{}", "{}?key=1", "{}%20", "/%2e%2e{}", "{}#", "/health/..{}", "/health{}")


@pytest.mark.parametrize("route", ROUTES)
def test_nothing_but_health_answers_without_the_key(locked: Running, route: str) -> None:
    for form, headers in itertools.product(PATHS, WRONG.values()):
        assert ask(locked.port, "GET", form.format(route), *headers) == 401, (form, headers)
    for upper, version in ((route.upper(), "1.1"), (route, "1.0"), (route.replace("/", "%2f"), "1.1")):
        assert ask(locked.port, "GET", upper, version=version) in (400, 401)
        assert ask(locked.port, "POST", upper, version=version, body=b"{}") in (400, 401)


def test_health_answers_without_and_its_variants_do_not(locked: Running) -> None:
    assert ask(locked.port, "GET", "/health") == 200
    for path in ("//health", "/health/", "/Health", "/./health", "/health%2f", "/health;/v1/models", "/healthz"):
        assert ask(locked.port, "GET", path) == 401


@pytest.mark.parametrize(
    "headers",
    [
        (BEARER,),
        (b"authorization: bearer " + KEY,),
        (b"x-api-key: " + KEY,),
        (BEARER, b"x-api-key: " + KEY),
        (BASIC + base64.b64encode(b"anybody:" + KEY),),
    ],
)
def test_the_key_opens(locked: Running, headers: tuple[bytes, ...]) -> None:
    for route in ROUTES[:6]:
        assert ask(locked.port, "GET", route, *headers) == 200
    assert ask(locked.port, "GET", "/v1/completions", *headers) == 405
    assert ask(locked.port, "GET", "/nothing", *headers) == 404
    assert ask(locked.port, "GET", "//v1/models", *headers) == 404


def test_pipelined_requests_are_each_checked(locked: Running) -> None:
    one = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n"
    reply = raw(locked.port, one + BEARER + b"\r\n\r\n" + one + b"connection: close\r\n\r\n")
    assert reply.count(b"HTTP/1.1 200") == 1
    assert reply.count(b"HTTP/1.1 401") == 1


def test_a_browser_is_asked_at_the_page(locked: Running) -> None:
    assert httpx.get(locked.url).headers["www-authenticate"].startswith("Basic")
    assert httpx.get(locked.url, auth=("me", KEY.decode())).status_code == 200
    assert httpx.get(f"{locked.url}/v1/models").headers["www-authenticate"] == "Bearer"


def test_pages_of_others_are_kept_out(opened: Running, locked: Running) -> None:
    assert ask(opened.port, "GET", "/v1/models", b"host: evil.example") == 403
    assert ask(opened.port, "GET", "/v1/models", b"host: localhost.evil.example:80") == 403
    for good in (b"localhost", b"127.0.0.1:9", b"[::1]:80", b"localhost:1"):
        assert ask(opened.port, "GET", "/v1/models", b"host: " + good) == 200
    assert ask(opened.port, "POST", "/v1/completions", b"origin: http://evil.example", body=b"{}") == 403
    assert ask(locked.port, "POST", "/v1/completions", BEARER, b"origin: null", body=b"{}") == 403
    # What a form of a foreign page could send without asking first.
    assert ask(opened.port, "POST", "/v1/completions", b"content-type: text/plain", body=b"{}") == 415
    assert httpx.options(f"{opened.url}/v1/completions").status_code == 405


def test_a_wide_bind_needs_a_key_and_keys_are_checked() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        with pytest.raises(ConfigError, match="api-key-file"):
            check_bind(host, None)
        check_bind(host, KEY)
    check_bind("127.0.0.1", None)
    assert read_key(f" {KEY.decode()}\n", "f") == KEY
    for bad in ("", "short", "with space in the middle", "ключключключключ", "line\nbreakbreakbreak"):
        with pytest.raises(ConfigError, match="16"):
            read_key(bad, "f")


def test_bodies_are_limited_before_they_are_read(opened: Running) -> None:
    kind = b"content-type: application/json"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + kind + b"\r\n"
    began = time.monotonic()
    assert status(raw(opened.port, head + b"content-length: 104857600\r\n\r\n")) == 413
    assert status(raw(opened.port, head + b"content-length: 99999999999999999999999999\r\n\r\n")) in (400, 413)
    assert status(raw(opened.port, head + b"content-length: -5\r\n\r\n")) == 400
    assert time.monotonic() - began < 2
    chunked = head + b"transfer-encoding: chunked\r\n\r\n" + (b"100000\r\n" + b"x" * 0x100000 + b"\r\n") * 5
    with contextlib.suppress(ConnectionError):  # closed while we were still sending: as good
        assert status(raw(opened.port, chunked)) in (413, 0)
    assert ask(opened.port, "POST", "/v1/completions", kind, b"content-encoding: gzip", body=b"{}") == 415


def test_slow_heads_and_slow_bodies_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module.Guarded, "seconds", 0.4)
    monkeypatch.setattr(http_module.read_body, "__defaults__", (http_module.BODY_BYTES, 0.4))
    with serving() as running:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", running.port), timeout=5) as idle:
            assert idle.recv(100) == b""
        with socket.create_connection(("127.0.0.1", running.port), timeout=5) as slow:
            slow.sendall(b"GET / HT")
            assert slow.recv(100) == b""
        body = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        assert status(raw(running.port, body + b"content-length: 100\r\n\r\n{")) == 408
        # A second request of a connection has a deadline too.
        with socket.create_connection(("127.0.0.1", running.port), timeout=5) as second:
            second.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            time.sleep(0.1)
            assert second.recv(4096).startswith(b"HTTP/1.1 200")
            second.sendall(b"GET /hea")
            assert second.recv(4096) == b""
        assert time.monotonic() - began < 5


def test_connections_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module.Guarded, "most", 20)
    with serving() as running:
        idle = [socket.create_connection(("127.0.0.1", running.port), timeout=5) for _ in range(20)]
        time.sleep(0.1)
        reply = raw(running.port, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert status(reply) == 503
        assert b"retry-after" in reply
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["message"]
        for connection in idle:
            connection.close()
        time.sleep(0.1)
        assert ask(running.port, "GET", "/health") == 200


def test_rubbish_on_the_port_harms_nobody(opened: Running) -> None:
    draw = random.Random(3)
    for number in range(120):
        kind = number % 4
        if kind == 0:
            data = draw.randbytes(draw.randrange(1, 400))
        elif kind == 1:
            data = b"GET /" + draw.randbytes(30).replace(b"\n", b"") + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"
        elif kind == 2:
            data = b"GET /health HTTP/1.1\r\n" + b"".join(b"x%d: %d\r\n" % (i, i) for i in range(3000)) + b"\r\n"
        else:
            data = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n\x16\x03\x01" + draw.randbytes(60)
        with socket.create_connection(("127.0.0.1", opened.port), timeout=5) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(2)
                reply = connection.recv(65536)
            except (ConnectionError, TimeoutError):
                reply = b""
            assert status(reply) in (0, 200, 400, 403, 404, 405, 431), reply[:200]
        if number % 20 == 0:
            assert httpx.get(f"{opened.url}/health").status_code == 200
    assert httpx.get(f"{opened.url}/health").status_code == 200
