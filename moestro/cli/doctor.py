"""`moestro doctor`: what is installed, what runs, how fast, what is missing."""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import typer


if TYPE_CHECKING:
    import torch

    from moestro.ops import FFNWeights

__all__ = ["Check", "checks", "register"]

REQUIRED = (
    "torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "scipy", "pyarrow", "pydantic",
    "PyYAML", "typer", "rich", "matplotlib",
)  # fmt: skip
OPTIONAL = {
    "moestro-native": "C++ kernels; the plain torch paths work without them",
    "tensorboard": "training curves for TensorBoard (pip install 'moestro[tensorboard]')",
    "datasets": "Hugging Face datasets as data sources (pip install 'moestro[datasets]')",
    "peft": "LoRA adapters made elsewhere (pip install 'moestro[peft]')",
    "lm_eval": "lm-evaluation-harness (pip install 'moestro[eval]')",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the answer. `state`: `ok`, `missing` (optional part), or `bad` (something will not work)."""

    group: str
    name: str
    value: str
    state: str = "ok"
    note: str = ""


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def doctor(
        as_json: bool = typer.Option(False, "--json", help="Print the checks as JSON."),
        quick: bool = typer.Option(False, "--quick", help="Leave out whatever needs torch to be loaded."),
    ) -> None:
        """Say what is installed, which kernels run and how fast, and what is missing.

        It always ends with status 0: whatever cannot be found out is part of the answer.
        """
        found = list(checks(quick=quick))
        if as_json:
            print(json.dumps([asdict(check) for check in found], indent=1))
        else:
            _show(found)


def checks(*, quick: bool = False) -> Iterator[Check]:
    """Every check, in the order in which it is printed. A check that raises becomes a line that says so."""
    yield from _guard("system", "machine", _system)
    yield from _guard("packages", "packages", _packages)
    yield from _guard("optional", "optional parts", _optional)
    if not quick:
        yield from _guard("speed", "matrix products", _speed)
        yield from _guard("kernels", "expert backends", _kernels)


def _guard(group: str, name: str, find: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from find()
    except Exception as error:  # the doctor reports on broken installations, so nothing may stop it
        yield Check(group, name, f"{type(error).__name__}: {error}", "bad")


def _system() -> Iterator[Check]:
    from moestro import __version__

    yield Check("system", "moestro", __version__, note=str(Path(__file__).resolve().parents[1]))
    yield Check("system", "python", platform.python_version(), note=sys.executable)
    yield Check("system", "machine", f"{platform.system()} {platform.machine()}", note=_processor())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Check("system", "cores", f"{usable} usable", note=f"OMP_NUM_THREADS={threads}" if threads else "")
    total, available = memory()
    low = available < 4 * GIB
    yield Check(
        "system", "memory", f"{available / GIB:.1f} GiB free of {total / GIB:.1f}",
        "bad" if low else "ok", "less than 4 GiB: the demo will not fit" if low else "",
    )  # fmt: skip
    free = shutil.disk_usage(Path.cwd()).free
    yield Check("system", "disk", f"{free / GIB:.1f} GiB free", "ok" if free > 5 * GIB else "bad", str(Path.cwd()))


def _processor() -> str:
    """Model name and the vector units that decide which kernels are fast."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16")
    units = [unit for unit in known if unit in flags]
    return f"{fields.get('model name', platform.processor())} [{', '.join(units) or 'no vector units found'}]"


def memory() -> tuple[int, int]:
    """(total, available) bytes; a control group's limit counts as the machine's."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    available = total
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":") for line in info.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.exists() and limit.read_text().strip().isdigit():
            total = min(total, int(limit.read_text()))
    return total, min(available, total)


def _packages() -> Iterator[Check]:
    for name in REQUIRED:
        version = _version(name)
        if version is None:
            yield Check("packages", name, "missing", "bad", "reinstall: pip install moestro")
        else:
            yield Check("packages", name, version)


def _optional() -> Iterator[Check]:
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        yield Check("optional", name, version or "not installed", "ok" if version else "missing", purpose)
    browser = next((found for found in map(shutil.which, BROWSERS) if found), None)
    yield Check(
        "optional", "chromium", browser or "not found", "ok" if browser else "missing",
        "prints reports to PDF; any browser opens the HTML page",
    )  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _speed() -> Iterator[Check]:
    import torch

    yield Check("speed", "torch threads", str(torch.get_num_threads()), note=torch.backends.cpu.get_cpu_capability())
    devices = f"{torch.cuda.device_count()} cuda" if torch.cuda.is_available() else "cpu only"
    yield Check("speed", "devices", devices)
    full = _gflops(torch.float32)
    half = _gflops(torch.bfloat16)
    yield Check("speed", "float32 products", f"{full:.1f} GFLOP/s")
    slow = half < full
    yield Check(
        "speed", "bfloat16 products", f"{half:.1f} GFLOP/s",
        note="slower than float32 here: compute in float32" if slow else "at least as fast as float32",
    )  # fmt: skip


def _gflops(dtype: "torch.dtype") -> float:
    """Best rate of square matrix products, GFLOP/s. The size grows only while it is cheap: bfloat16 may crawl."""
    import torch

    best = 0.0
    for size in (128, 256, 512, 1024):
        matrix = torch.ones(size, size, dtype=dtype)
        for _ in range(3):
            started = time.perf_counter()
            matrix @ matrix
            took = time.perf_counter() - started
            best = max(best, 2 * size**3 / took / 1e9)
        if took > 0.05:
            break
    return best


def _kernels() -> Iterator[Check]:
    """Run every expert backend on one small mixture, time it, and compare it with the reference loop."""
    import torch

    from moestro.ops import BACKENDS, FFNWeights

    generator = torch.Generator().manual_seed(0)
    dim, inner, experts = 64, 128, 8
    weights = FFNWeights(
        up_EJD=torch.randn(experts, 2 * inner, dim, generator=generator) / dim**0.5,
        down_EOI=torch.randn(experts, dim, inner, generator=generator) / inner**0.5,
    )
    references: dict[int, torch.Tensor] = {}
    for backend in BACKENDS:
        told, worst, reason = [], 0.0, ""
        for tokens in (256, 1):
            x_TD = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(tokens))
            try:
                y_TD, seconds = _time_backend(backend, x_TD, weights)
            except Exception as error:  # a backend that this machine or this size lacks is an answer
                reason = f"{tokens} tokens: {error}"
                continue
            worst = max(worst, (y_TD - references.setdefault(tokens, y_TD)).abs().max().item())
            told.append(f"{tokens} token{'s' * (tokens > 1)} {seconds * 1e3:.2f} ms")
        state = "missing" if not told else "ok" if worst <= 1e-4 else "bad"
        note = f"differs from the loop by {worst:.1e}" if told else reason
        yield Check("kernels", backend, ", ".join(told) or "does not run here", state, note)


def _time_backend(
    backend: str, x_TD: "torch.Tensor", weights: "FFNWeights", top_k: int = 2
) -> tuple["torch.Tensor", float]:
    """Output of a mixture in which token t uses the experts t and t + 1, and the best of five times in seconds."""
    import torch

    from moestro.ops import fused_ffn

    tokens = len(x_TD)
    token_N = torch.arange(tokens).repeat_interleave(top_k)
    expert_N = (token_N + torch.arange(tokens * top_k) % top_k) % len(weights.up_EJD)
    weight_N = torch.full((tokens * top_k,), 1 / top_k)
    best = float("inf")
    with torch.no_grad():
        for _ in range(5):
            started = time.perf_counter()
            y_TD = fused_ffn(x_TD, token_N, expert_N, weight_N, tokens, weights, "silu", backend=backend)  # type: ignore[arg-type]
            best = min(best, time.perf_counter() - started)
    return y_TD, best


def _show(found: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    marks = {"ok": "[green]ok[/]", "missing": "[yellow]--[/]", "bad": "[red]!![/]"}
    table = Table(box=None, pad_edge=False, show_header=False)
    group = ""
    for check in found:
        if check.group != group:
            group = check.group
            table.add_row(f"[bold]{group}[/]")
        note = f"[dim]{escape(check.note)}[/]" if check.note else ""
        table.add_row(marks[check.state], check.name, escape(check.value), note)
    console.print(table)
    wrong = sum(check.state == "bad" for check in found)
    print(f"{wrong} of {len(found)} checks need attention" if wrong else f"all {len(found)} checks are fine")
