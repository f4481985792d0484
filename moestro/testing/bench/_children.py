"""Arms in processes of their own, seen from the benchmark."""

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import Any

from moestro.core.errors import MoestroError
from moestro.testing.bench._cgroup import Group


class ArmError(MoestroError):
    """The process of an arm ended; the message is the last line it wrote."""


class Child:
    """A running arm.

    Args:
        kind: see ``_arm``. options: see there. group: whose limit it runs under; it joins before anything is loaded.

    Attributes:
        about: what the arm says of itself.
    """

    def __init__(self, kind: str, options: dict[str, Any], group: Group | None = None) -> None:
        self.kind, self.group = kind, group
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by ``close``)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moestro.testing.bench._arm", kind, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            preexec_fn=None if group is None else group.join,
        )
        self.peak = 0
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def feed(self, at: int, count: int, start: int, *, single: bool = False, save: str | None = None) -> dict[str, Any]:
        """See ``_arm.run``.

        Raises:
            ArmError: the process has ended.
        """
        assert self._process.stdin is not None
        order = {"at": at, "count": count, "start": start, "single": single, "save": save}
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        found = self._answer()
        self.peak = max(self.peak, found["peak"])
        return found

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        why = "killed, as under a limit of memory" if code == -9 else (said[-1] if said else f"code {code}")
        raise ArmError(f"{self.kind}: {why}")

    def close(self) -> None:
        """End the process and remove its group."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
        if self.group is not None:
            self.group.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
