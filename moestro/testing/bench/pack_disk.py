"""Packing an 8 GB mixture on disk: peak memory and time, against having the checkpoint in memory.

The checkpoint is synthetic (16 layers of 32 experts, float16) and written first; packing runs in a process of its own,
whose peak is what the system says of it. There is one round: the figure is memory.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from moestro.testing.bench.harness import Row
from moestro.testing.large import write_mixture


SHAPE = {"layers": 16, "experts": 32, "dim": 2048, "inner": 1280}

CODE = """
import json, resource, sys
from moestro.cli import main
assert main(["compress", "finequant", sys.argv[1], sys.argv[2], "--scale-type", "f16"]) == 0
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def run(rounds: int) -> list[Row]:
    """Rows of the one case; ``rounds`` has no effect."""
    with tempfile.TemporaryDirectory(prefix="pack-disk-") as place:
        folder = Path(place)
        written = write_mixture(folder / "in", **SHAPE, dtype=torch.float16)
        started = time.perf_counter()
        command = [sys.executable, "-c", CODE, str(folder / "in"), str(folder / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - started
        peak = json.loads(done.stdout.splitlines()[-1])["peak"]
        packed = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
    case = f"{written / 1e9:.1f} GB mixture to {packed / 1e9:.2f} GB in {seconds:.0f} s"
    return [Row(case, "peak memory", "MB", peak / 1e6, "checkpoint in memory", written / 1e6, written / peak, 0.0)]
