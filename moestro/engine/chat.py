"""Chat messages to a prompt by a model's template, in a process of its own with limits on time, memory and output."""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from moestro.core.errors import MoestroError


SECONDS = 0.8
_START = 20.0


class TemplateError(MoestroError):
    """The template failed, took too long, or does not accept the messages."""


class Templates:
    """Renders templates; safe to use from several threads, one at a time.

    Args:
        seconds: for one text. The process is replaced when it takes longer.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._buffer = b""

    def render(self, template: str, values: dict[str, Any]) -> str:
        """The text of ``template`` with ``values`` (messages, tools, add_generation_prompt, special tokens).

        Raises:
            TemplateError: see the class.
        """
        line = json.dumps({"template": template, "values": values}).encode() + b"\n"
        with self._lock:
            process = self._started()
            try:
                answer = self._exchange(process, line, self.seconds)
            except (OSError, EOFError, TimeoutError) as error:
                self._kill()
                reason = f"took more than {self.seconds} s" if isinstance(error, TimeoutError) else "ended its process"
                raise TemplateError(f"the model's chat template {reason}") from None
        if "error" in answer:
            raise TemplateError(f"the model's chat template failed: {answer['error']}")
        text: str = answer["text"]
        return text

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._kill()

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._kill()
        worker = Path(__file__).with_name("chat_worker.py")
        # -I: neither the environment nor the working folder decide what the process imports.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
        )
        self._buffer = b""
        try:  # an empty text: the process is up, and its start does not count as a template's time
            self._exchange(self._process, b'{"template": "", "values": {}}\n', _START)
        except (OSError, EOFError, TimeoutError):
            self._kill()
            raise TemplateError("the process that renders chat templates does not start") from None
        return self._process

    def _exchange(self, process: "subprocess.Popen[bytes]", line: bytes, seconds: float) -> dict[str, Any]:
        """Send a line and read one, both within the time.

        Raises:
            TimeoutError, EOFError, OSError: late, gone, broken.
        """
        assert process.stdin is not None
        assert process.stdout is not None
        until = time.monotonic() + seconds
        to, source = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(to, False)
        rest = memoryview(line)
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            readable, writable, _ = select.select([source], [to] if rest else [], [], max(left, 0))
            if left <= 0 or not (readable or writable):
                raise TimeoutError
            if writable:
                rest = rest[os.write(to, rest[:65536]) :]
            if readable:
                part = os.read(source, 1 << 20)
                if not part:
                    raise EOFError
                self._buffer += part
        found, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(found)
        return answer

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
