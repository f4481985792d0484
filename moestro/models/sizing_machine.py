"""What this machine does in a second: measured once in some seconds, kept in a file, used to predict speeds.

Everything is measured with what is installed (plain torch, Transformers' decoder, Moestro's layer), on weights that do
not fit into caches, the best of several runs. Nothing here is a promise for another machine or a busier one.
"""

import math
import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from moestro.core.config import Config, read_kept
from moestro.core.files import cache_root, write_text
from moestro.core.memory import peak_bytes, resident_bytes


BITS = (4, 8, 16, 32)
ROWS = (1, 8, 32, 128, 512)
_SIDE = 2048
_MATRICES = 8
_PANEL = 256
_BUDGET_S = 0.3
_FEWEST_RUNS, _MOST_RUNS = 3, 1000
_DISK_BYTES = 64 << 20
_BLOCK = 1 << 20

Progress = Callable[[str], None]


class Machine(Config):
    """Measured rates.

    Attributes:
        signature: processor, threads and torch version; a file with another one is measured anew.
        read_bytes_per_s: reading memory. disk_bytes_per_s: reading a file past the page cache in blocks of 1 MiB.
        row_weights_per_s: matrix weights a second in a product with one row, by the bits they are stored in (packed
            ones are unpacked to float32 in panels).
        gemm_flops_per_s: float32 operations a second by the number of rows of a product.
        step_s, layer_s: seconds of a decoding step that do not depend on the size of the matrices: once, and for
            every layer. mixture_s, choice_s: what a mixture layer adds, once and for every chosen expert.
        process_bytes: memory of a process that has loaded everything but a model.
        busy: processes that wanted to run for every core when measuring began; well above 1 the rates are too low.
    """

    signature: str
    measured: str
    read_bytes_per_s: float = Field(gt=0)
    disk_bytes_per_s: float = Field(gt=0)
    row_weights_per_s: dict[int, float]
    gemm_flops_per_s: dict[int, float]
    step_s: float = Field(ge=0)
    layer_s: float = Field(ge=0)
    mixture_s: float = Field(ge=0)
    choice_s: float = Field(ge=0)
    process_bytes: int = Field(ge=0)
    busy: float = Field(default=0.0, ge=0)

    def seconds_per_weight(self, rows: float, bits: float) -> float:
        """Seconds one matrix weight costs in a product with ``rows`` rows; widths between those measured round up.

        float32: 2 rows / rate(rows), interpolated between the measured rows in logarithms. Packed: the same and the
        unpacking, which is what a product with one row costs.
        """
        width = next((known for known in BITS if bits <= known), BITS[-1])
        one = 1 / self.row_weights_per_s[width]
        if rows <= 1:
            return one
        product = 2 * rows / self._rate(rows)
        return product if width == BITS[-1] else one + product

    def _rate(self, rows: float) -> float:
        known = sorted(self.gemm_flops_per_s)
        if rows >= known[-1]:
            return self.gemm_flops_per_s[known[-1]]
        high = next(index for index, value in enumerate(known) if value > rows)
        a, b = known[max(high - 1, 0)], known[high]
        part = 0.0 if a == b else math.log(rows / a) / math.log(b / a)
        low_rate, high_rate = self.gemm_flops_per_s[a], self.gemm_flops_per_s[b]
        return math.exp((1 - part) * math.log(low_rate) + part * math.log(high_rate))


def machine_file() -> Path:
    """Where the measurement is kept."""
    return cache_root() / "machine.json"


def signature() -> str:
    """What must be the same for a measurement to hold."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    name = model or platform.processor() or platform.machine()
    return f"{name}; {torch.get_num_threads()} threads; torch {torch.__version__}"


def this_machine(*, again: bool = False, progress: Progress | None = None) -> Machine:
    """The kept measurement of this machine, or a new one, which takes some seconds and is kept.

    Args:
        again: measure even if there is one. progress: told what is being measured.
    """
    path = machine_file()
    if not again:
        kept = read_kept(Machine, path)
        if kept is not None and kept.signature == signature():
            return kept
    found = measure(progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, found.model_dump_json(indent=1) + "\n")
    return found


def measure(progress: Progress | None = None) -> Machine:
    """Measure everything."""
    tell = progress or (lambda text: None)
    busy = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0
    tell("decoding steps")
    steps = _steps()
    process = resident_bytes(peak_bytes())
    tell("memory and matrix products")
    rates = _rates()
    tell("disk")
    return Machine(
        signature=signature(),
        measured=time.strftime("%Y-%m-%d %H:%M"),
        disk_bytes_per_s=disk_rate(machine_file().parent),
        process_bytes=process,
        busy=busy,
        **steps,
        **rates,
    )


def _seconds(run: Callable[[int], Any], budgets: int = 1) -> float:
    """Seconds of a run: the best of those that fit into 0.3 s, for whatever else runs only adds to them."""
    run(0)
    best, end = math.inf, time.perf_counter() + budgets * _BUDGET_S
    for index in range(1, _MOST_RUNS):
        started = time.perf_counter()
        run(index)
        now = time.perf_counter()
        best = min(best, now - started)
        if index >= _FEWEST_RUNS and now > end:
            break
    return best


@torch.no_grad()
def _rates() -> dict[str, Any]:
    linear = torch.nn.functional.linear
    wide = torch.rand(_MATRICES, _SIDE, _SIDE)
    weights = wide[0].numel()

    def panels(take: Callable[[int], torch.Tensor], unpack: Callable[[torch.Tensor, torch.Tensor], Any]) -> float:
        """Weights a second of one row by matrices that are unpacked panel by panel."""
        row, buffer = torch.rand(1, _SIDE), torch.empty(_PANEL, _SIDE)

        def run(index: int) -> None:
            for panel in torch.split(take(index % _MATRICES), _PANEL):
                unpack(buffer, panel)
                linear(row, buffer)

        return weights / _seconds(run)

    def by_all(x: torch.Tensor, index: int) -> torch.Tensor:
        return linear(x, wide[index % _MATRICES])

    read = wide.numel() * 4 / _seconds(lambda _: wide.sum())
    gemm = {}
    for rows in ROWS:
        x = torch.rand(rows, _SIDE)
        taken = _seconds(partial(by_all, x))
        gemm[rows] = 2 * rows * weights / taken
    by_bits = {32: gemm[1] / 2}
    read = max(read, 4 * by_bits[32])
    half = wide.bfloat16()
    row = torch.rand(1, _SIDE).bfloat16()
    direct = weights / _seconds(lambda i: linear(row, half[i % _MATRICES]))
    by_bits[16] = max(direct, panels(lambda i: half[i], lambda buffer, panel: buffer.copy_(panel)))
    small = (wide * 255 - 128).to(torch.int8)
    by_bits[8] = panels(lambda i: small[i], lambda buffer, panel: buffer.copy_(panel))
    packed = (wide[..., : _SIDE // 2] * 255).to(torch.uint8)

    def nibbles(buffer: torch.Tensor, panel: torch.Tensor) -> None:
        buffer[:, : _SIDE // 2].copy_(panel & 15)
        buffer[:, _SIDE // 2 :].copy_(panel >> 4)

    by_bits[4] = panels(lambda i: packed[i], nibbles)
    return {"read_bytes_per_s": read, "gemm_flops_per_s": gemm, "row_weights_per_s": by_bits}


def _steps() -> dict[str, float]:
    """Fixed costs of a decoding step, from models so small that their matrices cost nothing."""
    shallow, deep = _step("llama", 2), _step("llama", 10)
    layer = max(deep - shallow, 0.0) / 8
    few, many = (_step("mixtral", 6, num_local_experts=16, num_experts_per_tok=k) / 6 for k in (2, 10))
    step = max(shallow - 2 * layer, 0.0)
    choice = max(many - few, 0.0) / 8
    mixture = max(few - step / 6 - layer - 2 * choice, 0.0)
    return {"step_s": step, "layer_s": layer, "mixture_s": mixture, "choice_s": choice}


@torch.no_grad()
def _step(family: str, layers: int, **fields: int) -> float:
    """Seconds of one decoded token of a tiny model in Moestro's form, its weights drawn at random."""
    from transformers import CONFIG_MAPPING, DynamicCache

    from moestro.models.families import family as spec_of
    from moestro.models.load import dressed
    from moestro.models.skeleton import materialise, model_class

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = CONFIG_MAPPING[family](
        vocab_size=64, num_hidden_layers=layers, bos_token_id=None, eos_token_id=None, **sizes, **fields
    )
    model = dressed(model_class(config, None), config, spec_of(family), [])
    materialise(model, [name for name, _ in model.named_parameters()], torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    cache, token = DynamicCache(config=model.config), torch.ones(1, 1, dtype=torch.long)
    return _seconds(lambda _: model(input_ids=token, past_key_values=cache, use_cache=True), 2)


def disk_rate(folder: Path) -> float:
    """Bytes a second of reading a new file in ``folder`` in blocks of 1 MiB, past the page cache where it can be."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="disk-", suffix=".tmp") as file:
        file.write(os.urandom(_BLOCK) * (_DISK_BYTES // _BLOCK))
        file.flush()
        os.fsync(file.fileno())
        with _uncached(Path(file.name)) as descriptor, mmap.mmap(-1, _BLOCK) as buffer:
            started = time.perf_counter()
            for start in range(0, _DISK_BYTES, _BLOCK):
                os.preadv(descriptor, [buffer], start)
            return _DISK_BYTES / (time.perf_counter() - started)


@contextmanager
def _uncached(path: Path) -> Iterator[int]:
    """A descriptor that reads from the disk: directly, or else with the file's cached pages dropped."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        yield descriptor
    finally:
        os.close(descriptor)
