"""Clients that vanish, too many of them, slow ones, signals; and a process without PyTorch."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from moestro.engine import http as http_module
from moestro.engine.requests import Limits
from tests.engine.serving import serving


BODY = {"model": "stub", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
ROOT = Path(__file__).parents[2]


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def head(body: dict) -> bytes:
    data = json.dumps(body).encode()
    start = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return start + b"content-length: %d\r\n\r\n" % len(data) + data


async def vanish(port: int, draw: random.Random, number: int) -> None:
    """Ask, and be gone at a random moment: while sending, while queued, while reading."""
    data = head({**BODY, "prompt": f"client {number}", "stream": bool(number % 2)})
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data[: draw.randrange(len(data))] if number % 5 == 0 else data)
        if number % 3:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(200), draw.random() * 0.1)
        if number % 7 == 0:
            writer.transport.abort()
        else:
            writer.close()
    except OSError:
        return


@pytest.mark.slow
def test_a_thousand_clients_vanish() -> None:
    storm(1000)


def test_two_hundred_clients_vanish() -> None:
    storm(200)


def storm(count: int) -> None:
    with serving(Limits(running=8, waiting=400, waiting_tokens=10**6), delay=0.003) as running:
        alone = httpx.post(f"{running.url}/v1/completions", json={**BODY, "prompt": "steady"}).json()["choices"][0]

        async def go() -> list[httpx.Response]:
            draw = random.Random(2)
            async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
                asked = {**BODY, "prompt": "steady"}
                steady = [asyncio.ensure_future(client.post("/v1/completions", json=asked)) for _ in range(4)]
                begun = running.engine.scheduler.running  # before a crowd at the door turns anybody away
                while len(begun) < 4 and not any(task.done() for task in steady):
                    await asyncio.sleep(0.005)
                waves = range(0, count, 100)
                for start in waves:
                    await asyncio.gather(*(vanish(running.port, draw, start + n) for n in range(100)))
                return list(await asyncio.gather(*steady))

        replies = asyncio.run(go())
        assert [reply.status_code for reply in replies] == [200] * 4, [reply.text for reply in replies]
        assert [reply.json()["choices"][0]["text"] for reply in replies] == [alone["text"]] * 4
        running.idle(10)
        assert running.engine.scheduler.stats.requests["cancelled"] > count // 10


@pytest.mark.parametrize("stream", [True, False])
def test_a_vanished_client_frees_its_place_within_a_step(stream: bool) -> None:
    with serving(delay=0.05) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(head({**BODY, "max_tokens": 500, "prompt": "x", "stream": stream}))
            until = time.monotonic() + 5
            while not running.engine.scheduler.running and time.monotonic() < until:
                time.sleep(0.002)
            time.sleep(0.12)
            assert running.engine.scheduler.running
        gone = time.monotonic()
        while running.engine.scheduler.running and time.monotonic() < gone + 5:
            time.sleep(0.002)
        assert time.monotonic() - gone < 0.25
        assert running.engine.scheduler.stats.requests["cancelled"] == 1


def test_overload_is_refused_at_once_and_passes() -> None:
    limits = Limits(running=4, waiting=8)
    with serving(limits, delay=0.002) as running:

        async def go(count: int) -> list[tuple[int, float, dict[str, str]]]:
            found = []
            async with httpx.AsyncClient(base_url=running.url, timeout=60, limits=httpx.Limits()) as client:

                async def one(number: int) -> None:
                    began = time.monotonic()
                    reply = await client.post("/v1/completions", json={**BODY, "prompt": f"{number}"})
                    found.append((reply.status_code, time.monotonic() - began, dict(reply.headers)))

                await asyncio.gather(*(one(n) for n in range(count)))
            return found

        assert {code for code, _, _ in asyncio.run(go(4))} == {200}
        before = memory()
        replies = asyncio.run(go(200))  # 50 times what runs at once
        assert {code for code, _, _ in replies} == {200, 429}
        assert sum(code == 200 for code, _, _ in replies) >= 12
        assert all(int(headers["retry-after"]) >= 1 for code, _, headers in replies if code == 429)
        assert memory() - before < 64 << 20
        running.idle()
        began = time.monotonic()
        assert {code for code, _, _ in asyncio.run(go(4))} == {200}
        assert time.monotonic() - began < 5


def test_a_client_that_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "WRITE_SECONDS", 0.3)
    with serving(vocab=257) as running:
        connections = []
        for number in range(3):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", running.port))
            asked = {**BODY, "max_tokens": 900, "prompt": f"{number}", "stream": True, "logprobs": 20}
            connection.sendall(head(asked))
            connections.append(connection)
        assert httpx.post(f"{running.url}/v1/completions", json={**BODY, "prompt": "x"}, timeout=30).status_code == 200
        running.idle(20)
        until = time.monotonic() + 10
        while running.server.server_state.tasks and time.monotonic() < until:
            time.sleep(0.05)
        assert not running.server.server_state.tasks
        for connection in connections:
            connection.close()


def test_nothing_grows_over_many_requests() -> None:
    with serving() as running, httpx.Client(base_url=running.url, timeout=30) as client:

        def others() -> int:
            """Threads beside those that read texts: two, each begun when the others are at work."""
            return sum(not thread.name.startswith("moestro-text") for thread in threading.enumerate())

        def many(count: int) -> None:
            for number in range(count):
                body = {**BODY, "prompt": f"{number % 50}", "max_tokens": 4}
                assert client.post("/v1/completions", json=body).status_code == 200

        many(150)
        files, threads, size = len(os.listdir("/proc/self/fd")), others(), memory()  # noqa: PTH208
        many(300)
        assert len(os.listdir("/proc/self/fd")) <= files  # noqa: PTH208
        assert others() == threads
        assert threading.active_count() - threads <= 2
        assert memory() - size < 4 << 20


@contextlib.contextmanager
def process(delay: float) -> Iterator[tuple["subprocess.Popen[str]", int, list[str]]]:
    """A server in a process of its own; killed at the end whatever happened."""
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.serving", str(delay)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    try:
        port, *heavy = started.stdout.readline().split()
        yield started, int(port), heavy
    finally:
        started.kill()
        started.wait()
        started.stdout.close()


def awake(port: int) -> str:
    """The address of a server of its own process, once it answers."""
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 20
    while time.monotonic() < until:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return url
        time.sleep(0.05)
    raise AssertionError(f"{url} does not answer")


def test_sigterm_finishes_what_runs_without_torch_ever_loaded() -> None:
    with process(0.02) as (started, port, heavy):
        url = awake(port)
        assert heavy == []
        assert httpx.get(f"{url}/metrics").status_code == 200
        chat = {**BODY, "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}
        assert httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=30).status_code == 200
        got: list[httpx.Response] = []
        asked = threading.Thread(
            target=lambda: got.append(httpx.post(f"{url}/v1/completions", json={**BODY, "prompt": "x"}, timeout=30))
        )
        asked.start()
        time.sleep(0.4)
        began = time.monotonic()
        started.send_signal(signal.SIGTERM)
        asked.join(20)
        assert started.wait(20) == 0
        assert time.monotonic() - began < 10
        assert started.stdout is not None
        assert started.stdout.read().split() == ["heavy:"]
    assert got[0].status_code == 200
    assert got[0].json()["usage"]["completion_tokens"] == 60


def test_sigterm_ends_a_long_answer_in_time() -> None:
    with process(0.05) as (started, port, _):  # noqa: SIM117
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(head({**BODY, "prompt": "x", "max_tokens": 900, "stream": True}))
            assert connection.recv(100)
            began = time.monotonic()
            started.send_signal(signal.SIGTERM)
            assert started.wait(20) == 0
            assert 1 < time.monotonic() - began < 10


def test_first_tokens_stay_quick_while_rubbish_comes_in() -> None:
    with serving() as running, httpx.Client(base_url=running.url) as client:

        def quick() -> float:
            began = time.monotonic()
            assert client.post("/v1/completions", json={**BODY, "prompt": "x", "max_tokens": 1}).status_code == 200
            return time.monotonic() - began

        calm = statistics.median(quick() for _ in range(20))
        stop = threading.Event()

        def rubbish() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", running.port)) as connection:
                    connection.sendall(b"\x00\xff" * 100)
                    connection.recv(100)

        thread = threading.Thread(target=rubbish)
        thread.start()
        try:
            loud = statistics.median(quick() for _ in range(20))
        finally:
            stop.set()
            thread.join()
        assert loud < 20 * calm + 0.2
