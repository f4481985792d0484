"""`moestro serve`: what it refuses before it loads, and a tiny model from start to SIGTERM."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from moestro.cli import main
from moestro.cli.serve import _engine, _planned
from moestro.core.decoding import PLAIN
from moestro.core.plan import MethodUse, ServingPlan
from moestro.data.tokens import byte_tokenizer
from moestro.engine.requests import Limits
from moestro.testing.tiny import tiny_folder
from tests.engine.stub import StubForward


ROOT = Path(__file__).parents[2]
ORDER = MethodUse(method="serve.read_me_batching", config={"max_wait": 0.5})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_folder("qwen3_moe", path, vocab_size=259, max_position_embeddings=256)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "1GiB", "--host", "0.0.0.0"], "api-key-file"),
        (["--memory", "1G"], "unit"),
        (["--memory", "40KiB"], "moestro pack"),
        (["--memory", "1GiB", "--context", "100000000"], "fewer than"),
        (["--memory", "1GiB", "--api-key-file", "nowhere"], "nowhere"),
        (["--memory", "1GiB", "--port", "70000"], "port"),
        (["--memory", "1GiB", "--policy", "serve.scmoe"], "serve.lru"),
        (["--memory", "1GiB", "--policy", "lru"], "serve.lru"),
        (["--memory", "1GiB", "--forecast", "serve.lru"], "forecast serve.lru is none of"),
        (["--memory", "1GiB", "--order", "serve.lru"], "order serve.lru is none of serve.read_me_batching"),
        (["--memory", "1GiB", "--order", "serve.read_me_batching"], "needs a model whose router reads token ids only"),
        (
            ["--memory", "1GiB", "--decoder", "serve.lru"],
            "decoder serve.lru is none of serve.dynamic_pruning, serve.scmoe",
        ),
        ([], "give --memory"),
        (["--plan", "nowhere.json"], "nowhere.json: not a readable plan"),
    ],
)
def test_what_is_refused(folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_options_go_before_the_plan(tmp_path: Path) -> None:
    uses = {"policy": MethodUse(method="serve.lfu", config={"half_life": 9.0}), "order": ORDER}
    plan = ServingPlan(method="plan", budget_bytes=5 << 20, tiers={}, context=64, chunk=7, running=3, **uses)
    path = plan.save(tmp_path / "plan.json")
    assert _planned(path, None, {}, {}) == plan
    found = _planned(path, "1MiB", {"policy": "serve.lru", "decoder": None}, {"chunk": 9, "running": None})
    changes = {"budget_bytes": 1 << 20, "policy": MethodUse(method="serve.lru"), "chunk": 9}
    assert found == plan.model_copy(update=changes)


def test_a_plan_s_methods_stand_in_the_engine() -> None:
    def who_first(requests: list[Any]) -> list[Any]:
        return requests

    flow = MethodUse(method="serve.expertflow", config={"width": 3})
    for uses, width, order, batcher in (
        ({"forecast": flow, "order": flow}, 3, who_first, None),
        ({"forecast": flow, "order": ORDER}, None, None, "serve.read_me_batching"),
        ({"forecast": flow}, None, None, None),
    ):
        forward = StubForward()
        forward.forecast = SimpleNamespace(order=who_first, width=3)  # type: ignore[attr-defined]
        forward.gate = SimpleNamespace()  # type: ignore[attr-defined]
        opened: Any = SimpleNamespace(forward=forward, cache=dict, close=lambda: None, context=64)
        plan = ServingPlan(method="plan", budget_bytes=1, tiers={}, running=5, **uses)
        engine = _engine(plan, opened, {"waiting": 7, "waiting_tokens": 99}, share=False)
        engine.close()
        scheduler = engine.scheduler
        assert scheduler.limits == Limits(running=5, waiting=7, waiting_tokens=99, width=width)
        assert (scheduler.order, getattr(scheduler.batcher, "name", None)) == (order, batcher)
        assert engine.decoder is PLAIN


def test_a_short_key_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    key.write_text("short")
    assert main(["serve", str(folder), "--memory", "1GiB", "--api-key-file", str(key)]) == 2
    assert "16" in capsys.readouterr().err


def test_a_packed_model_is_never_opened_by_the_wrong_forward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pack.json").write_text("{}")
    assert main(["serve", str(tmp_path), "--memory", "1GiB"]) == 2
    assert "packed" in capsys.readouterr().err


def test_from_start_to_sigterm(folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a-key-of-sixteen-or-more\n")
    started = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moestro", "serve", str(folder), "--memory", "64MiB", "--port", "0",
         "--api-key-file", str(key)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert started.stderr is not None
    try:
        line = started.stderr.readline()
        assert "(reference) at http://127.0.0.1:" in line
        url = line.split()[-1].rstrip("/")
        with httpx.Client(base_url=url, headers={"x-api-key": key.read_text().strip()}, timeout=30) as client:
            until = time.monotonic() + 20
            while time.monotonic() < until:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        break
                time.sleep(0.05)
            body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
            reply = client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            assert reply.json()["usage"]["prompt_tokens"] == 5
            contrasted = client.post("/v1/chat/completions", json={**body, "decoding": {"method": "serve.scmoe"}})
            assert contrasted.json()["moestro"] == {"decoding": "serve.scmoe", "exact": False}
            assert httpx.get(f"{url}/v1/models").status_code == 401
        began = time.monotonic()
        started.send_signal(signal.SIGTERM)
        assert started.wait(20) == 0
        assert time.monotonic() - began < 10
        assert started.stderr.read() == ""
    finally:
        started.kill()
        started.wait()
        started.stderr.close()
