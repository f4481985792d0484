"""What every test runs under: no network but loopback, fixed seeds, one compute thread, nothing left behind."""

import os
import random
import socket
import sys
from collections.abc import Iterator
from typing import Any


# Before anything imports the libraries that read them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
from hypothesis import settings


# The same examples in every run, nothing remembered on disk, and no clock: a busy machine must not fail a test.
settings.register_profile("moestro", derandomize=True, database=None, deadline=None)
settings.load_profile("moestro")

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that leaves the machine is a failure; gloo and test servers use the loopback."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else str(address)
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(host).startswith(LOOPBACK):
            raise AssertionError(f"a test tried to reach {host}; tests use no network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from the same seeds and must close every context and session it opened."""
    random.seed(0)
    np.random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
    yield
    context, session = sys.modules.get("moestro.core.context"), sys.modules.get("moestro.core.session")
    if context is not None and session is not None:
        assert context.current_context() is None, "the test left a routing context open"
        assert session.current_session() is session._NONE, "the test left a session open"
