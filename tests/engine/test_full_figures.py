"""Exactness and faults of serving at full figures: slow, run by ``make test-long``.

With ``MOESTRO_READINGS`` set to a file, what each test counted is written there as JSON.
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from moestro.core.decoding import PLAIN
from moestro.core.registry import infos, method
from moestro.engine import room
from moestro.engine.fields import BadRequest, parse
from moestro.engine.open import Opened
from moestro.engine.open_native import Native
from moestro.engine.pack import pack_model
from moestro.engine.packed import EXPERTS, Packed
from moestro.engine.protocol import chat_completion, completion
from moestro.engine.requests import Limits
from moestro.engine.scheduler import Scheduler
from moestro.engine.store import ExpertStore
from moestro.testing.tiny import tiny_folder
from tests.engine.running import Answer, run
from tests.engine.serving import Running, byte_vocabulary, status
from tests.engine.slab_files import Disk
from tests.engine.test_api_faults import awake, head, process
from tests.engine.test_api_fuzz import FIELDS, ODD, generated


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CONTEXT = 4096
LENGTH = 60
BODY = {"model": "stub", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keep what a test counted."""

    def keep(**readings: float) -> None:
        name = request.node.name.removeprefix("test_")
        print(name, readings)
        if where := os.environ.get("MOESTRO_READINGS"):
            path = Path(where)
            known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            rounded = {key: float(f"{value:.4g}") for key, value in readings.items()}
            path.write_text(json.dumps({**known, name: rounded}, indent=1, sort_keys=True) + "\n", "utf-8")

    return keep


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of random weights in 8 bits; 257 tokens, so that bytes are its vocabulary."""
    folder = tmp_path_factory.mktemp("full")
    tiny_folder("qwen3_moe", folder / "model", head_dim=16, vocab_size=257, max_position_embeddings=1024)
    pack_model(folder / "model", folder / "packed", bits=8)
    return folder / "packed"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process holds PyTorch; a serving one does not, and tiny models need no working space."""
    monkeypatch.setattr(room, "resident_set", lambda: 0)
    monkeypatch.setattr(room, "working_bytes", lambda model: 0)


def written(forward: Any, prompts: list[list[int]], count: int, limits: Limits) -> list[list[Any]]:
    """Of every request its tokens with the log-probabilities of the likeliest five."""
    answers = [Answer(prompt, count, temperature=n % 2, seed=n, logprobs=5) for n, prompt in enumerate(prompts)]
    run(Scheduler(forward, limits), *answers)
    return [
        [(piece.choice.token, piece.choice.logprob, tuple(piece.choice.top)) for piece in answer.pieces if piece.choice]
        for answer in answers
    ]


def test_ten_thousand_tokens_alone_and_in_company(packed: Path, record: Callable[..., None]) -> None:
    draw = random.Random(3)
    prompts = [[draw.randrange(257) for _ in range(draw.randrange(1, 90))] for _ in range(40)]
    native = Native(packed, 1 << 30, context=16384)
    alone = written(native.forward, prompts, 250, Limits(running=1))
    compared = 0
    for limits in (
        Limits(running=2),
        Limits(running=8, chunk=7, mixed=3),
        Limits(running=32),
        Limits(running=32, chunk=33),
    ):
        found = written(native.forward, prompts, 250, limits)
        assert found == alone
        compared += sum(map(len, found))
    native.close()
    assert compared >= 10_000
    record(tokens_compared=compared, different=0)


def test_every_cache_size_policy_and_prefetch(packed: Path, record: Callable[..., None]) -> None:
    opened = Packed.open(packed)
    stride, total = next(iter(opened.experts.values())).stride, sum(there.num for there in opened.experts.values())
    names = [
        name
        for name, info in infos().items()
        if info.acts == "CachePolicy" and name in ("serve.lru", "serve.lfu", "serve.lfru")
    ]
    draw = random.Random(4)
    prompts = [[draw.randrange(257) for _ in range(9)] for _ in range(4)]
    native = Native(packed, 1 << 30, context=CONTEXT)
    wanted = written(native.forward, prompts, LENGTH, Limits(running=4))
    calls = misses = arrangements = 0
    for slots in range(1, total + 1):
        for name in names:
            for ahead in (False, True):
                use = method(name)
                store = ExpertStore(opened, slots * stride, use.entry("policy")(use.configure({})))
                forward = native.forward
                forward.store, slabs, forward.slabs = store, forward.slabs, {}
                order = random.Random(slots)

                def routed(layer: int, ids: Any, weights: Any) -> None:
                    nonlocal calls
                    calls += 1
                    if ahead and layer + 1 in opened.experts:  # noqa: B023
                        there = opened.experts[layer + 1].num
                        store.prefetch(layer + 1, order.sample(range(there), 2))  # noqa: B023

                forward.on_route = routed
                try:
                    assert written(forward, prompts, LENGTH, Limits(running=4)) == wanted, (slots, name, ahead)
                finally:
                    forward.store, forward.slabs, forward.on_route = None, slabs, None
                    misses += store.counters.misses
                    store.close()
                arrangements += 1
    native.close()
    assert calls >= 5_000
    assert misses > 1_000
    record(layer_calls=calls, arrangements=arrangements, misses=misses, different=0)


class Faulty:
    """A server over a packed model of its own whose disk can be made to fail.

    Attributes:
        broken: set while it fails.
    """

    def __init__(self, packed: Path, here: Path, fault: str) -> None:
        here.mkdir()
        for file in packed.iterdir():
            (here / file.name).write_bytes(file.read_bytes())
        opened = Packed.open(here)
        stride, experts = next(iter(opened.experts.values())).stride, sum(t.num for t in opened.experts.values())
        self.fault, self.broken, use = fault, threading.Event(), method("serve.lru")
        self.native = Native(here, 1 << 30, context=CONTEXT)
        leaves = use.entry("policy")(use.configure({}))
        self.store = ExpertStore(opened, (experts // 3) * stride, leaves, read=Disk(fault=self.told))
        self.native.forward.store, self.native.forward.slabs = self.store, {}
        self.running = Running(Opened("stub", self.native.forward, byte_vocabulary(), "native", 1024))
        self.client = httpx.Client(base_url=self.running.url, timeout=60)

    def told(self, number: int, offset: int) -> int | None:
        """See Disk."""
        if self.broken.is_set() and self.fault == "eio" and number % 97 == 0:
            raise OSError(5, os.strerror(5))
        if self.broken.is_set() and self.fault == "stall" and number % 3 == 0:
            time.sleep(0.5)
        return None

    def ask(self, number: int) -> tuple[int, float, str]:
        """Status, seconds and body of a request."""
        began = time.monotonic()
        reply = self.client.post("/v1/completions", json={**BODY, "prompt": f"request {number}", "max_tokens": 6})
        return reply.status_code, time.monotonic() - began, reply.text

    def close(self) -> None:
        """All of it."""
        self.client.close()
        self.running.stop()
        self.store.close()
        self.native.close()


@pytest.mark.parametrize("fault", ["eio", "stall", "removed", "replaced"])
def test_a_disk_that_fails_under_the_server(
    fault: str, packed: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    """A request that meets the fault ends with a typed error in time; others go on, and all is well after it."""
    here = tmp_path / "packed"
    with contextlib.closing(Faulty(packed, here, fault)) as server:
        wanted = [json.loads(server.ask(n)[2])["choices"][0]["text"] for n in range(8)]
        server.broken.set()
        if fault == "removed":
            (here / EXPERTS).unlink()
        elif fault == "replaced":
            (tmp_path / "other").write_bytes(b"\0" * 4096)
            (tmp_path / "other").replace(here / EXPERTS)
        during = [server.ask(n % 8) for n in range(40)]
        assert {code for code, _, _ in during} <= {200, 500, 503}
        for number, (code, _, text) in enumerate(during):
            if code == 200:
                assert json.loads(text)["choices"][0]["text"] == wanted[number % 8]
            else:
                assert "error" in json.loads(text)
        failed = [seconds for code, seconds, _ in during if code != 200]
        assert bool(failed) == (fault == "eio")
        assert len(failed) < len(during)
        assert max(failed, default=0.0) < 2
        assert server.client.get("/health").status_code == 200
        server.broken.clear()
        after = [server.ask(n) for n in range(8)]
        assert [json.loads(text)["choices"][0]["text"] for _, _, text in after] == wanted
        server.running.idle()
        record(requests=len(during), failed=len(failed), slowest_error_s=max(failed, default=0.0))


def test_a_million_bodies(record: Callable[..., None]) -> None:
    draw, accepted, refused, slowest = random.Random(15), 0, 0, 0.0
    statuses: set[int] = set()
    whole = {completion: {"prompt": "hello"}, chat_completion: {"messages": [{"role": "user", "content": "hi"}]}}
    for _ in range(1_000_000):
        read = draw.choice((completion, chat_completion))
        body = generated(draw)
        if draw.random() < 0.3:  # one field of a sound body is odd
            body = {"model": "stub", **whole[read], draw.choice(FIELDS): draw.choice(ODD)}
        data = json.dumps(body).encode()
        if draw.random() < 0.1:
            at = draw.randrange(len(data))
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        began = time.perf_counter()
        try:
            asked = read(parse(data), "stub", 257, 1024)
        except BadRequest as error:
            refused += 1
            statuses.add(error.status)
        else:
            accepted += 1
            assert 1 <= asked.n <= 8
            assert asked.decoder is PLAIN or asked.decoder.name.startswith("serve.")
        slowest = max(slowest, time.perf_counter() - began)
    assert statuses <= {400, 404}
    assert accepted > 10_000
    assert refused > 100_000
    record(bodies=accepted + refused, accepted=accepted, refused=refused, slowest_ms=1e3 * slowest)


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Crowd:
    """Clients that ask without pause for a minute, and others that send a byte a second.

    Attributes:
        answered, refused: seconds of each request. turned_away: at the door. slow: connections of slow writers.
        most: bytes of the server, at most.
    """

    def __init__(self, port: int, pid: int) -> None:
        self.port, self.pid = port, pid
        self.answered: list[float] = []
        self.refused: list[float] = []
        self.turned_away = self.slow = self.most = 0

    async def hammer(self, number: int, stop: float) -> None:
        """Sockets of its own: a client library would measure its queue."""
        while time.monotonic() < stop:
            data = head({**BODY, "prompt": f"{number}", "max_tokens": 20})
            began = time.monotonic()
            reply = b""
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(data)
                reply = await reader.read(1 << 16)
                writer.close()
            took = time.monotonic() - began
            if status(reply) == 200:
                self.answered.append(took)
                continue
            if not reply or b"too many connections" in reply:
                self.turned_away += 1
            else:
                assert status(reply) in (429, 503), reply
                assert b"retry-after: " in reply.lower()
                self.refused.append(took)
            await asyncio.sleep(0.5 + number % 10 / 10)

    async def dawdle(self, stop: float) -> None:
        """One byte a second."""
        while time.monotonic() < stop:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                self.slow += 1
                for byte in b"POST /v1/completions HTTP/1.1\r\n":
                    writer.write(bytes([byte]))
                    await asyncio.sleep(1)
                    if time.monotonic() > stop or reader.at_eof():
                        break
                writer.close()

    async def watch(self, stop: float) -> None:
        """The server's memory."""
        while time.monotonic() < stop:
            self.most = max(self.most, resident(self.pid))
            await asyncio.sleep(0.25)

    async def come(self) -> None:
        """All of them."""
        stop = time.monotonic() + 60
        clients = [self.hammer(number, stop) for number in range(800)]
        await asyncio.gather(*clients, *(self.dawdle(stop) for _ in range(100)), self.watch(stop))


def test_a_minute_of_fifty_times_too_many(record: Callable[..., None]) -> None:
    """800 clients that ask without pause of a server that runs 16 at once, beside slow writers."""
    with process(0.002) as (started, port, _), httpx.Client(base_url=awake(port), timeout=60) as client:

        def ask(number: int) -> float:
            began = time.monotonic()
            assert client.post("/v1/completions", json={**BODY, "prompt": f"{number}", "max_tokens": 20}).is_success
            return time.monotonic() - began

        def files() -> int:
            return len(list(Path(f"/proc/{started.pid}/fd").iterdir()))

        unloaded = statistics.median(ask(n) for n in range(20))
        held, before, crowd = files(), resident(started.pid), Crowd(port, started.pid)
        asyncio.run(crowd.come())
        began = time.monotonic()
        ask(0)
        back = time.monotonic() - began
        after = statistics.median(ask(n) for n in range(20))
        until = time.monotonic() + 20
        while files() > held + 5 and time.monotonic() < until:
            time.sleep(0.1)
        assert crowd.answered
        assert crowd.refused
        assert crowd.most - before < 128 << 20
        assert back < 5
        assert files() <= held + 5
        record(
            answered=len(crowd.answered), refused=len(crowd.refused), door_shut=crowd.turned_away,
            slow_writers=crowd.slow, refusal_median_ms=1e3 * statistics.median(crowd.refused),
            answer_p99_s=float(np.quantile(crowd.answered, 0.99)), unloaded_s=unloaded, after_s=after, back_s=back,
            growth_mb=(crowd.most - before) / 1e6, files_left=files() - held,
        )  # fmt: skip


def test_ten_thousand_idle_connections(record: Callable[..., None]) -> None:
    with process(0.0) as (started, port, _):
        url = awake(port)
        before, kept, refused = resident(started.pid), [], 0
        try:
            for _ in range(10_000):
                connection = socket.socket()
                connection.settimeout(5)
                try:
                    connection.connect(("127.0.0.1", port))
                except OSError:
                    refused += 1
                    connection.close()
                else:
                    kept.append(connection)
            grown = resident(started.pid) - before
            began = time.monotonic()
            while True:
                with contextlib.suppress(httpx.TransportError):
                    reply = httpx.get(f"{url}/health", timeout=5)
                    if reply.status_code == 200:
                        break
                assert time.monotonic() - began < 60
                time.sleep(0.2)
            reached = time.monotonic() - began
        finally:
            for connection in kept:
                connection.close()
        began = time.monotonic()
        body = {**BODY, "prompt": "x", "max_tokens": 4}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 200
        assert time.monotonic() - began < 5
        assert grown < 256 << 20
        record(connections=len(kept), not_accepted=refused, growth_mb=grown / 1e6, health_answers_after_s=reached)
