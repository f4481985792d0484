"""Peak memory of packing a checkpoint on disk: one layer's, not the model's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moestro.testing.large import write_mixture


CODE = """
import json, resource, sys
from moestro.cli import main
assert main(["compress", "finequant", sys.argv[1] + "-small", sys.argv[2] + "-small"]) == 0  # imports everything
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(["compress", "finequant", sys.argv[1], sys.argv[2], "--bits", "4"]) == 0
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"before": before * 1024, "after": after * 1024}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["stacked", "split"])
def test_a_checkpoint_is_packed_in_the_memory_of_a_layer(layout: str, tmp_path: Path) -> None:
    """16 layers of 50 MB: 800 MB of experts are packed while the process grows by less than 6 layers."""
    layers, layer = 16, 8 * 3 * 1024 * 512 * 4
    written = write_mixture(tmp_path / "in", layers=layers, experts=8, dim=1024, inner=512, layout=layout)
    assert written > layers * layer
    write_mixture(tmp_path / "in-small", layers=1, experts=2, dim=64, inner=32)
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "in"), str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    peak = json.loads(run.stdout.splitlines()[-1])
    grown = peak["after"] - peak["before"]
    assert grown < 6 * layer, f"{grown:,} bytes for layers of {layer:,}"
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())["surgery"][0]
    assert receipt["ledger"]["rows_touched"] == layers * 8 * 3
    assert receipt["bits_per_weight"]["after"] < 4.2
