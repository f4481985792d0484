"""Servers for tests: a stub model behind the real application, on a free port of the loopback."""

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moestro.engine.api import Api
from moestro.engine.http import Server
from moestro.engine.open import Opened
from moestro.engine.requests import Limits
from moestro.engine.service import Engine
from moestro.engine.vocabulary import Vocabulary
from tests.engine.stub import StubForward


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
END = 0


def byte_vocabulary() -> Vocabulary:
    """One token a byte, and an end token at 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: n for n, s in enumerate(("<|end|>", *alphabet))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return Vocabulary(tokenizer, frozenset([END]), None, TEMPLATE, {"eos_token": "<|end|>"})


def stub_opened(**options: Any) -> Opened:
    """A served stub."""
    forward = StubForward(**{"pages": 256, "vocab": 257, **options})
    return Opened("stub", forward, byte_vocabulary(), "reference", 1024)


class Running:
    """A server that answers at ``url``."""

    def __init__(self, opened: Opened, limits: Limits | None = None, key: bytes | None = None) -> None:
        self.engine = Engine(opened, limits)
        self.api = Api(self.engine, key)
        self.socket = socket.socket(proto=socket.IPPROTO_TCP)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(self.api, "127.0.0.1", self.port, self.engine.drain)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        until = time.monotonic() + 20
        while not self.server.started and time.monotonic() < until:
            time.sleep(0.005)
        assert self.server.started

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.socket.close()
        assert not self.thread.is_alive()

    def idle(self, seconds: float = 5.0) -> None:
        """Wait until nothing runs, and look for leaks."""
        scheduler = self.engine.scheduler
        until = time.monotonic() + seconds
        while (scheduler.running or scheduler.waiting) and time.monotonic() < until:
            time.sleep(0.005)
        assert scheduler.running == []
        assert list(scheduler.waiting) == []
        assert scheduler.pages.room == scheduler.pages.count


@contextmanager
def serving(limits: Limits | None = None, key: bytes | None = None, **options: Any) -> Iterator[Running]:
    """A running server over a stub; all must be given back at the end."""
    running = Running(stub_opened(**options), limits, key)
    try:
        yield running
        running.idle()
    finally:
        running.stop()


def raw(port: int, data: bytes, *, seconds: float = 10.0) -> bytes:
    """Send bytes and read until the other side closes (or goes quiet)."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
        except (TimeoutError, ConnectionResetError):
            pass
        return found


def status(reply: bytes) -> int:
    """The status of an answer, 0 when there is none."""
    head = reply.split(b"\r\n", 1)[0].split()
    return int(head[1]) if len(head) > 1 else 0


def main(arguments: list[str]) -> None:
    """``python -m tests.engine.serving DELAY``: serve a stub until a signal, as a process of its own."""
    opened = stub_opened(delay=float(arguments[0]))
    engine = Engine(opened)
    listening = socket.socket(proto=socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(256)  # whoever reads the port may connect at once
    print(listening.getsockname()[1], *sorted({"torch", "transformers"} & set(sys.modules)), flush=True)
    Server(Api(engine, None), "127.0.0.1", 0, engine.drain).run([listening])
    print("heavy:", *sorted({"torch", "transformers"} & set(sys.modules)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
